"""The pure lowering: segments, scale buckets, sorted queries and axis blocks hold every key and query exactly once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import calls

import fastrope as fr
from fastrope.kernels.abi import AXIS_BLOCK, QUERY_TILE
from fastrope.planning import axis_blocks, scales, segments
from fastrope.planning.flattening import flatten, map_tensors, tables, tensors_of, unflatten
from fastrope.planning.lowered import Lowered
from fastrope.planning.scales import AT_ONE, PER_QUERY
from fastrope.planning.segments import MAX_RUNS, KeySignatures, Segment


@given(st.integers(1, 300), st.integers(0, 2**16), st.sampled_from([1, 3, 40]))
def test_segments_partition_the_keys(num_keys, seed, run):
    """Runs of a few keys are sorted by signature, long ones stay; either way each key keeps its signature."""
    g = torch.Generator().manual_seed(seed)
    column = lambda n: torch.randint(-1, n, (num_keys // run + 1,), generator=g).repeat_interleave(run)[:num_keys]  # noqa: E731
    signatures = KeySignatures(column(1) == 0, column(2), column(1), column(2), column(1))
    found, order = segments.segment_keys(signatures)
    order = torch.arange(num_keys) if order is None else order
    assert order.sort().values.tolist() == list(range(num_keys))
    assert [s.start for s in found] == [0, *(s.stop for s in found[:-1])]
    assert found[-1].stop == num_keys
    rows = signatures.stacked()[order].tolist()
    for s in found:
        assert all(row == [int(s.scaled), s.weight, s.group, s.gain, s.bias] for row in rows[s.start : s.stop])
    distinct = len({tuple(r) for r in rows})
    assert len(found) <= max(MAX_RUNS, distinct)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 4))
def test_passes_partition_the_segments_and_hold_what_they_may(values, most):
    runs = [Segment(n, n + 1, weight=w, group=g) for n, (w, g) in enumerate(values)]
    limits = ((lambda s: s.weight, most), (lambda s: s.group, most + 1))
    bounds = segments.split_passes(runs, *limits)
    assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])]
    assert bounds[-1][1] == len(runs)
    holds = lambda first, last: all(len({value(s) for s in runs[first:last]}) <= n for value, n in limits)  # noqa: E731
    for first, last in bounds:
        assert last > first
        assert holds(first, last)
        assert last == len(runs) or not holds(first, last + 1)


def test_a_usual_call_is_one_pass():
    runs = [Segment(n, n + 1, bool(n % 2), weight=n % 2, group=n % 3) for n in range(MAX_RUNS)]
    assert segments.launch_passes(runs, per_query=True) == ((0, MAX_RUNS),)
    assert len(segments.launch_passes([*runs, Segment(16, 17)], per_query=True)) == 2


def test_sorted_keys_keep_their_order_within_a_signature():
    even = torch.arange(60) % 2 == 0
    none = torch.full((60,), -1)
    found, order = segments.segment_keys(KeySignatures(even, none, none, none, none))
    assert order.tolist() == [*range(0, 60, 2), *range(1, 60, 2)]
    assert [(s.start, s.stop, s.scaled) for s in found] == [(0, 30, True), (30, 60, False)]


def test_few_values_are_buckets_however_rare():
    scale = torch.tensor([[1.0, 0.5, 0.7, 0.7, 1.0]])
    buckets, bucket = scales.find_buckets(scale)
    assert buckets.tolist() == pytest.approx([0.5, 0.7])
    assert bucket.tolist() == [[AT_ONE, 1, 2, 2, AT_ONE]]


def test_many_values_are_per_query_but_for_those_that_fill_a_tile():
    scale = torch.cat([torch.linspace(0.1, 0.9, 50), torch.full((QUERY_TILE,), 0.25), torch.ones(3)])[None]
    buckets, bucket = scales.find_buckets(scale)
    assert buckets.tolist() == [0.25]
    assert (bucket == PER_QUERY).sum() == 50
    assert (bucket == 1).sum() == QUERY_TILE
    assert (bucket == AT_ONE).sum() == 3


@given(st.lists(st.lists(st.integers(-1, 4), min_size=5, max_size=200), min_size=1, max_size=3), st.integers(0, 99))
def test_sorted_queries_hold_every_query_once_and_tiles_one_bucket(rows, seed):
    length = min(len(r) for r in rows)
    bucket = torch.tensor([r[:length] for r in rows])
    scale = torch.rand(bucket.shape, generator=torch.Generator().manual_seed(seed))
    alone = (bucket == AT_ONE).all(dim=0) & (torch.arange(length) % 3 > 0) if seed % 2 else None
    found = scales.sort_queries(bucket, scale, alone)
    queries, tile_bucket = found.queries, found.tile_bucket
    assert queries.shape[1] == tile_bucket.shape[1] * QUERY_TILE
    for b in range(len(rows)):
        assert sorted(s for s in queries[b].tolist() if s >= 0) == list(range(length))
        for tile, value in zip(queries[b].split(QUERY_TILE), tile_bucket[b].tolist(), strict=True):
            assert all(bucket[b, s] == value for s in tile.tolist() if s >= 0)
    per_query = (queries >= 0) & (tile_bucket.repeat_interleave(QUERY_TILE, dim=1) == PER_QUERY)
    assert not bool(per_query[:, found.num_per_query :].any())
    last = torch.zeros(length, dtype=torch.bool) if alone is None else alone
    for b in range(len(rows)):
        tiles = queries[b].split(QUERY_TILE)
        assert all(len({bool(last[s]) for s in tile.tolist() if s >= 0}) <= 1 for tile in tiles)
        assert all(last[s] for s in queries[b, found.num_modulated :].tolist() if s >= 0)
        ascending = scale[b, queries[b][per_query[b]].long()]
        assert torch.equal(ascending, ascending.sort().values)


def test_unmodulated_queries_are_those_at_one_in_every_row():
    scale = torch.tensor([[1.0, 1.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]])
    gain = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    neutral = [scale == 1, gain == 1]
    assert scales.unmodulated_queries(neutral).tolist() == [True, True, False, False]
    assert (
        scales.unmodulated_queries([*neutral, torch.tensor([[False, True, True, True]])]) is None
    )  # a quarter is left
    assert scales.unmodulated_queries([]) is None


@pytest.mark.parametrize("kind", ["grid", "ragged", "two references", "line", "scattered", "one axis"])
def test_blocks_hold_every_key_once_beside_keys_of_its_angles(kind):
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
    classes, (blocks,) = axis_blocks.arrange_keys(angles, [np.arange(n)], axis, torch.ones(6, dtype=torch.bool))
    assert sorted(classes.a + classes.b + classes.c) == list(range(6))
    present = blocks.keys >= 0
    assert sorted(blocks.keys[present].tolist()) == list(range(n))
    table = angles[0].numpy()
    for p, u, v in zip(*np.nonzero(present), strict=True):
        key = blocks.keys[p, u, v]
        for representative, pairs in (
            (blocks.a[p, u], classes.a),
            (blocks.b[p, v], classes.b),
            (blocks.c[p], classes.c),
        ):
            assert (table[key][list(pairs)] == table[representative][list(pairs)]).all()
    best = -(-13 // AXIS_BLOCK) * -(-9 // AXIS_BLOCK)
    if kind == "grid":
        assert len(blocks.keys) == best
    if kind == "two references":  # frames differ in class C, and share no block
        assert len(blocks.keys) == 2 * best
    assert len(blocks.keys) <= -(-n // AXIS_BLOCK) + 1


def test_constant_keys_fill_blocks():
    angles = torch.zeros(1, 100, 4, dtype=torch.float64)
    classes = axis_blocks.classify_pairs(angles, torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool))
    assert (classes.a, classes.b, classes.c) == ((), (), (0, 1, 2, 3))
    assert len(axis_blocks.find_blocks(angles, np.arange(100), classes).keys) == 2


@given(calls(tokens=(5, 33), dims=(16,)))
def test_tables_survive_flattening(call):
    """What ops carry makes the same tables, field by field."""
    lowered = call.planned().lowered
    tensors, spec = lowered.flatten()
    again = Lowered.unflatten(tensors, spec)
    assert all(x is y for x, y in zip(tensors, again.flatten()[0], strict=True))
    assert again.flatten()[1] == spec
    assert list(map(id, tensors_of(again))) == list(map(id, tensors))
    assert again.segments == lowered.segments
    with pytest.raises(ValueError, match="tensors: expected"):
        Lowered.unflatten([*tensors, torch.ones(1)], spec)


@dataclass(frozen=True)
class Several:
    """A table that holds tables and tensors in tuples."""

    alone: torch.Tensor
    tables: tuple
    name: str = "several"


def test_tensors_in_tuples_are_tensors_of_the_table():
    """What is flattened is what is moved to a device, and counted."""
    one, two, three = (torch.tensor(float(n)) for n in range(3))
    table = Several(one, (Several(two, ()), three, None))
    tensors, spec = flatten(table)
    assert tensors == tensors_of(table) == [one, two, three]
    moved = map_tensors(table, lambda x: x + 10)
    assert [float(x) for x in tensors_of(moved)] == [10, 11, 12]
    again = unflatten(tensors_of(moved), spec, tables(Several))
    assert again == moved


def test_no_table_stands_in_for_another():
    """A plain call has none; each modulation brings what it needs."""
    plan = fr.plan()
    assert not plan.tensors
    gain = fr.plan(modulations=[fr.LogitGain(torch.tensor([0.5, 2.0]))], num_keys=3).lowered
    assert gain.gains is not None
    assert gain.scales is None
    assert gain.groups is None
    assert gain.bands is None


def test_what_is_known_may_be_cleared_at_any_time():
    """By another thread, whose layout is one too many."""

    class Key:
        def __hash__(self):
            lowered._known.clear()
            return 1

    lowered = fr.plan().lowered
    assert lowered.once(Key(), lambda: "made") == "made"
