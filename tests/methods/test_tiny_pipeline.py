"""Both methods on a tiny FLUX Kontext pipeline: neutral is stock to the bit, and every dial moves, the further it is
turned the more, the picture away from stock, and what attention looks at in the reference."""

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
def stock(pipe):
    return tiny_run.run(pipe)


def distances(pipe, stock, methods) -> list[float]:
    return [tiny_run.distance(tiny_run.run(pipe, method), stock) for method in methods]


def rising(values: list[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def test_neutral_methods_are_stock_to_the_bit(pipe, stock):
    ones = torch.ones(16, 16)
    neutral = fr.LooseRoPE(ones, ones, boost=1.0, levels=None, crop_curve=None)
    for method in (fr.GRAG(1, 1), neutral):
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
def test_boost_moves_the_picture(pipe, stock, method, levels):
    """The lower the boost, the less is kept."""
    found = distances(pipe, stock, [replace(method, boost=boost, levels=levels) for boost in (1.0, 0.83, 0.6, 0.3)])
    assert found[0] > 0
    assert rising(found), found


def test_range_factor_alone_moves_the_picture(pipe, stock, method):
    curves = [(low, 1.0, 3.5) for low in (1.0, 0.9, 0.65, 0.4)]
    found = distances(pipe, stock, [replace(method, range_curve=c, crop_curve=None) for c in curves])
    assert found[0] == 0
    assert rising(found), found


def test_crop_factor_alone_moves_the_picture(pipe, stock, method):
    curves = [(low, 1.0, 6.5) for low in (1.0, 0.9, 0.65, 0.4)]
    found = distances(pipe, stock, [replace(method, range_curve=(1, 1, 0), crop_curve=c) for c in curves])
    assert found[0] == 0
    assert rising(found), found


def look(pipe, method, queries=None):
    """Attention of the first layer in the first step: mass on the reference, and how far into it queries look."""
    arguments = tiny_run.arguments() | {"num_inference_steps": 1, "output_type": "latent"}
    with fr.apply(pipe, method) as handle, handle.inspect(layers=0, queries=queries) as record, tiny_run.quiet():
        pipe(**arguments)
    (seen,) = record.looks
    return seen.mass["reference 0"], seen.distance["reference 0"]


def test_bias_is_the_weight_of_the_reference(pipe):
    masses = [look(pipe, fr.GRAG(bias, 1.0))[0] for bias in (0.5, 0.7, 0.9, 1.0, 1.1)]
    assert rising(masses), masses


def test_delta_is_a_temperature_inside_the_reference(pipe):
    """The higher, the closer queries look at what they match: in a model that looks near, at what is near."""
    distances = [look(pipe, fr.GRAG(1.0, delta))[1] for delta in (1.6, 1.3, 1.1, 1.0, 0.9, 0.7, 0.5)]
    assert rising(distances), distances


@pytest.mark.parametrize("levels", [5, None])
def test_boost_widens_the_view_of_the_paste(pipe, method, levels):
    """The lower, the farther queries of the paste look around in the reference."""
    _, inside = method.on_grid((16, 16))
    text = tiny_run.SETTINGS.text
    queries = torch.cat([torch.zeros(text, dtype=torch.bool), inside.flatten(), torch.zeros(256, dtype=torch.bool)])
    methods = [replace(method, boost=boost, levels=levels, crop_curve=None) for boost in (1.0, 0.83, 0.6, 0.3)]
    distances = [look(pipe, method, queries)[1] for method in methods]
    assert rising(distances), distances


def test_layers_and_steps_reach_the_pipeline(pipe, stock):
    """Nothing but the first step and layer: closer to stock than all of them, and not stock."""
    everywhere, first_step, first_layer = distances(
        pipe, stock, [fr.GRAG(1, 1.5), fr.GRAG(1, 1.5, steps=range(1)), fr.GRAG(1, 1.5, layers=range(1))]
    )
    assert 0 < first_step < everywhere
    assert first_layer > 0
    assert first_layer != everywhere


def test_methods_compose(pipe, method):
    both = tiny_run.run(pipe, fr.GRAG(1, 1.3), method)
    assert torch.equal(both, tiny_run.run(pipe, method, fr.GRAG(1, 1.3)))
    assert tiny_run.distance(both, tiny_run.run(pipe, method)) > 1e-4
