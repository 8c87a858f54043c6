"""Axis blocks: scaled keys arranged for queries with per-query scales, exact in every dtype.

It has one entry, :func:`axis_blocks`, and one kernel, ``kernels/axis_blocks.py``, which ran on a GPU and was not timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.abi import AXIS_BLOCK, PAIR_CHUNK
from ..kernels.tables import AxisBlocks, KeyRuns
from .resolved import Scale
from .segments import Segment


def axis_blocks(
    scale: Scale, angles: Tensor, covered: Tensor, axis: Tensor, segments: Sequence[Segment]
) -> tuple[AxisBlocks, list[tuple[int, int]], KeyRuns | None]:
    """Blocks of the scaled segments, the bounds ``[first, last)`` of each segment's blocks, and what group means need.

    Phases and factors are split in two, so that the kernels' float32 holds their product however far apart keys are.

    Args:
        angles: ``(Bk, Sk, D/2)`` float64, in key order.
        covered: ``(Sk,)`` bool, scaled keys in key order.
        axis: ``(D/2,)`` the position axis of each pair.
    """
    runs = [np.arange(s.start, s.stop) for s in segments if s.scaled]
    classes, found = arrange_keys(angles, runs, axis, scale.pairs)
    bounds, count, arranged = [], 0, iter(found)
    for s in segments:
        size = len(next(arranged).keys) if s.scaled else 0
        bounds.append((count, count + size))
        count += size
    keys, a, b, c = (
        torch.from_numpy(np.concatenate([getattr(block, name) for block in found])).int()
        for name in ("keys", "a", "b", "c")
    )
    still = tuple((~scale.pairs).nonzero().flatten().tolist())
    pairs_a, pairs_b, pairs_c = (_columns(pairs) for pairs in (classes.a, classes.b, classes.c + still))
    phase = split(torch.where(scale.pairs, angles * (2 / torch.pi), 0.0))
    blocks = AxisBlocks(keys, a, b, c, pairs_a, pairs_b, pairs_c, phase, split(1 - scale.r))
    grouped = any(s.group >= 0 for s in segments)
    return blocks, bounds, _key_runs(angles, covered, classes, segments) if grouped else None


def split(x: Tensor) -> Tensor:
    """``x (B, ...)`` float64 as the sum of two float32 numbers, ``(B, 2, ...)``, the first of at most 12 bits: products
    of two such are exact in float32."""
    mantissa, exponent = torch.frexp(x)
    leading = torch.ldexp((mantissa * 2**12).round(), exponent - 12)
    return torch.stack([leading, x - leading], dim=1).float()


def _columns(pairs: tuple[int, ...]) -> Tensor:
    return torch.tensor([*pairs, *[-1] * (-len(pairs) % PAIR_CHUNK)], dtype=torch.int32, device="cpu")


def _key_runs(angles: Tensor, covered: Tensor, classes: PairClasses, segments: Sequence[Segment]) -> KeyRuns:
    group = torch.tensor([s.group for s in segments], dtype=torch.int32, device="cpu")
    group = group.repeat_interleave(torch.tensor([len(s) for s in segments], device="cpu"))
    rows = covered.nonzero().flatten()
    scaled = angles[:, rows]
    pair_runs = torch.zeros(angles.shape[2], 2, dtype=torch.int32, device="cpu")
    keys, lengths, turns = [], [], []
    for pairs in (classes.a, classes.b, classes.c):
        if not pairs:
            continue
        ids, first = distinct_angles(scaled, pairs)
        done = sum(len(x) for x in lengths)
        pair_runs[list(pairs)] = torch.tensor([done, done + len(first)], dtype=torch.int32, device="cpu")
        keys.append(rows[torch.from_numpy(np.argsort(ids, kind="stable"))])
        lengths.append(torch.from_numpy(np.bincount(ids)))
        turns.append(scaled[:, torch.from_numpy(first)] * (2 / torch.pi))
    bounds = torch.nn.functional.pad(torch.cat(lengths).cumsum(0), (1, 0))
    keys = torch.cat(keys)
    return KeyRuns(keys.int(), group[keys], bounds.int(), pair_runs, split(torch.cat(turns, dim=1)))


@dataclass(frozen=True)
class Blocks:
    """Keys arranged so that a per-query scale rotates queries per block row and column, not per key.

    ``keys (N, 8, 8)`` holds key rows or -1. Keys of one block row share the angles of pair class A, keys of one block
    column those of class B, all keys of a block those of class C; ``a, b (N, 8)`` and ``c (N,)`` name a key that
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


def classify_pairs(angles: Tensor, axis: Tensor, scaled_pairs: Tensor) -> PairClasses:
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
    angles: Tensor, runs: list[np.ndarray], axis: Tensor, scaled_pairs: Tensor
) -> tuple[PairClasses, list[Blocks]]:
    """Classes and the blocks of each run of scaled key rows, ``angles (Bk, Sk, D/2)``.

    Axes apart where keys form a grid. Where keys share no coordinates, all pairs are one class: then a block row holds
    one key, where a block would.
    """
    apart = classify_pairs(angles[:, np.concatenate(runs)], axis, scaled_pairs)
    together = PairClasses(tuple(scaled_pairs.nonzero().flatten().tolist()), (), ())
    candidates = [(c, [find_blocks(angles[:, rows], rows, c) for rows in runs]) for c in (apart, together)]
    return min(candidates, key=lambda candidate: sum(len(p.keys) for p in candidate[1]))


def find_blocks(angles: Tensor, rows: np.ndarray, classes: PairClasses) -> Blocks:
    """Cover the keys ``rows`` with blocks.

    Args:
        angles: ``(Bk, n, D/2)`` angles of the ``n`` keys, float64.
        rows: ``(n,)`` the key row each stands in.

    Keys on a grid fill 8 x 8 blocks. Keys without common coordinates lie on the diagonals of blocks, 8 in each. That
    takes more products and stays exact. The arrangement with fewer blocks is returned.
    """
    n = len(rows)
    index = np.arange(n)
    a = _ids(angles, classes.a) if classes.a else None
    b = _ids(angles, classes.b) if classes.b else None
    c = _ids(angles, classes.c) if classes.c else np.zeros(n, dtype=np.int64)
    if a is None:  # no axis varies: any arrangement will do
        a, b = index // AXIS_BLOCK, index % AXIS_BLOCK
    elif b is None:  # one axis varies: keys that share a coordinate fill a row
        b = _rank_within(a)
    copy = _rank_within(_ids_of(np.stack([c, a, b], axis=1)))
    block = _ids_of(np.stack([c, copy, a // AXIS_BLOCK, b // AXIS_BLOCK], axis=1))
    row, column = a % AXIS_BLOCK, b % AXIS_BLOCK
    rank = _rank_within(c)
    diagonal = _ids_of(np.stack([c, rank // AXIS_BLOCK], axis=1))
    if diagonal.max() < block.max():
        block, row, column = diagonal, rank % AXIS_BLOCK, rank % AXIS_BLOCK
    count = int(block.max()) + 1
    keys = np.full((count, AXIS_BLOCK, AXIS_BLOCK), -1, dtype=np.int64)
    keys[block, row, column] = rows
    reps_a, reps_b, reps_c = (np.full(shape, rows[0]) for shape in ((count, AXIS_BLOCK), (count, AXIS_BLOCK), (count,)))
    reps_a[block, row], reps_b[block, column], reps_c[block] = rows, rows, rows
    return Blocks(keys, reps_a, reps_b, reps_c)


def distinct_angles(angles: Tensor, pairs: Tensor | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct angle vectors over ``pairs`` (and batch rows) in order of value: the id of each of the ``n``
    keys of ``angles (Bk, n, D/2)``, and a key that stands for each id."""
    pairs = torch.as_tensor(pairs, dtype=torch.int64, device="cpu")
    columns = angles[..., pairs].transpose(0, 1).flatten(1).numpy()
    if not columns.shape[1]:
        return np.zeros(len(columns), dtype=np.int64), np.zeros(1, dtype=np.int64)
    _, first, ids = np.unique(columns, axis=0, return_index=True, return_inverse=True)
    return ids.reshape(-1), first


def _ids(angles: Tensor, pairs: tuple[int, ...]) -> np.ndarray:
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
