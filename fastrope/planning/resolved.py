"""What the user meant: modulations with their keys as masks, and values in float64; neutral ones are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..device import on_device
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
    """A BiasDelta resolved: ``bias`` (lambda) and ``delta (Bg,)``, keys ``(Sk,)`` bool; ``on`` keys or values."""

    bias: Tensor
    delta: Tensor
    keys: Tensor
    on: str = "keys"


@dataclass(frozen=True, eq=False)
class Gain:
    """A LogitGain resolved: ``g (Bg, Sq)``, keys ``(Sk,)`` bool."""

    g: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class Bias:
    """A LogitBias resolved: ``b (Bb, Sq)``, natural log units, keys ``(Sk,)`` bool."""

    b: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class Resolved:
    """The arguments of a call as the user meant them; the reference reads nothing else.

    Args:
        rope, key_rope: angles of the queries, and of the keys where they are other tokens.
        key_mask: ``(Bx, Sk)`` bool, True = attend; None where all keys are there.
        scale, weights, groups, gains, biases: the modulations that are not neutral, values in float64. Groups are those
            of keys and of values, in the order given.
        key_biases: of KeyBias, ``(Bx, Sk)`` each.
        value_gains: of ValueGain, ``(Bx, Sk)`` each, 1 on keys that it does not cover.
    """

    rope: RoPE | None = None
    key_rope: RoPE | None = None
    key_mask: Tensor | None = None
    scale: Scale | None = None
    weights: tuple[Weight, ...] = ()
    groups: tuple[Group, ...] = ()
    gains: tuple[Gain, ...] = ()
    biases: tuple[Bias, ...] = ()
    key_biases: tuple[Tensor, ...] = ()
    value_gains: tuple[Tensor, ...] = ()

    @property
    def modulations(self) -> int:
        """How many modulations are not neutral."""
        several = self.weights, self.groups, self.gains, self.biases, self.key_biases, self.value_gains
        return (self.scale is not None) + sum(map(len, several))

    @property
    def key_groups(self) -> tuple[Group, ...]:
        """BiasDelta groups of keys."""
        return tuple(m for m in self.groups if m.on == "keys")

    @property
    def value_groups(self) -> tuple[Group, ...]:
        """BiasDelta groups of values."""
        return tuple(m for m in self.groups if m.on == "values")

    @property
    def key_bias(self) -> Tensor | None:
        """``(Bx, Sk)`` sum of the key biases, ``-inf`` where the mask is False; None without either."""
        total, mask = None, self.key_mask
        if mask is not None:
            total = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(~mask, -torch.inf)
        for beta in self.key_biases:
            total = beta if total is None else total + beta
        return total

    @property
    def present(self) -> Tensor | None:
        """``(Bx, Sk)`` bool, keys that neither the mask nor a key bias of ``-inf`` takes away; None where all are."""
        found = self.key_mask
        for beta in self.key_biases:
            there = beta > -torch.inf
            found = there if found is None else found & there
        return None if found is None or bool(found.all()) else found

    def to(self, device: torch.device | None) -> Resolved:
        """The same with mask and modulations on another device, floating-point values in the widest dtype it has;
        angles stay."""

        def move(m: Any):
            if isinstance(m, Tensor):
                return on_device(m, device)
            return replace(m, **{name: move(x) for name, x in vars(m).items() if isinstance(x, Tensor)})

        several = "weights", "groups", "gains", "biases", "key_biases", "value_gains"
        moved = {name: tuple(map(move, getattr(self, name))) for name in several}
        mask = None if self.key_mask is None else move(self.key_mask)
        return replace(self, key_mask=mask, scale=self.scale and move(self.scale), **moved)

    def with_groups(self, numbers: Sequence[tuple[Tensor, Tensor]]) -> Resolved:
        """The same with other ``(bias, delta)``, ``(Bg,)`` each, in its groups, in their order."""
        groups = (
            replace(group, bias=bias.to(group.bias), delta=delta.to(group.delta))
            for group, (bias, delta) in zip(self.groups, numbers, strict=True)
        )
        return replace(self, groups=tuple(groups))

    def with_biases(self, values: Sequence[Tensor]) -> Resolved:
        """The same with other values ``(Bb, Sq)`` in its logit biases, in their order."""
        biases = (replace(m, b=b.to(m.b)) for m, b in zip(self.biases, values, strict=True))
        return replace(self, biases=tuple(biases))

    def with_weight(self, weight: Tensor) -> Resolved:
        """The same with other values ``(D/2,)`` in its only BandWeight."""
        (held,) = self.weights
        return replace(self, weights=(Weight(weight.detach().to(held.w, copy=True), held.keys),))
