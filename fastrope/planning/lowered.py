"""The lowered form of a call, which every backend but the reference reads: its tables, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from ..kernels.tables import AxisBlocks, KeyRuns, Polynomial, PolynomialTiles
from .flattening import flatten, tables, unflatten
from .resolved import Bias, Group
from .segments import Segment
from .tables import (
    BandTables,
    GroupTables,
    KeyBiasTables,
    KeyTables,
    PerQueryTables,
    QueryTables,
    Rotation,
    ScaleTables,
    SortedQueries,
    UnmodulatedQueries,
    ValueTables,
    weighted_rotation,
)

MOST_KNOWN = 256  # layouts of tensors that come and go must not pile up
_MISSING: Any = object()
T = TypeVar("T")


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
    keys: KeyTables = field(default_factory=KeyTables)
    queries: QueryTables | None = None
    bands: BandTables | None = None
    groups: GroupTables | None = None
    gains: PerQueryTables | None = None
    biases: PerQueryTables | None = None
    values: ValueTables | None = None
    scales: ScaleTables | None = None
    sorted_queries: SortedQueries | None = None
    unmodulated: UnmodulatedQueries | None = None
    axis_blocks: AxisBlocks | None = None
    key_runs: KeyRuns | None = None
    polynomial: Polynomial | None = None

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """``make()``, remembered beside these tables: what follows from them and from ``key`` alone."""
        known = self._known
        found = known.get(key, _MISSING)
        if found is _MISSING:
            if len(known) >= MOST_KNOWN:
                known.clear()
            found = known[key] = make()
        return found  # another thread may have cleared what is known

    @cached_property
    def _known(self) -> dict[Hashable, Any]:
        return {}

    @cached_property
    def modulated(self) -> bool:
        """True when some key is modulated."""
        return any(s.modulated for s in self.segments)

    @cached_property
    def features(self) -> tuple[str, ...]:
        """What kernels may have to do: rotation, a mask, and which modulations, by name."""
        rotation = "applied" if self.queries_applied or self.keys_applied else "rotation"
        values = "ValueGain" if self.values is None or self.values.groups is None else "BiasDelta on values"
        held = {
            rotation: self.pairs, "mask": self.keys.unmasked or None, "QueryScale": self.scales,
            "BandWeight": self.bands, "BiasDelta": self.groups, "LogitGain": self.gains, "LogitBias": self.biases,
            "KeyBias": self.keys.bias and self.keys.bias.finite, values: self.values,
        }  # fmt: skip
        return tuple(name for name, x in held.items() if x is not None)

    @property
    def num_per_query(self) -> int:
        """Leading sorted queries that may have per-query scales."""
        return 0 if self.sorted_queries is None else self.sorted_queries.num_per_query

    @cached_property
    def num_buckets(self) -> int:
        """Scale buckets other than r = 1."""
        return 0 if self.scales is None else len(self.scales.buckets)

    def with_groups(self, groups: Sequence[Group]) -> Lowered:
        """The same with other lambdas and deltas."""
        of_keys, of_values = ([m for m in groups if m.on == on] for on in ("keys", "values"))
        return replace(
            self, groups=self.groups and self.groups.with_values(of_keys),
            values=self.values and self.values.with_groups(of_values),
        )  # fmt: skip

    def with_biases(self, biases: Sequence[Bias], constant: bool) -> Lowered:
        """The same with other logit biases, all ``constant`` or not."""
        rows, held = [m.b for m in biases], self.biases
        return replace(self, biases=PerQueryTables.of(rows, held.sets, held.used, True, constant))

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


# What a spec may name.
TABLES = tables(
    Lowered, KeyTables, KeyBiasTables, QueryTables, BandTables, GroupTables, PerQueryTables, ValueTables, ScaleTables,
    SortedQueries, UnmodulatedQueries, Rotation, Segment, AxisBlocks, KeyRuns, Polynomial, PolynomialTiles,
)  # fmt: skip
