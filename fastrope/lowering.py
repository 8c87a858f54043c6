"""Pure functions that turn key sets and per-query values into segments, levels, query slots and key patches.

Everything here runs on CPU tensors, allocates no device memory and knows nothing of backends; ``tables.py`` calls it
once per plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

SLOT_TILE = 128  # query slots are padded per level to this; every kernel's BLOCK_M divides it
MAX_LEVELS = 8  # key copies a plan may ask for: bounds memory at MAX_LEVELS times the covered keys
MIN_LEVEL_QUERIES = SLOT_TILE  # with more distinct scales than MAX_LEVELS, a value shared by a full tile stays a level
LEAST_UNTOUCHED = 0.5  # of the queries; with less a second kernel over them is predicted not to pay
MAX_RUNS = 16  # runs of keys tolerated before keys are sorted by treatment (a run costs a partial tile, a sort a copy)
MAX_VIEWS = 4  # prepared copies of the queries alive at once
MAX_OWN_GROUPS = 4  # groups whose means are alive at once for queries that each have their own
PATCH = 8  # keys of a patch along either axis
PAIR_CHUNK = 16  # pairs the patch kernel multiplies at once
PLAIN, CONTINUOUS = 0, -1  # level of a query at r = 1, and of one whose scale has no key copy


@dataclass(frozen=True)
class Segment:
    """Keys ``[start, stop)`` of the plan's key order under one treatment; -1 means "none"."""

    start: int
    stop: int
    scaled: bool = False
    weight: int = -1
    group: int = -1
    gain: int = -1

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def view(self) -> tuple[bool, int]:
        """What the queries look like to these keys: at their own scale or not, under which band weights."""
        return self.scaled, self.weight

    @property
    def treated(self) -> bool:
        """True when any modulation covers these keys."""
        return self.scaled or max(self.weight, self.group, self.gain) >= 0


@dataclass(frozen=True)
class Treatments:
    """What happens to each key: ``scaled (Sk,)``, and per key an index into the distinct sets of modulations."""

    scaled: torch.Tensor
    weight: torch.Tensor
    group: torch.Tensor
    gain: torch.Tensor

    def signatures(self) -> torch.Tensor:
        """``(Sk, 4)`` integers, equal rows for equal treatment."""
        columns = (self.scaled, self.weight, self.group, self.gain)
        return torch.stack([t.long() for t in columns], dim=1)


def distinct_sets(masks: list[torch.Tensor], num_keys: int) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Distinct non-empty sets of masks that cover some key, and per key the index of its set (-1: no mask)."""
    if not masks:
        return [], torch.full((num_keys,), -1, dtype=torch.int64)
    rows, inverse = torch.unique(torch.stack(masks, dim=1), dim=0, return_inverse=True)
    sets, index_of_row = [], []
    for row in rows.tolist():
        members = tuple(m for m, covered in enumerate(row) if covered)
        index_of_row.append(len(sets) if members else -1)
        if members:
            sets.append(members)
    return sets, torch.tensor(index_of_row)[inverse]


def segment_keys(treatments: Treatments) -> tuple[tuple[Segment, ...], torch.Tensor | None]:
    """Runs of equal treatment, and the key order they refer to (None: the order the keys came in).

    Up to ``MAX_RUNS`` runs the keys stay where they are. Beyond, keys are sorted stably by treatment, in the order
    the treatments first appear, so that each becomes one run.
    """
    signatures = treatments.signatures()
    order = None
    if len(_runs(signatures)) - 1 > MAX_RUNS:
        _, inverse = torch.unique(signatures, dim=0, return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(inverse), dtype=torch.int64)
        first.scatter_reduce_(0, inverse, torch.arange(len(inverse)), "amin")
        order = torch.argsort(first[inverse], stable=True)
        signatures = signatures[order]
    bounds = _runs(signatures)
    segments = []
    for start, stop in itertools.pairwise(bounds):
        scaled, weight, group, gain = signatures[start].tolist()
        segments.append(Segment(start, stop, bool(scaled), weight, group, gain))
    return tuple(segments), order


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


def launch_passes(segments: Sequence[Segment], continuous: bool) -> tuple[tuple[int, int], ...]:
    """Passes of the fused kernels: prepared queries, row biases and per-query means are held for one at a time."""
    limits = [(lambda s: s.view, MAX_VIEWS), (lambda s: s.start, MAX_RUNS)]
    if continuous:
        limits.append((lambda s: s.group, MAX_OWN_GROUPS))
    return split_passes(segments, *limits)


def _runs(rows: torch.Tensor) -> list[int]:
    changes = (rows[1:] != rows[:-1]).any(dim=1).nonzero().flatten() + 1
    return [0, *changes.tolist(), len(rows)]


def find_levels(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct scales that get a key copy, ``(L,)``, and the level of every query, shaped like ``scale``.

    Level ``PLAIN`` is r = 1; level n >= 1 is ``levels[n - 1]``; ``CONTINUOUS`` queries keep their own exact scale.
    Up to ``MAX_LEVELS`` distinct values, each is a level, however few queries share it. Beyond that only values shared
    by at least ``MIN_LEVEL_QUERIES`` queries are, the most frequent first.
    """
    level = torch.full(scale.shape, CONTINUOUS, dtype=torch.int64)
    level[scale == 1] = PLAIN
    values, counts = torch.unique(scale[scale != 1], return_counts=True)
    if len(values) > MAX_LEVELS:
        by_count = torch.argsort(counts, descending=True, stable=True)[:MAX_LEVELS]
        values = values[by_count[counts[by_count] >= MIN_LEVEL_QUERIES].sort().values]
    for n, value in enumerate(values):
        level[scale == value] = n + 1
    return values, level


def query_slots(
    level: torch.Tensor, scale: torch.Tensor, untouched: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Sort queries by level so that no tile of ``SLOT_TILE`` slots holds two, and those without one by their scale.

    Args:
        level, scale: ``(Bs, Sq)``. untouched: ``(Sq,)`` bool, queries at r = 1 to be put last, in tiles of their own.

    Returns:
        slots ``(Bs, T * SLOT_TILE)`` query index or -1; slot_level ``(Bs, T)``; the number of leading slots that may
        hold continuous queries, which come first since they take longest; the number of those before the last kind.
    """
    last = int(level.max()) + 1
    kind = torch.where(level == PLAIN, last, level)
    if untouched is not None:
        kind = torch.where(untouched, last + 1, kind)
    rows, row_levels, continuous, touched = [], [], 0, 0
    for row, r in zip(kind, scale, strict=True):
        slots, levels = [], []
        for value in row.unique().tolist():
            index = (row == value).nonzero().flatten()
            index = index[r[index].argsort(stable=True)]
            slots.append(torch.nn.functional.pad(index, (0, -len(index) % SLOT_TILE), value=-1))
            levels += [value if value < last else PLAIN] * (len(slots[-1]) // SLOT_TILE)
            if value == CONTINUOUS:
                continuous = max(continuous, len(slots[-1]))
            if value <= last:
                touched = max(touched, len(levels) * SLOT_TILE)
        rows.append(torch.cat(slots))
        row_levels.append(torch.tensor(levels, dtype=torch.int64))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, -1).int(), pad(row_levels, True, PLAIN).int(), continuous, touched


def untouched_queries(values: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Queries ``(Sq,)`` bool at 1 in all of ``values (B or 1, Sq)``, scales and gains, if they are most; else None."""
    if not values:
        return None
    alone = torch.stack([(x == 1).all(dim=0) for x in values]).all(dim=0)
    return alone if alone.sum() >= LEAST_UNTOUCHED * len(alone) else None


@dataclass(frozen=True)
class Patches:
    """Keys arranged so that a continuous scale rotates queries per patch row and column, not per key.

    ``keys (P, 8, 8)`` holds key rows or -1. Keys of one patch row share the angles of pair class A, keys of one patch
    column those of class B, all keys of a patch those of class C; ``a, b (P, 8)`` and ``c (P,)`` name a key that
    stands for each.
    """

    keys: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


@dataclass(frozen=True)
class PairClasses:
    """Scaled pairs split into the two axes that vary most among the scaled keys (A, B) and the rest (C)."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    c: tuple[int, ...]


def classify_pairs(angles: torch.Tensor, axis: torch.Tensor, scaled_pairs: torch.Tensor) -> PairClasses:
    """Choose classes from ``angles (Bk, n, D/2)`` of the scaled keys, ``axis (D/2,)`` and ``scaled_pairs (D/2,)``."""
    axes = {}
    for a in axis[scaled_pairs].unique().tolist():
        pairs = (scaled_pairs & (axis == a)).nonzero().flatten()
        axes[a] = (tuple(pairs.tolist()), int(_ids(angles, pairs).max(initial=0)) + 1)
    varying = sorted((a for a in axes if axes[a][1] > 1), key=lambda a: -axes[a][1])
    first, second = [*varying, None, None][:2]
    rest = tuple(sorted(c for a in axes if a not in (first, second) for c in axes[a][0]))
    return PairClasses(axes[first][0] if first is not None else (), axes[second][0] if second is not None else (), rest)


def arrange_keys(
    angles: torch.Tensor, runs: list[np.ndarray], axis: torch.Tensor, scaled_pairs: torch.Tensor
) -> tuple[PairClasses, list[Patches]]:
    """Classes and the patches of each run of scaled key rows, ``angles (Bk, Sk, D/2)``.

    Axes apart where keys form a grid; all pairs as one class where they share no coordinates, which takes one key per
    patch row instead of one per patch.
    """
    apart = classify_pairs(angles[:, np.concatenate(runs)], axis, scaled_pairs)
    together = PairClasses(tuple(scaled_pairs.nonzero().flatten().tolist()), (), ())
    candidates = [(c, [find_patches(angles[:, rows], rows, c) for rows in runs]) for c in (apart, together)]
    return min(candidates, key=lambda candidate: sum(len(p.keys) for p in candidate[1]))


def find_patches(angles: torch.Tensor, rows: np.ndarray, classes: PairClasses) -> Patches:
    """Cover the keys ``rows`` with patches.

    Args:
        angles: ``(Bk, n, D/2)`` angles of the ``n`` keys, float64.
        rows: ``(n,)`` the key row each stands in.

    Keys on a grid fill 8 x 8 patches; keys without common coordinates lie on the diagonals of patches, 8 in each,
    which costs work but stays exact. The cheaper of the two is returned.
    """
    n = len(rows)
    index = np.arange(n)
    a = _ids(angles, classes.a) if classes.a else None
    b = _ids(angles, classes.b) if classes.b else None
    c = _ids(angles, classes.c) if classes.c else np.zeros(n, dtype=np.int64)
    if a is None:  # no axis varies: any arrangement will do
        a, b = index // PATCH, index % PATCH
    elif b is None:  # one axis varies: keys that share a coordinate fill a row
        b = _rank_within(a)
    copy = _rank_within(_ids_of(np.stack([c, a, b], axis=1)))
    block = _ids_of(np.stack([c, copy, a // PATCH, b // PATCH], axis=1))
    row, column = a % PATCH, b % PATCH
    rank = _rank_within(c)
    diagonal = _ids_of(np.stack([c, rank // PATCH], axis=1))
    if diagonal.max() < block.max():
        block, row, column = diagonal, rank % PATCH, rank % PATCH
    count = int(block.max()) + 1
    keys = np.full((count, PATCH, PATCH), -1, dtype=np.int64)
    keys[block, row, column] = rows
    reps_a, reps_b, reps_c = (np.full(shape, rows[0]) for shape in ((count, PATCH), (count, PATCH), (count,)))
    reps_a[block, row], reps_b[block, column], reps_c[block] = rows, rows, rows
    return Patches(keys, reps_a, reps_b, reps_c)


def distinct_angles(angles: torch.Tensor, pairs) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct angle vectors over ``pairs`` (and batch rows) in order of value: the id of each of the ``n``
    keys of ``angles (Bk, n, D/2)``, and a key that stands for each id."""
    columns = angles[..., torch.as_tensor(pairs, dtype=torch.int64)].transpose(0, 1).flatten(1).numpy()
    if not columns.shape[1]:
        return np.zeros(len(columns), dtype=np.int64), np.zeros(1, dtype=np.int64)
    _, first, ids = np.unique(columns, axis=0, return_index=True, return_inverse=True)
    return ids.reshape(-1), first


def _ids(angles: torch.Tensor, pairs) -> np.ndarray:
    return distinct_angles(angles, pairs)[0]


def _ids_of(rows: np.ndarray) -> np.ndarray:
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def _rank_within(ids: np.ndarray) -> np.ndarray:
    """How many earlier elements have the same id."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.empty(len(ids), dtype=np.int64)
    rank[order] = np.arange(len(ids)) - np.repeat(starts, np.diff(np.r_[starts, len(ids)]))
    return rank
