"""Bookkeeping of anchor matching: rasters inside token streams, records, anchors of batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastrope as fr
from fastrope.bindings.anchors import Grid, Record, guide, spread_anchors
from fastrope.islock import Match

grids = st.builds(
    Grid,
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    newline=st.sampled_from([None, 0, 8803]),
    lead=st.integers(0, 4),
    end=st.sampled_from([None, 8196]),
    opening=st.sampled_from([(), (5,), (5, 6, 7)]),
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
    opened = min(grid.lead, len(grid.opening))
    assert len(forced) == opened + (grid.height if grid.newline is not None else 0) + (grid.end is not None)
    assert all(found[step] is None for step in forced)
    assert [grid.forced(step) for step in range(grid.lead - opened, grid.lead)] == list(grid.opening)[-opened:][:opened]
    assert grid.prompt_end == grid.opening[: len(grid.opening) - opened]
    if grid.end is not None:
        assert grid.forced(grid.length - 1) == grid.end


@given(grids, st.integers(1, 3))
def test_flatten_undoes_the_stream(grid, batch):
    image = torch.arange(batch * grid.num_tokens).view(batch, -1) + 10_000
    stream = torch.full((batch, grid.length + 2), 7)
    for step in range(grid.length):
        if grid.forced(step) is not None:
            stream[:, step] = grid.forced(step)
        elif grid.raster(step) is not None:
            stream[:, step] = image[:, grid.raster(step)]
    assert torch.equal(grid.flatten(stream), image)


def test_flatten_refuses_rows_that_end_otherwise():
    with pytest.raises(ValueError, match=r"tokens: expected 9 at step 2 of row 1, received 4"):
        Grid(1, 2, newline=9).flatten(torch.tensor([[1, 2, 9], [1, 2, 4]]))
    with pytest.raises(ValueError, match=r"tokens: expected 8 at step 3 of row 0, received 7"):
        Grid(1, 2, newline=9, end=8).flatten(torch.tensor([[1, 2, 9, 7]]))
    with pytest.raises(ValueError, match=r"tokens: expected 6 at step 0 of row 0, received 5"):
        Grid(1, 2, lead=1, opening=(5, 6)).flatten(torch.tensor([[5, 2, 9]]))
    with pytest.raises(ValueError, match="tokens: expected at least 3 per row, received 2"):
        Grid(1, 2, newline=9).flatten(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 3), "Grid.height"),
        ((2, True), "Grid.width"),
        ((2, 2, -1), "Grid.newline"),
        ((2, 2, None, -1), "Grid.lead"),
        ((2, 2, None, 0, -1), "Grid.end"),
        ((2, 2, None, 0, None, (3, -1)), "Grid.opening"),
    ],
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


def matcher(num_tokens):
    return fr.ISLock().matcher(torch.rand(3, 2), num_tokens=num_tokens, token_ids=torch.tensor([1, 2, 3]))


def test_a_prompt_ends_where_the_image_begins():
    grid = Grid(2, 2, lead=1, opening=(5, 6, 7))
    grid.check_prompt(torch.tensor([[1, 5, 6], [9, 5, 6]]))
    with pytest.raises(ValueError, match=r"input_ids: expected prompts that end with \[5, 6\].* row 1, .* \[6, 0\]"):
        grid.check_prompt(torch.tensor([[1, 5, 6], [5, 6, 0]]))
    with pytest.raises(ValueError, match=r"row 0, which ends with \[6\]"):
        grid.check_prompt(torch.tensor([[6]]))


def test_anchors_repeat_as_prompts_do():
    anchors = torch.tensor([[1, 2], [3, -1]], dtype=torch.int32)
    found = spread_anchors(anchors, 4, 2, matcher(2))
    assert found.tolist() == [[1, 2], [1, 2], [3, -1], [3, -1]]
    assert found.dtype == torch.long


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        (torch.zeros(2), r"shape \(B, 4\)"),
        (torch.zeros(2, 4), "integer"),
        (torch.zeros(2, 3, dtype=torch.long), r"received \(2, 3\)"),
        (torch.zeros(3, 4, dtype=torch.long), "divides the batch of 4"),
        (torch.tensor([[1, -1, 3, 0]]), r"ids of the matcher's codebook .* received \[0\] and 1 such"),
        (torch.tensor([[1, -100, 4, 3]]), r"received \[-100, 4\] and 2 such"),
    ],
)
def test_anchors_that_do_not_fit_are_refused(anchors, message):
    with pytest.raises(ValueError, match=f"anchors: .*{message}"):
        spread_anchors(anchors, 4, 4, matcher(4))


def test_guidance_extrapolates_from_the_second_half():
    logits = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    assert guide(logits, 3.0).tolist() == [[3.0, -2.0]]
    assert torch.equal(guide(logits, 1.0), logits[:1])
