"""The lowered form of a call: typed tables, which every backend but the reference reads.

Batches ``Bx`` are 1 or B. ``P = D/2`` RoPE pairs, ``W`` products of band weights, ``G`` BiasDelta groups. Tables are
contiguous and on the device of the call. None stands where a call has no such thing.

Some numbers stand twice, in float64 for ``sdpa`` and in float32 for the kernels: a conversion would be one more launch
in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.tables import AxisBlocks, KeyRuns, Polynomial, PolynomialTiles
from .flattening import flatten, tables, unflatten
from .resolve import Group
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
class KeyTables:
    """The keys: order, segments, rotation.

    The packed keys have ``R`` rows: all keys in key order at r = 1, then the scaled ones once per scale bucket.

    Args:
        segments: ``(n, len(abi.SEGMENT_COLUMNS))`` int32, the segment table; None where ``Sk`` is not known.
        order: ``(Sk,)`` int64, the key in each place of the key order; None where keys stay where they are.
        source: ``(R,)`` int32, the key each packed row is made from; None where these are the keys as they come.
        mask: ``(Bx, Sk)`` bool in key order, True = attend.
        unmasked: for each row of the mask ``(n,)`` int32, the places of its unmasked keys.
        angles: ``(Bx, Sk, P)`` float64 radians, in the order the keys come.
        rotation: ``(Bx, R, P)`` of the packed rows; None where they stay as they come.
        weighted: ``(Bx, Sk, P)`` in key order, at r = 1, times the band weights outside of groups, so that both are
            rounded once; where keys may be folded so.
    """

    segments: Tensor | None = None
    order: Tensor | None = None
    source: Tensor | None = None
    mask: Tensor | None = None
    unmasked: tuple[Tensor, ...] = ()
    angles: Tensor | None = None
    rotation: Rotation | None = None
    weighted: Rotation | None = None


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
class GainTables:
    """Logit gains.

    Args:
        values: ``(Bx, n, Sq)`` float64, one row per LogitGain.
        sets: the gains that segments multiply, as rows of ``values``.
        products: ``(Bx, n, Sq)`` float32, the products that segments use, pass after pass, numbered within each pass
            as in the segment table.
    """

    values: Tensor
    sets: tuple[tuple[int, ...], ...]
    products: Tensor


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
    """Queries at which all scales and gains are 1, where these are most: plain attention may take them.

    Args:
        rows: ``(n,)`` int64.
        source: the same in int32, for the kernels.
        rotation: ``(Bx, 1, n, P)``; None where they arrive rotated.
    """

    rows: Tensor
    source: Tensor
    rotation: Rotation | None


@dataclass(frozen=True, eq=False)
class Lowered:
    """All that backends, and ops, know of a plan.

    Args:
        batch, num_queries, num_keys, pairs: what tensors must have; None where any will do.
        pairing: of the RoPE.
        queries_applied, keys_applied: True where they arrive rotated.
        segments: runs of keys with one signature, in key order.
        passes: runs of segments ``[first, last)`` that one launch of the kernels can hold.
    """

    batch: int | None = None
    num_queries: int | None = None
    num_keys: int | None = None
    pairs: int | None = None
    pairing: str = "interleaved"
    queries_applied: bool = False
    keys_applied: bool = False
    segments: tuple[Segment, ...] = ()
    passes: tuple[tuple[int, int], ...] = ()
    keys: KeyTables = KeyTables()
    queries: QueryTables | None = None
    bands: BandTables | None = None
    groups: GroupTables | None = None
    gains: GainTables | None = None
    scales: ScaleTables | None = None
    sorted_queries: SortedQueries | None = None
    unmodulated: UnmodulatedQueries | None = None
    axis_blocks: AxisBlocks | None = None
    key_runs: KeyRuns | None = None
    polynomial: Polynomial | None = None

    @property
    def modulated(self) -> bool:
        """True when some key is modulated."""
        return any(s.modulated for s in self.segments)

    @property
    def num_per_query(self) -> int:
        """Leading sorted queries that may have per-query scales."""
        return 0 if self.sorted_queries is None else self.sorted_queries.num_per_query

    @property
    def num_buckets(self) -> int:
        """Scale buckets other than r = 1."""
        return 0 if self.scales is None else len(self.scales.buckets)

    def with_groups(self, groups: Sequence[Group]) -> Lowered:
        """The same with other lambdas and deltas."""
        return replace(self, groups=self.groups.with_values(groups))

    def with_weight(self, weight: Tensor) -> Lowered:
        """The same with other values ``(P,)`` float64 in the only BandWeight."""
        bands = BandTables.of(weight[None])
        keys = self.keys
        if keys.weighted is not None:
            keys = replace(keys, weighted=weighted_rotation(keys.rotation, bands, self.segments))
        return replace(self, bands=bands, keys=keys)

    def flatten(self) -> tuple[list[Tensor], str]:
        """All tensors, and a string from which :meth:`unflatten` makes the same of them; ops carry both."""
        return flatten(self)

    @staticmethod
    def unflatten(tensors: Sequence[Tensor], spec: str) -> Lowered:
        """Inverse of :meth:`flatten`.

        Raises:
            ValueError: another number of tensors than the spec names.
        """
        return unflatten(tensors, spec, TABLES)


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


# What a spec may name.
TABLES = tables(
    Lowered, KeyTables, QueryTables, BandTables, GroupTables, GainTables, ScaleTables, SortedQueries,
    UnmodulatedQueries, Rotation, Segment, AxisBlocks, KeyRuns, Polynomial, PolynomialTiles,
)  # fmt: skip
