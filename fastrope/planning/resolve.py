"""From arguments to what the user meant: arguments checked, key sets turned into masks, neutral modulations dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import require, require_bias, require_finite, require_tensor
from ..device import wide_on_cpu
from ..modulations import (
    MODULATIONS,
    PARAMETERS,
    BandWeight,
    BiasDelta,
    KeyBias,
    Keys,
    LogitBias,
    LogitGain,
    Modulation,
    QueryScale,
    ValueGain,
)  # fmt: skip
from ..rope import RoPE
from .resolved import Bias, Gain, Group, Resolved, Scale, Weight


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
            names = ", ".join(kind.__name__ for kind in MODULATIONS)
            require(False, "modulations", f"some of {names}{method}", repr(m))
        for name in PARAMETERS:
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
        for name in PARAMETERS:
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
        if isinstance(m, LogitBias) and isinstance(m.bias, Tensor) and m.bias.ndim and m.bias.shape[-1] > 1:
            num_queries = agree(num_queries, "LogitBias.bias", m.bias.shape[-1], "q")
        if isinstance(m, KeyBias):
            num_keys = agree(num_keys, "KeyBias.bias", m.bias.shape[-1], "k")
        elif isinstance(m.keys, Tensor) and m.keys.dtype == torch.bool:
            num_keys = agree(num_keys, f"{type(m).__name__}.keys", m.keys.shape[0], "k")
    require(not modulations or num_keys is not None, "num_keys", "Sk, which no argument tells", None)
    biased = any(isinstance(m, LogitBias) for m in modulations)
    require(not biased or num_queries is not None, "num_queries", "Sq, which no argument tells", None)
    return num_queries, num_keys


def _key_index(owner: str, keys: Keys, num_keys: int) -> Tensor:
    """The keys of a set in the order in which it names them, ``(n,)`` int64 on the CPU."""
    if isinstance(keys, slice):
        for bound in (keys.start, keys.stop):
            inside = bound is None or -num_keys <= bound <= num_keys
            require(inside, f"{owner}.keys", f"a slice within {num_keys} keys", keys)
        require(keys.step is None or keys.step > 0, f"{owner}.keys", "a slice with a positive step", keys)
        index = torch.arange(num_keys, device="cpu")[keys]
    elif keys.dtype == torch.bool:
        index = keys.cpu().nonzero().flatten()
    else:
        index = keys.cpu().long()
        inside = not len(index) or bool(((index >= 0) & (index < num_keys)).all())
        received = f"[{index.min()}, {index.max()}]" if len(index) else ""
        require(inside, f"{owner}.keys", f"indices in [0, {num_keys})", received)
    require(len(index) > 0, f"{owner}.keys", "at least one key", "an empty key set")
    return index


def _values(name: str, values: float | Tensor, dims: tuple[str, ...], check: Callable = require_finite) -> Tensor:
    """A copy of finite values as float64 on the CPU. A NaN equals nothing, so no scale bucket would hold it."""
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=torch.float64, device="cpu")
    values = wide_on_cpu(values).clone()
    values = values.expand((1,) * (len(dims) - values.ndim) + values.shape)
    check(name, values, dims)
    return values


def group_values(bias: float | Tensor, delta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Lambda and delta of a BiasDelta, ``(Bg,)`` each."""
    dims = ("batch row",)
    return _values("BiasDelta.bias", bias, dims), _values("BiasDelta.delta", delta, dims)


def logit_bias(bias: float | Tensor, num_queries: int) -> Tensor:
    """Values of a LogitBias, ``(Bb, Sq)``."""
    b = _values("LogitBias.bias", bias, ("batch row", "query"), require_bias)
    require(b.shape[1] in (1, num_queries), "LogitBias.bias", f"one number, or {num_queries} queries", b.shape[1])
    return b.expand(-1, num_queries)


def _value_gain(m: ValueGain, index: Tensor, num_keys: int) -> Tensor:
    """``(Bu, Sk)``: the gains of a ValueGain, 1 on keys that it does not cover."""
    gain, n = m.gain, len(index)
    if isinstance(gain, Tensor) and gain.ndim == 1 and len(gain) != n:
        gain = gain[:, None]
    u = _values("ValueGain.gain", gain, ("batch row", "covered key"))
    require(u.shape[1] in (1, n), "ValueGain.gain", f"one number per batch row or {n} keys", tuple(u.shape))
    distinct = u.shape[1] == 1 or len(index.unique()) == n
    require(distinct, "ValueGain.keys", "each key once, where every key has a gain of its own", "a key twice")
    found = torch.ones(len(u), num_keys, dtype=torch.float64, device="cpu")
    found[:, index] = u.expand(-1, n)
    return found


def resolve(
    rope: RoPE | None,
    key_rope: RoPE | None,
    modulations: Sequence[Modulation],
    key_mask: Tensor | None,
    num_queries: int | None,
    num_keys: int | None,
) -> Resolved:
    """Modulations with their keys as masks and values as float64 on the CPU, neutral ones dropped; so is a mask that
    hides no key."""
    scale, weights, groups, gains, biases, key_biases, value_gains = None, [], [], [], [], [], []
    count = num_keys or 0  # known where there are modulations
    grouped = {on: torch.zeros(count, dtype=torch.bool, device="cpu") for on in ("keys", "values")}
    for m in modulations:
        if isinstance(m, KeyBias):
            beta = _values("KeyBias.bias", m.bias, ("batch row", "key"), require_bias)
            if bool((beta != 0).any()):
                key_biases.append(beta)
            continue
        index = _key_index(type(m).__name__, m.keys, count)
        keys = torch.zeros(count, dtype=torch.bool, device="cpu")
        keys[index] = True
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
            overlap = bool((grouped[m.on] & keys).any())
            require(not overlap, "BiasDelta.keys", f"groups of {m.on} that share no key", "overlapping groups")
            grouped[m.on] |= keys
            bias, delta = group_values(m.bias, m.delta)
            if bool((bias != 1).any()) or bool((delta != 1).any()):
                groups.append(Group(bias, delta, keys, m.on))
        elif isinstance(m, LogitBias):
            b = logit_bias(m.bias, num_queries or 0)  # known where there are such
            if bool((b != 0).any()):
                biases.append(Bias(b, keys))
        elif isinstance(m, ValueGain):
            u = _value_gain(m, index, count)
            if bool((u != 1).any()):
                value_gains.append(u)
        else:
            g = _values("LogitGain.gain", m.gain, ("batch row", "query"))
            if bool((g != 1).any()):
                gains.append(Gain(g, keys))
    key_mask = None if key_mask is None or bool(key_mask.all()) else key_mask.detach().cpu().clone()
    several = map(tuple, (weights, groups, gains, biases, key_biases, value_gains))
    return Resolved(rope, key_rope, key_mask, scale, *several)


def _scaled_pairs(rope: RoPE | None, key_rope: RoPE | None, axes: tuple[int, ...] | None) -> Tensor:
    if axes is None:
        return torch.ones(rope.pairs, dtype=torch.bool, device="cpu")
    axis = rope.axis if rope.axis is not None else key_rope.axis
    require(axis is not None, "rope.axis", "an axis per pair, since QueryScale names axes", None)
    axis = axis.cpu()
    known = axis.unique().tolist()
    require(all(a in known for a in axes), "QueryScale.axes", f"axes of the RoPE, {known}", axes)
    return torch.isin(axis, torch.tensor(axes, dtype=axis.dtype, device="cpu"))
