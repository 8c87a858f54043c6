"""What the user meant: arguments checked, key sets turned into masks, neutral modulations dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import require, require_finite, require_tensor
from ..device import on_device, wide_on_cpu
from ..modulations import MODULATIONS, BandWeight, BiasDelta, Keys, LogitGain, Modulation, QueryScale
from ..rope import RoPE


@dataclass(frozen=True, eq=False)
class Scale:
    """A QueryScale resolved: ``r (Bs, Sq)``, keys ``(Sk,)`` bool, pairs ``(D/2,)`` bool."""

    r: Tensor
    keys: Tensor
    pairs: Tensor


@dataclass(frozen=True, eq=False)
class Weight:
    """A BandWeight resolved: ``w (D/2,)``, keys ``(Sk,)`` bool."""

    w: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """A BiasDelta resolved: ``bias`` (lambda) and ``delta (Bg,)``, keys ``(Sk,)`` bool."""

    bias: Tensor
    delta: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class Gain:
    """A LogitGain resolved: ``g (Bg, Sq)``, keys ``(Sk,)`` bool."""

    g: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class Resolved:
    """The arguments of a call as the user meant them; the reference reads nothing else.

    Args:
        rope, key_rope: angles of the queries, and of the keys where they are other tokens.
        key_mask: ``(Bx, Sk)`` bool, True = attend; None where all keys are there.
        scale, weights, groups, gains: the modulations that are not neutral, values in float64.
    """

    rope: RoPE | None = None
    key_rope: RoPE | None = None
    key_mask: Tensor | None = None
    scale: Scale | None = None
    weights: tuple[Weight, ...] = ()
    groups: tuple[Group, ...] = ()
    gains: tuple[Gain, ...] = ()

    @property
    def modulations(self) -> int:
        """How many modulations are not neutral."""
        return (self.scale is not None) + len(self.weights) + len(self.groups) + len(self.gains)

    def to(self, device: torch.device | None) -> Resolved:
        """The same with its modulations on another device, floating-point values in the widest dtype it has; angles and
        mask stay."""

        def move(m: Any):
            return type(m)(**{name: on_device(x, device) for name, x in vars(m).items()})

        moved = {name: tuple(map(move, getattr(self, name))) for name in ("weights", "groups", "gains")}
        return replace(self, scale=self.scale and move(self.scale), **moved)

    def with_groups(self, numbers: Sequence[tuple[float | Tensor, float | Tensor]]) -> Resolved:
        """The same with other ``(bias, delta)`` in its groups, in their order."""
        found = [group_values(bias, delta) for bias, delta in numbers]
        groups = (
            Group(bias.to(group.bias), delta.to(group.delta), group.keys)
            for group, (bias, delta) in zip(self.groups, found, strict=True)
        )
        return replace(self, groups=tuple(groups))

    def with_weight(self, weight: Tensor) -> Resolved:
        """The same with other values ``(D/2,)`` in its only BandWeight."""
        (held,) = self.weights
        return replace(self, weights=(Weight(weight.detach().to(held.w, copy=True), held.keys),))


def as_tuple(modulations: Any) -> tuple:
    """Modulations as they are handed over, a list or tuple, as a tuple."""
    is_sequence = isinstance(modulations, (list, tuple))
    require(is_sequence, "modulations", "a list or tuple of modulations", type(modulations).__name__)
    return tuple(modulations)


def check_arguments(
    rope: RoPE | None, key_rope: RoPE | None, modulations: Sequence[Modulation], key_mask: Tensor | None
) -> None:
    """Check what does not depend on lengths."""
    require(rope is None or isinstance(rope, RoPE), "rope", "a fastrope.RoPE or None", type(rope).__name__)
    require(key_rope is None or isinstance(key_rope, RoPE), "key_rope", "a RoPE or None", type(key_rope).__name__)
    if key_rope is not None:
        require(rope is not None, "rope", "a RoPE when key_rope is given", None)
        require(key_rope.pairing == rope.pairing, "key_rope.pairing", rope.pairing, key_rope.pairing)
        require(key_rope.pairs == rope.pairs, "key_rope.angles", f"(..., {rope.pairs})", tuple(key_rope.angles.shape))
        if rope.axis is not None and key_rope.axis is not None:
            same = torch.equal(rope.axis.cpu(), key_rope.axis.cpu())
            require(same, "key_rope.axis", "the axis map of rope", key_rope.axis.tolist())
    for name, r in (("rope", rope), ("key_rope", key_rope)):
        require(
            r is None or not r.angles.requires_grad, f"{name}.angles", "constants: detach them", "requires_grad=True"
        )
    for m in modulations:
        if not isinstance(m, MODULATIONS):
            method = ", which methods give when they are bound by fastrope.apply" if hasattr(m, "modulations") else ""
            require(False, "modulations", f"QueryScale, BandWeight, BiasDelta or LogitGain{method}", repr(m))
        for name in ("scale", "weight", "bias", "delta", "gain"):
            value = getattr(m, name, None)
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(
                    f"{type(m).__name__}.{name}: expected a tensor that does not require grad (modulation parameters "
                    "are constants of the op), received requires_grad=True; detach it"
                )
        if isinstance(m, (QueryScale, BandWeight)):
            require(rope is not None, "rope", f"a RoPE, since {type(m).__name__} acts on its pairs", None)
    count = sum(isinstance(m, QueryScale) for m in modulations)
    require(count <= 1, "modulations", "at most one QueryScale (one vector covers all queries)", count)
    if key_mask is not None:
        require_tensor("key_mask", key_mask, (2,), "(B, Sk)")
        require(key_mask.dtype == torch.bool, "key_mask", "bool, True = attend", key_mask.dtype)


def common_device(
    rope: RoPE | None,
    key_rope: RoPE | None,
    modulations: Sequence[Modulation],
    key_mask: Tensor | None,
    device: torch.device | str | None,
) -> torch.device | None:
    """The device all tensors of a call are on, or the one asked for; None where nothing tells.

    Raises:
        ValueError: naming the tensor that is elsewhere.
    """
    named = [("rope.angles", rope and rope.angles), ("key_rope.angles", key_rope and key_rope.angles)]
    named += [("key_mask", key_mask)]
    for m in modulations:
        for name in ("scale", "weight", "bias", "delta", "gain"):
            named.append((f"{type(m).__name__}.{name}", getattr(m, name, None)))
    named = [(name, t) for name, t in named if isinstance(t, Tensor)]
    wanted = torch.device(device) if device is not None else (named[0][1].device if named else None)
    for name, t in named:
        same = wanted is not None and same_device(t.device, wanted)
        require(same, name, f"device {wanted}", t.device)
    return named[0][1].device if named else wanted


def same_device(a: torch.device, b: torch.device) -> bool:
    """Equal devices, where "cuda" without an index means whichever is current."""
    return a.type == b.type and (a.index is None or b.index is None or a.index == b.index)


def lengths(
    rope: RoPE | None,
    key_rope: RoPE | None,
    modulations: Sequence[Modulation],
    key_mask: Tensor | None,
    num_queries: int | None,
    num_keys: int | None,
) -> tuple[int | None, int | None]:
    """``Sq`` and ``Sk``, agreed on by everything that tells them; None where nothing does."""

    def agree(current: int | None, name: str, length: int, whose: str):
        require(current is None or current == length, name, f"{current} tokens, as many as dim 1 of {whose}", length)
        return length

    if rope is not None:
        num_queries = agree(num_queries, "rope.angles", rope.tokens, "q")
        name = "key_rope.angles" if key_rope else "rope.angles"
        num_keys = agree(num_keys, name, (key_rope or rope).tokens, "k")
    if key_mask is not None:
        num_keys = agree(num_keys, "key_mask", key_mask.shape[1], "k")
    for m in modulations:
        if isinstance(m, QueryScale):
            num_queries = agree(num_queries, "QueryScale.scale", m.scale.shape[-1], "q")
        if isinstance(m, LogitGain):
            num_queries = agree(num_queries, "LogitGain.gain", m.gain.shape[-1], "q")
        if isinstance(m.keys, Tensor) and m.keys.dtype == torch.bool:
            num_keys = agree(num_keys, f"{type(m).__name__}.keys", m.keys.shape[0], "k")
    require(not modulations or num_keys is not None, "num_keys", "Sk, which no argument tells", None)
    return num_queries, num_keys


def _key_set(owner: str, keys: Keys, num_keys: int) -> Tensor:
    """A key set as a ``(Sk,)`` bool mask on the CPU."""
    covered = torch.zeros(num_keys, dtype=torch.bool, device="cpu")
    if isinstance(keys, slice):
        for bound in (keys.start, keys.stop):
            inside = bound is None or -num_keys <= bound <= num_keys
            require(inside, f"{owner}.keys", f"a slice within {num_keys} keys", keys)
        require(keys.step is None or keys.step > 0, f"{owner}.keys", "a slice with a positive step", keys)
        covered[keys] = True
    elif keys.dtype == torch.bool:
        covered |= keys.cpu()
    elif keys.numel():
        index = keys.cpu().long()
        inside = bool(((index >= 0) & (index < num_keys)).all())
        require(inside, f"{owner}.keys", f"indices in [0, {num_keys})", f"[{index.min()}, {index.max()}]")
        covered[index] = True
    require(bool(covered.any()), f"{owner}.keys", "at least one key", "an empty key set")
    return covered


def _values(name: str, values: float | Tensor, dims: tuple[str, ...]) -> Tensor:
    """A copy of finite values as float64 on the CPU. A NaN equals nothing, so no scale bucket would hold it."""
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=torch.float64, device="cpu")
    values = wide_on_cpu(values).clone()
    values = values.expand((1,) * (len(dims) - values.ndim) + values.shape)
    require_finite(name, values, dims)
    return values


def group_values(bias: float | Tensor, delta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Lambda and delta of a BiasDelta, ``(Bg,)`` each."""
    dims = ("batch row",)
    return _values("BiasDelta.bias", bias, dims), _values("BiasDelta.delta", delta, dims)


def resolve(
    rope: RoPE | None,
    key_rope: RoPE | None,
    modulations: Sequence[Modulation],
    key_mask: Tensor | None,
    num_keys: int | None,
) -> Resolved:
    """Modulations with their keys as masks and values as float64 on the CPU, neutral ones dropped; so is a mask that
    hides no key."""
    scale, weights, groups, gains = None, [], [], []
    count = num_keys or 0  # known where there are modulations
    grouped = torch.zeros(count, dtype=torch.bool, device="cpu")
    for m in modulations:
        keys = _key_set(type(m).__name__, m.keys, count)
        if isinstance(m, QueryScale):
            r = _values("QueryScale.scale", m.scale, ("batch row", "query"))
            pairs = _scaled_pairs(rope, key_rope or rope, m.axes)
            if bool((r != 1).any()) and bool(pairs.any()):
                scale = Scale(r, keys, pairs)
        elif isinstance(m, BandWeight):
            require(m.weight.shape[0] == rope.pairs, "BandWeight.weight", f"({rope.pairs},)", tuple(m.weight.shape))
            w = _values("BandWeight.weight", m.weight, ("pair",))
            if bool((w != 1).any()):
                weights.append(Weight(w, keys))
        elif isinstance(m, BiasDelta):
            overlap = bool((grouped & keys).any())
            require(not overlap, "BiasDelta.keys", "groups that share no key", "overlapping groups")
            grouped |= keys
            bias, delta = group_values(m.bias, m.delta)
            if bool((bias != 1).any()) or bool((delta != 1).any()):
                groups.append(Group(bias, delta, keys))
        else:
            g = _values("LogitGain.gain", m.gain, ("batch row", "query"))
            if bool((g != 1).any()):
                gains.append(Gain(g, keys))
    if key_mask is not None and bool(key_mask.all()):
        key_mask = None
    return Resolved(rope, key_rope, key_mask, scale, tuple(weights), tuple(groups), tuple(gains))


def _scaled_pairs(rope: RoPE | None, key_rope: RoPE | None, axes: tuple[int, ...] | None) -> Tensor:
    if axes is None:
        return torch.ones(rope.pairs, dtype=torch.bool, device="cpu")
    axis = rope.axis if rope.axis is not None else key_rope.axis
    require(axis is not None, "rope.axis", "an axis per pair, since QueryScale names axes", None)
    axis = axis.cpu()
    known = axis.unique().tolist()
    require(all(a in known for a in axes), "QueryScale.axes", f"axes of the RoPE, {known}", axes)
    return torch.isin(axis, torch.tensor(axes, dtype=axis.dtype, device="cpu"))
