"""Typed tables of a lowered call: keys, queries, band weights, groups, gains and biases, values, scales.

Batches ``Bx`` are 1 or B. ``P = D/2`` RoPE pairs, ``W`` products of band weights, ``G`` BiasDelta groups. Tables are
contiguous and on the device of the call. None stands where a call has no such thing.

Some numbers stand twice, in float64 for ``sdpa`` and in float32 for the kernels: a conversion would be one more launch
in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .resolved import Group
from .segments import Segment


@dataclass(frozen=True, eq=False)
class Rotation:
    """``cos, sin`` of the angles of some rows, float32 from float64 angles, in the shape of these."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(angles: Tensor) -> Rotation:
        """Of float64 ``angles``, radians."""
        return Rotation(angles.cos().float(), angles.sin().float())


@dataclass(frozen=True, eq=False)
class KeyBiasTables:
    """What is added to the logits of each key, natural log units, in key order.

    Args:
        for_kernels: ``(Bx, Sk)`` float32, ``-inf`` where a key is masked.
        mask: ``(Bx, Sk)`` bool, False where it is; None where all keys are there.
        finite: ``(Bx, Sk)`` float64, 0 where a key is masked; None where all biases are 0 or ``-inf``.
    """

    for_kernels: Tensor
    mask: Tensor | None
    finite: Tensor | None

    @staticmethod
    def of(bias: Tensor) -> KeyBiasTables:
        """From ``(Bx, Sk)`` float64."""
        mask = bias > -torch.inf
        finite = bias.masked_fill(~mask, 0.0)
        biased = bool((finite != 0).any())
        return KeyBiasTables(bias.float(), None if bool(mask.all()) else mask, finite if biased else None)


@dataclass(frozen=True, eq=False)
class KeyTables:
    """The keys: order, segments, rotation.

    The packed keys have ``R`` rows: all keys in key order at r = 1, then the scaled ones once per scale bucket.

    Args:
        segments: ``(n, len(abi.SEGMENT_COLUMNS))`` int32, the segment table; None where ``Sk`` is not known.
        order: ``(Sk,)`` int64, the key in each place of the key order; None where keys stay where they are.
        source: ``(R,)`` int32, the key each packed row is made from; None where these are the keys as they come.
        bias: of the mask and of KeyBias.
        unmasked: for each row of the mask ``(n,)`` int32, the places of its unmasked keys.
        angles: ``(Bx, Sk, P)`` float64 radians, in the order the keys come.
        rotation: ``(Bx, R, P)`` of the packed rows; None where they stay as they come.
        weighted: ``(Bx, Sk, P)`` in key order, at r = 1, times the band weights outside of groups, so that both are
            rounded once; where keys may be folded so.
    """

    segments: Tensor | None = None
    order: Tensor | None = None
    source: Tensor | None = None
    bias: KeyBiasTables | None = None
    unmasked: tuple[Tensor, ...] = ()
    angles: Tensor | None = None
    rotation: Rotation | None = None
    weighted: Rotation | None = None

    @property
    def masked(self) -> Tensor | None:
        """``(Bx, Sk)`` bool, False where a key is masked; None where none is."""
        return self.bias and self.bias.mask

    @property
    def biased(self) -> bool:
        """True where some key has a bias other than 0 and ``-inf``."""
        return self.bias is not None and self.bias.finite is not None


@dataclass(frozen=True, eq=False)
class QueryTables:
    """The queries: ``angles (Bx, Sq, P)`` float64 radians, and ``rotation (Bx, 1 or 2, Sq, P)``: at r = 1, and at the
    query's scale where there is a QueryScale; None where they arrive so."""

    angles: Tensor
    rotation: Rotation | None


@dataclass(frozen=True, eq=False)
class BandTables:
    """Products of band weights that some key has: ``weights (W, P)`` float64, ``for_kernels`` the same in float32."""

    weights: Tensor
    for_kernels: Tensor

    @staticmethod
    def of(weights: Tensor) -> BandTables:
        """From ``(W, P)`` float64."""
        return BandTables(weights, weights.float())


@dataclass(frozen=True, eq=False)
class GroupTables:
    """BiasDelta groups.

    Args:
        values: ``(Bx, G, 3)`` float64: lambda, delta, number of unmasked keys.
        for_kernels: the same in float32.
        members, bounds: int32; the segments of group g are ``members[bounds[g] : bounds[g + 1]]``.
    """

    values: Tensor
    for_kernels: Tensor
    members: Tensor
    bounds: Tensor

    @staticmethod
    def of(groups: Sequence[Group], counts: Tensor, members: Tensor, bounds: Tensor) -> GroupTables:
        """Tables of ``groups`` with ``counts (Bx, G)`` float64 unmasked keys."""
        batch = max(len(counts), *(len(x) for m in groups for x in (m.bias, m.delta)))
        columns = [torch.stack([getattr(m, name).expand(batch) for m in groups], dim=1) for name in ("bias", "delta")]
        values = torch.stack([*columns, counts.expand(batch, -1)], dim=2)
        return GroupTables(values, values.float(), members, bounds)

    def with_values(self, groups: Sequence[Group]) -> GroupTables:
        """The same groups with other lambdas and deltas."""
        return GroupTables.of(groups, self.values[..., 2], self.members, self.bounds)

    @property
    def count(self) -> int:
        """``G``."""
        return self.values.shape[1]


@dataclass(frozen=True, eq=False)
class PerQueryTables:
    """Logit gains, or logit biases.

    Args:
        values: ``(Bx, n, Sq)`` float64, one row per LogitGain or LogitBias.
        sets: those that segments multiply or add, as rows of ``values``.
        used: the sets that segments use, pass after pass.
        for_kernels: ``(Bx, len(used), Sq)`` float32, products of gains or sums of biases, numbered within each pass as
            in the segment table.
        constant: every row of ``values`` has one number for all queries.
    """

    values: Tensor
    sets: tuple[tuple[int, ...], ...]
    used: tuple[int, ...]
    for_kernels: Tensor
    constant: bool

    @staticmethod
    def of(
        rows: Sequence[Tensor], sets: tuple[tuple[int, ...], ...], used: tuple[int, ...], adds: bool,
        constant: bool,
    ) -> PerQueryTables:  # fmt: skip
        """Of ``rows (Bx, Sq)`` float64, which a set adds or multiplies."""
        values = torch.stack(torch.broadcast_tensors(*rows), dim=1)
        several = [values[:, list(sets[n])] for n in used]
        combined = torch.stack([x.sum(dim=1) if adds else x.prod(dim=1) for x in several], dim=1)
        return PerQueryTables(values, sets, used, combined.float(), constant)


@dataclass(frozen=True, eq=False)
class ValueTables:
    """What is folded into the values, in the order the keys come: ``vt_j = u_j (delta v_j + (lambda - delta) nu)``.

    Args:
        gains: ``(Bx, Sk)`` float64, products of value gains, 1 elsewhere.
        member: ``(Sk,)`` int32, the BiasDelta group of values that each key is in, or -1.
        factors: ``(Bx, 2, Sk)`` float64, ``u delta`` and ``u (lambda - delta)``.
        for_kernels: the same in float32.
        inside: ``(n,)`` int64, the keys in a group; None without groups.
        groups: the groups; ``members`` and ``bounds`` are of ``runs``. None without any.
        runs: ``(n, len(abi.SEGMENT_COLUMNS))`` int32, a segment table of the runs of keys in a group.
        bias: ``(Bx, Sk)`` float32, ``-inf`` where a key is masked, else 0; where a mean is to leave it out.
    """

    gains: Tensor
    member: Tensor
    factors: Tensor
    for_kernels: Tensor
    inside: Tensor | None = None
    groups: GroupTables | None = None
    runs: Tensor | None = None
    bias: Tensor | None = None

    @staticmethod
    def of(
        gains: Tensor, member: Tensor, inside: Tensor | None, groups: GroupTables | None, runs: Tensor | None,
        bias: Tensor | None,
    ) -> ValueTables:  # fmt: skip
        """Tables of groups and of gains ``(Bx, Sk)``."""
        factors = torch.stack([gains, torch.zeros_like(gains)], dim=1)
        if groups is not None:
            neutral = groups.values.new_tensor([[[1.0, 1.0, 0.0]]]).expand(len(groups.values), -1, -1)
            of_key = torch.cat([groups.values, neutral], dim=1)[:, member.long()]  # -1 takes the last
            lam, delta, _ = of_key.unbind(2)
            factors = torch.stack([gains * delta, gains * (lam - delta)], dim=1)
        return ValueTables(gains, member, factors, factors.float(), inside, groups, runs, bias)

    def with_groups(self, groups: Sequence[Group]) -> ValueTables:
        """The same with other lambdas and deltas."""
        if self.groups is None:
            return self
        groups_now = self.groups.with_values(groups)
        return ValueTables.of(self.gains, self.member, self.inside, groups_now, self.runs, self.bias)


@dataclass(frozen=True, eq=False)
class ScaleTables:
    """A QueryScale.

    Args:
        r: ``(Bx, Sq)`` float64.
        pairs: ``(P,)`` bool, the pairs that are scaled.
        buckets: ``(n,)`` float64, scales that queries share and scaled keys are packed for, other than 1.
        order: ``(Bx, Sq)`` int64, queries sorted by bucket: per-query scales first, then r = 1, then each bucket.
        counts: per row of ``r``, how many queries that is in each.
        scaled_keys: keys covered.
    """

    r: Tensor
    pairs: Tensor
    buckets: Tensor
    order: Tensor
    counts: tuple[tuple[int, ...], ...]
    scaled_keys: int


@dataclass(frozen=True, eq=False)
class SortedQueries:
    """Queries in tiles of one scale bucket, for the kernels.

    Args:
        queries: ``(Bx, T * QUERY_TILE)`` int32 query index, or -1. Queries with per-query scales come first, since they
            take longest; queries that nothing modulates last.
        tile_bucket: ``(Bx, T)`` int32: 0 at r = 1, -1 for per-query scales.
        num_per_query: leading places that may hold queries with per-query scales.
        num_modulated: leading places before those of unmodulated queries.
    """

    queries: Tensor
    tile_bucket: Tensor
    num_per_query: int
    num_modulated: int


@dataclass(frozen=True, eq=False)
class UnmodulatedQueries:
    """Queries at which all scales and gains are 1 and all logit biases 0, where these are most: plain attention may
    take them.

    Args:
        rows: ``(n,)`` int64.
        source: the same in int32, for the kernels.
        rotation: ``(Bx, 1, n, P)``; None where they arrive rotated.
    """

    rows: Tensor
    source: Tensor
    rotation: Rotation | None


def alike(rows: Sequence[Tensor]) -> bool:
    """Whether each of ``rows (Bx, Sq)``, on the CPU, has one number for all queries."""
    return all(bool((row == row[:, :1]).all()) for row in rows)


def weighted_rotation(rotation: Rotation | None, bands: BandTables, segments: Sequence[Segment]) -> Rotation:
    """:attr:`KeyTables.weighted`. Keys of a group keep their weights for after the mean."""
    weights, tokens = bands.for_kernels, segments[-1].stop
    if rotation is not None:
        cos, sin = (x[:, :tokens].clone() for x in (rotation.cos, rotation.sin))
    else:  # rotated already
        cos = weights.new_ones(1, tokens, weights.shape[1])
        sin = torch.zeros_like(cos)
    for s in segments:
        if s.weight >= 0 and s.group < 0:
            cos[:, s.start : s.stop] *= weights[s.weight]
            sin[:, s.start : s.stop] *= weights[s.weight]
    return Rotation(cos, sin)
