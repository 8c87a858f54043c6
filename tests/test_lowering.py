"""The pure lowering: segments, levels, query slots and patches hold every key and query exactly once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrope import lowering
from fastrope.lowering import CONTINUOUS, PATCH, PLAIN, SLOT_TILE, Treatments


@given(st.integers(1, 300), st.integers(0, 2**16), st.sampled_from([1, 3, 40]))
def test_segments_partition_the_keys(num_keys, seed, run):
    """Runs of a few keys are sorted by treatment, long ones stay; either way each key keeps its treatment."""
    g = torch.Generator().manual_seed(seed)
    column = lambda n: torch.randint(-1, n, (num_keys // run + 1,), generator=g).repeat_interleave(run)[:num_keys]  # noqa: E731
    treatments = Treatments(column(1) == 0, column(2), column(1), column(2))
    segments, order = lowering.segment_keys(treatments)
    order = torch.arange(num_keys) if order is None else order
    assert order.sort().values.tolist() == list(range(num_keys))
    assert [s.start for s in segments] == [0, *(s.stop for s in segments[:-1])]
    assert segments[-1].stop == num_keys
    rows = treatments.signatures()[order].tolist()
    for s in segments:
        assert all(row == [int(s.scaled), s.weight, s.group, s.gain] for row in rows[s.start : s.stop])
    distinct = len({tuple(r) for r in rows})
    assert len(segments) <= max(lowering.MAX_RUNS, distinct)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 4))
def test_passes_partition_the_segments_and_hold_what_they_may(values, most):
    segments = [lowering.Segment(n, n + 1, weight=w, group=g) for n, (w, g) in enumerate(values)]
    limits = ((lambda s: s.weight, most), (lambda s: s.group, most + 1))
    bounds = lowering.split_passes(segments, *limits)
    assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])]
    assert bounds[-1][1] == len(segments)
    holds = lambda first, last: all(len({value(s) for s in segments[first:last]}) <= n for value, n in limits)  # noqa: E731
    for first, last in bounds:
        assert last > first
        assert holds(first, last)
        assert last == len(segments) or not holds(first, last + 1)


def test_a_usual_call_is_one_pass():
    segments = [lowering.Segment(n, n + 1, bool(n % 2), weight=n % 2, group=n % 3) for n in range(lowering.MAX_RUNS)]
    assert lowering.launch_passes(segments, continuous=True) == ((0, lowering.MAX_RUNS),)
    assert len(lowering.launch_passes([*segments, lowering.Segment(16, 17)], continuous=True)) == 2


def test_sorted_keys_keep_their_order_within_a_treatment():
    even = torch.arange(60) % 2 == 0
    none = torch.full((60,), -1)
    segments, order = lowering.segment_keys(Treatments(even, none, none, none))
    assert order.tolist() == [*range(0, 60, 2), *range(1, 60, 2)]
    assert [(s.start, s.stop, s.scaled) for s in segments] == [(0, 30, True), (30, 60, False)]


def test_few_values_are_levels_however_rare():
    scale = torch.tensor([[1.0, 0.5, 0.7, 0.7, 1.0]])
    levels, level = lowering.find_levels(scale)
    assert levels.tolist() == pytest.approx([0.5, 0.7])
    assert level.tolist() == [[PLAIN, 1, 2, 2, PLAIN]]


def test_many_values_are_continuous_but_for_those_that_fill_a_tile():
    scale = torch.cat([torch.linspace(0.1, 0.9, 50), torch.full((SLOT_TILE,), 0.25), torch.ones(3)])[None]
    levels, level = lowering.find_levels(scale)
    assert levels.tolist() == [0.25]
    assert (level == CONTINUOUS).sum() == 50
    assert (level == 1).sum() == SLOT_TILE
    assert (level == PLAIN).sum() == 3


@given(st.lists(st.lists(st.integers(-1, 4), min_size=5, max_size=200), min_size=1, max_size=3), st.integers(0, 99))
def test_slots_hold_every_query_once_and_tiles_one_level(rows, seed):
    length = min(len(r) for r in rows)
    level = torch.tensor([r[:length] for r in rows])
    scale = torch.rand(level.shape, generator=torch.Generator().manual_seed(seed))
    untouched = (level == PLAIN).all(dim=0) & (torch.arange(length) % 3 > 0) if seed % 2 else None
    slots, slot_level, continuous, touched = lowering.query_slots(level, scale, untouched)
    assert slots.shape[1] == slot_level.shape[1] * SLOT_TILE
    for b in range(len(rows)):
        assert sorted(s for s in slots[b].tolist() if s >= 0) == list(range(length))
        for tile, value in zip(slots[b].split(SLOT_TILE), slot_level[b].tolist(), strict=True):
            assert all(level[b, s] == value for s in tile.tolist() if s >= 0)
    own = (slots >= 0) & (slot_level.repeat_interleave(SLOT_TILE, dim=1) == CONTINUOUS)
    assert not bool(own[:, continuous:].any())
    last = torch.zeros(length, dtype=torch.bool) if untouched is None else untouched
    for b in range(len(rows)):
        tiles = slots[b].split(SLOT_TILE)
        assert all(len({bool(last[s]) for s in tile.tolist() if s >= 0}) <= 1 for tile in tiles)
        assert all(last[s] for s in slots[b, touched:].tolist() if s >= 0)
        ascending = scale[b, slots[b][own[b]].long()]
        assert torch.equal(ascending, ascending.sort().values)


def test_untouched_queries_are_those_at_one_in_every_row():
    scale = torch.tensor([[1.0, 1.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]])
    gain = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    assert lowering.untouched_queries([scale, gain]).tolist() == [True, True, False, False]
    assert lowering.untouched_queries([scale, gain, torch.tensor([[2.0, 1, 1, 1]])]) is None  # a quarter is left
    assert lowering.untouched_queries([]) is None


@pytest.mark.parametrize("kind", ["grid", "ragged", "two references", "line", "scattered", "one axis"])
def test_patches_hold_every_key_once_beside_keys_of_its_angles(kind):
    g = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(13.0), torch.arange(9.0), indexing="ij")
    grid = torch.stack([torch.zeros(117), rows.flatten(), columns.flatten()], dim=1)
    positions = {
        "grid": grid, "ragged": grid[torch.rand(117, generator=g) > 0.4],
        "two references": torch.cat([grid, grid + torch.tensor([1.0, 0, 0])]),
        "line": torch.stack([torch.zeros(50), torch.zeros(50), torch.arange(50.0)], dim=1),
        "scattered": torch.rand(40, 3, generator=g) * 9, "one axis": grid * torch.tensor([0.0, 1, 0]),
    }[kind]  # fmt: skip
    axis = torch.tensor([0, 1, 1, 2, 2, 2])
    angles = (positions[:, axis] * torch.tensor([1.0, 1, 0.1, 1, 0.3, 0.1]))[None].double()
    n = len(positions)
    classes, (patches,) = lowering.arrange_keys(angles, [np.arange(n)], axis, torch.ones(6, dtype=torch.bool))
    assert sorted(classes.a + classes.b + classes.c) == list(range(6))
    present = patches.keys >= 0
    assert sorted(patches.keys[present].tolist()) == list(range(n))
    table = angles[0].numpy()
    for p, u, v in zip(*np.nonzero(present), strict=True):
        key = patches.keys[p, u, v]
        for representative, pairs in (
            (patches.a[p, u], classes.a),
            (patches.b[p, v], classes.b),
            (patches.c[p], classes.c),
        ):
            assert (table[key][list(pairs)] == table[representative][list(pairs)]).all()
    best = -(-13 // PATCH) * -(-9 // PATCH)
    if kind == "grid":
        assert len(patches.keys) == best
    if kind == "two references":  # frames differ in class C, and share no patch
        assert len(patches.keys) == 2 * best
    assert len(patches.keys) <= -(-n // PATCH) + 1


def test_constant_keys_fill_patches():
    angles = torch.zeros(1, 100, 4, dtype=torch.float64)
    classes = lowering.classify_pairs(angles, torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool))
    assert (classes.a, classes.b, classes.c) == ((), (), (0, 1, 2, 3))
    assert len(lowering.find_patches(angles, np.arange(100), classes).keys) == 2
