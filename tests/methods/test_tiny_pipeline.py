"""Both methods on a tiny FLUX Kontext pipeline: neutral is stock to the bit, and every dial moves the picture further
from stock the further it is turned."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from methods import tiny_run


@pytest.fixture(scope="module")
def pipe():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of a few hundred elements: threads only wait for each other
    yield tiny_run.pipeline()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stock(pipe):
    return tiny_run.run(pipe)


@pytest.fixture(scope="module")
def loose():
    scene = tiny_run.pasted()
    return fr.LooseRoPE.from_images(scene.composite, scene.background)


def distances(pipe, stock, methods) -> list[float]:
    return [tiny_run.distance(tiny_run.run(pipe, method), stock) for method in methods]


def rising(values: list[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def test_neutral_methods_are_stock_to_the_bit(pipe, stock):
    ones = torch.ones(16, 16)
    untouched = fr.LooseRoPE(ones, ones, boost=1.0, levels=None, crop_curve=None)
    for method in (fr.GRAG(1, 1), untouched):
        assert torch.equal(tiny_run.run(pipe, method), stock)


@pytest.mark.parametrize("values", [(1.0, 1.1, 1.3, 1.6), (1.0, 0.9, 0.7, 0.5)], ids=["up", "down"])
def test_delta_moves_the_picture(pipe, stock, values):
    found = distances(pipe, stock, [fr.GRAG(1.0, delta) for delta in values])
    assert found[0] == 0
    assert rising(found), found


@pytest.mark.parametrize("values", [(1.0, 1.1, 1.3), (1.0, 0.9, 0.7)], ids=["up", "down"])
def test_bias_moves_the_picture(pipe, stock, values):
    found = distances(pipe, stock, [fr.GRAG(bias, 1.0) for bias in values])
    assert rising(found), found


@pytest.mark.parametrize("levels", [5, None])
def test_boost_moves_the_picture(pipe, stock, loose, levels):
    """The lower the boost, the less is kept."""
    found = distances(pipe, stock, [replace(loose, boost=boost, levels=levels) for boost in (1.0, 0.83, 0.6, 0.3)])
    assert found[0] > 0
    assert rising(found), found


def test_range_factor_alone_moves_the_picture(pipe, stock, loose):
    curves = [(low, 1.0, 3.5) for low in (1.0, 0.9, 0.65, 0.4)]
    found = distances(pipe, stock, [replace(loose, range_curve=c, crop_curve=None) for c in curves])
    assert found[0] == 0
    assert rising(found), found


def test_crop_factor_alone_moves_the_picture(pipe, stock, loose):
    curves = [(low, 1.0, 6.5) for low in (1.0, 0.9, 0.65, 0.4)]
    found = distances(pipe, stock, [replace(loose, range_curve=(1, 1, 0), crop_curve=c) for c in curves])
    assert found[0] == 0
    assert rising(found), found


def test_layers_and_steps_reach_the_pipeline(pipe, stock):
    """Nothing but the first step and layer: closer to stock than all of them, and not stock."""
    everywhere, first_step, first_layer = distances(
        pipe, stock, [fr.GRAG(1, 1.5), fr.GRAG(1, 1.5, steps=range(1)), fr.GRAG(1, 1.5, layers=range(1))]
    )
    assert 0 < first_step < everywhere
    assert first_layer > 0
    assert first_layer != everywhere


def test_methods_compose(pipe, loose):
    both = tiny_run.run(pipe, fr.GRAG(1, 1.3), loose)
    assert torch.equal(both, tiny_run.run(pipe, loose, fr.GRAG(1, 1.3)))
    assert tiny_run.distance(both, tiny_run.run(pipe, loose)) > 1e-4
