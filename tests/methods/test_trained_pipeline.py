"""Both methods on the lab's trained editor: neutral is stock to the bit, and every dial moves the picture away from
stock, the further it is turned the more. Dials are turned a little, so that this holds whatever the weights are."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from methods import tiny_run


@pytest.fixture(scope="module")
def stock(pipe):
    return tiny_run.run(pipe)


def distances(pipe, stock, methods) -> list[float]:
    return [tiny_run.distance(tiny_run.run(pipe, method), stock) for method in methods]


def rising(values: list[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def test_neutral_methods_are_stock_to_the_bit(pipe, stock):
    ones = torch.ones(8, 8)
    neutral = fr.LooseRoPE(ones, ones, boost=1.0, levels=None, crop_curve=None)
    for method in (fr.GRAG(1, 1), neutral):
        assert torch.equal(tiny_run.run(pipe, method), stock)


@pytest.mark.parametrize("values", [(1.0, 1.01, 1.03, 1.06), (1.0, 0.99, 0.97, 0.94)], ids=["up", "down"])
def test_delta_moves_the_picture(pipe, stock, values):
    found = distances(pipe, stock, [fr.GRAG(1.0, delta) for delta in values])
    assert found[0] == 0
    assert rising(found), found


@pytest.mark.parametrize("values", [(1.0, 1.02, 1.05), (1.0, 0.98, 0.95)], ids=["up", "down"])
def test_bias_moves_the_picture(pipe, stock, values):
    found = distances(pipe, stock, [fr.GRAG(bias, 1.0) for bias in values])
    assert rising(found), found


@pytest.mark.parametrize("levels", [5, None])
def test_boost_moves_the_picture(pipe, stock, method, levels):
    boosts = [replace(method, boost=boost, levels=levels) for boost in (1.0, 0.83, 0.6, 0.3)]
    drawn = [stock, *(tiny_run.run(pipe, m) for m in boosts)]
    assert not any(torch.equal(a, b) for a, b in combinations(drawn, 2))


def test_range_factor_alone_moves_the_picture(pipe, stock, method):
    curves = [(low, 1.0, 3.5) for low in (1.0, 0.98, 0.95, 0.9)]
    found = distances(pipe, stock, [replace(method, range_curve=c, crop_curve=None) for c in curves])
    assert found[0] == 0
    assert rising(found), found


def test_crop_factor_alone_moves_the_picture(pipe, stock, method):
    curves = [(low, 1.0, 6.5) for low in (1.0, 0.98, 0.95, 0.9)]
    found = distances(pipe, stock, [replace(method, range_curve=(1, 1, 0), crop_curve=c) for c in curves])
    assert found[0] == 0
    assert rising(found), found


def test_layers_and_steps_reach_the_pipeline(pipe, stock):
    """Nothing but the first step or layer: not stock, and not all of them."""
    everywhere, first_step, first_layer = distances(
        pipe, stock, [fr.GRAG(1, 1.5), fr.GRAG(1, 1.5, steps=range(1)), fr.GRAG(1, 1.5, layers=range(1))]
    )
    assert first_step > 0
    assert first_step != everywhere
    assert first_layer > 0
    assert first_layer != everywhere


def test_methods_compose(pipe, method):
    both = tiny_run.run(pipe, fr.GRAG(1, 1.3), method)
    assert torch.equal(both, tiny_run.run(pipe, method, fr.GRAG(1, 1.3)))
    assert tiny_run.distance(both, tiny_run.run(pipe, method)) > 1e-4
