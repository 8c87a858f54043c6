"""Runs of keys with one signature: what the loop over keys sees of a call.

Pure functions on CPU tensors. They know nothing of backends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

MAX_RUNS = 16  # runs of keys before keys are sorted by signature (a run costs a partial tile, a sort a copy)
MAX_VARIANTS = 4  # prepared copies of the queries alive at once
MAX_PER_QUERY_GROUPS = 4  # groups whose means are alive at once for queries with per-query scales


@dataclass(frozen=True)
class Segment:
    """Keys ``[start, stop)`` of the plan's key order with one signature; -1 means "none".

    Args:
        scaled: a QueryScale covers them.
        weight: row of the band weights.
        group: BiasDelta group.
        gain: set of gains.
        bias: set of logit biases.
    """

    start: int
    stop: int
    scaled: bool = False
    weight: int = -1
    group: int = -1
    gain: int = -1
    bias: int = -1

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def variant(self) -> tuple[bool, int]:
        """What the queries look like to these keys: scaled or not, under which band weights."""
        return self.scaled, self.weight

    @property
    def modulated(self) -> bool:
        """True when any modulation covers these keys."""
        return self.scaled or max(self.weight, self.group, self.gain, self.bias) >= 0


@dataclass(frozen=True)
class KeySignatures:
    """What covers each key: ``scaled (Sk,)`` bool, and ``(Sk,)`` indices of weights, group, gains and logit biases;
    -1: none."""

    scaled: torch.Tensor
    weight: torch.Tensor
    group: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor

    def stacked(self) -> torch.Tensor:
        """``(Sk, 5)`` int64, one row per key."""
        columns = (self.scaled, self.weight, self.group, self.gain, self.bias)
        return torch.stack([t.long() for t in columns], dim=1)


def distinct_sets(masks: list[torch.Tensor], num_keys: int) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Distinct non-empty sets of masks that cover some key, and per key the index of its set (-1: no mask)."""
    if not masks:
        return [], torch.full((num_keys,), -1, dtype=torch.int64, device="cpu")
    rows, inverse = torch.unique(torch.stack(masks, dim=1), dim=0, return_inverse=True)
    sets, index_of_row = [], []
    for row in rows.tolist():
        members = tuple(m for m, covered in enumerate(row) if covered)
        index_of_row.append(len(sets) if members else -1)
        if members:
            sets.append(members)
    return sets, torch.tensor(index_of_row, device="cpu")[inverse]


def segment_keys(signatures: KeySignatures) -> tuple[tuple[Segment, ...], torch.Tensor | None]:
    """Runs of equal signatures, and the key order they refer to (None: the order the keys came in).

    Up to ``MAX_RUNS`` runs the keys stay where they are. Beyond, keys are sorted stably by signature, in the order
    the signatures first appear, so that each becomes one run.
    """
    rows = signatures.stacked()
    order = None
    if len(_runs(rows)) - 1 > MAX_RUNS:
        _, inverse = torch.unique(rows, dim=0, return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(inverse), dtype=torch.int64, device="cpu")
        first.scatter_reduce_(0, inverse, torch.arange(len(inverse), device="cpu"), "amin")
        order = torch.argsort(first[inverse], stable=True)
        rows = rows[order]
    bounds = _runs(rows)
    segments = []
    for start, stop in itertools.pairwise(bounds):
        scaled, *numbers = rows[start].tolist()
        segments.append(Segment(start, stop, bool(scaled), *numbers))
    return tuple(segments), order


def runs_of(group: torch.Tensor) -> tuple[Segment, ...]:
    """Runs of keys ``(Sk,)`` of one group each; none of keys in no group (-1)."""
    bounds = itertools.pairwise(_runs(group[:, None]))
    found = (Segment(start, stop, group=int(group[start])) for start, stop in bounds)
    return tuple(s for s in found if s.group >= 0)


def split_passes(
    segments: Sequence[Segment], *limits: tuple[Callable[[Segment], Hashable], int]
) -> tuple[tuple[int, int], ...]:
    """Runs of segments such that no run has more than ``n`` distinct values of ``value(segment)``, for each
    ``(value, n)``: bounds ``[first, last)`` of what may be held in memory at once."""
    bounds, first = [], 0
    seen: list[set] = [set() for _ in limits]
    for i, segment in enumerate(segments):
        values = [value(segment) for value, _ in limits]
        full = any(len(s | {v}) > n for s, v, (_, n) in zip(seen, values, limits, strict=True))
        if full:
            bounds.append((first, i))
            first, seen = i, [set() for _ in limits]
        for s, v in zip(seen, values, strict=True):
            s.add(v)
    return (*bounds, (first, len(segments)))


def launch_passes(segments: Sequence[Segment], per_query: bool) -> tuple[tuple[int, int], ...]:
    """Passes of the fused kernels: prepared queries, row biases and per-query means are held for one at a time.

    Args:
        per_query: some queries have per-query scales.
    """
    limits = [(lambda s: s.variant, MAX_VARIANTS), (lambda s: s.start, MAX_RUNS)]
    if per_query:
        limits.append((lambda s: s.group, MAX_PER_QUERY_GROUPS))
    return split_passes(segments, *limits)


def numbers_of(segments: Sequence[Segment], column: str) -> list[int]:
    """The groups, gains or biases (``column``) of some segments, in the order in which a pass numbers them."""
    return list(dict.fromkeys(getattr(s, column) for s in segments if getattr(s, column) >= 0))


def numbers_by_pass(segments: Sequence[Segment], passes: Sequence[tuple[int, int]], column: str) -> list[int]:
    """Those of all passes, one after the other."""
    return [n for first, last in passes for n in numbers_of(segments[first:last], column)]


def _runs(rows: torch.Tensor) -> list[int]:
    changes = (rows[1:] != rows[:-1]).any(dim=1).nonzero().flatten() + 1
    return [0, *changes.tolist(), len(rows)]
