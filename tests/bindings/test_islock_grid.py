"""Bookkeeping of anchor matching: rasters inside token streams, records, anchors of batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrope.bindings.anchors import Grid, Record, guide, spread_anchors
from fastrope.islock.matcher import Match

grids = st.builds(
    Grid,
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    newline=st.sampled_from([None, 0, 8803]),
    lead=st.integers(0, 4),
)


def test_rows_that_end_with_a_token_shift_what_follows():
    grid = Grid(2, 3, newline=9, lead=1)
    assert [grid.raster(step) for step in range(-1, 11)] == [None, None, 0, 1, 2, None, 3, 4, 5, None, None, None]
    assert [grid.forced(step) for step in range(-1, 11)] == [None] * 5 + [9] + [None] * 3 + [9, None, None]
    assert (grid.length, grid.num_tokens, grid.stride) == (9, 6, 4)


def test_a_plain_raster_counts_from_zero():
    grid = Grid(2, 3)
    assert [grid.raster(step) for step in range(8)] == [0, 1, 2, 3, 4, 5, None, None]
    assert not any(grid.forced(step) is not None for step in range(8))


@given(grids)
def test_every_image_token_has_one_step_in_order(grid):
    found = [grid.raster(step) for step in range(grid.length + 3)]
    assert [index for index in found if index is not None] == list(range(grid.num_tokens))
    assert all(grid.raster(grid.step(index)) == index for index in range(grid.num_tokens))
    forced = [step for step in range(grid.length + 3) if grid.forced(step) is not None]
    assert len(forced) == (grid.height if grid.newline is not None else 0)
    assert all(found[step] is None for step in forced)


@given(grids, st.integers(1, 3))
def test_flatten_undoes_the_stream(grid, batch):
    image = torch.arange(batch * grid.num_tokens).view(batch, -1) + 10_000
    stream = torch.full((batch, grid.length + 2), 7)
    for step in range(grid.length):
        if grid.forced(step) is not None:
            stream[:, step] = grid.newline
        elif grid.raster(step) is not None:
            stream[:, step] = image[:, grid.raster(step)]
    assert torch.equal(grid.flatten(stream), image)


def test_flatten_refuses_rows_that_end_otherwise():
    with pytest.raises(ValueError, match=r"tokens: expected rows that end with 9, received \[4\]"):
        Grid(1, 2, newline=9).flatten(torch.tensor([[1, 2, 4]]))
    with pytest.raises(ValueError, match="tokens: expected at least 3 per row, received 2"):
        Grid(1, 2, newline=9).flatten(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 3), "Grid.height"), ((2, True), "Grid.width"), ((2, 2, -1), "Grid.newline"), ((2, 2, None, -1), "Grid.lead")],
)
def test_impossible_grids_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        Grid(*arguments)


def test_a_record_sorts_every_token_into_one_class():
    match = Match(
        tokens=torch.tensor([5, 6, 5, 5, 3]),
        distance=torch.tensor([0.0, 0.5, 2.0, 2.0, torch.inf]),
        window=torch.tensor([4, 4, 4, 4, 0], dtype=torch.int32),
        accepted=torch.tensor([True, True, False, False, False]),
    )
    anchors = torch.tensor([[5], [5], [5], [7], [-1]])
    record = Record.stack([match], anchors)
    assert record.kept[:, 0].tolist() == [True, False, False, False, False]
    assert record.moved[:, 0].tolist() == [False, True, False, False, False]
    assert record.fallback[:, 0].tolist() == [False, False, True, True, False]
    assert record.free[:, 0].tolist() == [False, False, False, False, True]
    assert record.counts()["fallback"] == [0, 0, 1, 1, 0]


def test_anchors_repeat_as_prompts_do():
    anchors = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    found = spread_anchors(anchors, 4, 2, torch.device("cpu"))
    assert found.tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert found.dtype == torch.long


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        (torch.zeros(2), r"shape \(B, 4\)"),
        (torch.zeros(2, 4), "integer"),
        (torch.zeros(2, 3, dtype=torch.long), r"received \(2, 3\)"),
        (torch.zeros(3, 4, dtype=torch.long), "divides the batch of 4"),
    ],
)
def test_anchors_that_do_not_fit_are_refused(anchors, message):
    with pytest.raises(ValueError, match=f"anchors: .*{message}"):
        spread_anchors(anchors, 4, 4, torch.device("cpu"))


def test_guidance_extrapolates_from_the_second_half():
    logits = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    assert guide(logits, 3.0).tolist() == [[3.0, -2.0]]
    assert torch.equal(guide(logits, 1.0), logits[:1])
