"""Modulations for some layers, steps and kinds of block."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch

import fastrope as fr

SITE = fr.Site(fr.TokenLayout(4, (2, 2)), num_layers=6, num_steps=5)
M = fr.BiasDelta(delta=1.2)


def active(at: fr.At, **where) -> bool:
    found = at.modulations(replace(SITE, **where))
    assert found in ([], [M])
    return bool(found)


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        (None, {0, 1, 2, 3, 4, 5}),
        (slice(2, 4), {2, 3}),
        (slice(4, None), {4, 5}),
        (slice(None, None, 2), {0, 2, 4}),
        (slice(-2, None), {4, 5}),
        (range(1, 3), {1, 2}),
        (range(-2, 0), {4, 5}),
        ({0, 3}, {0, 3}),
        ([1, -1], {1, 5}),
        (frozenset(), set()),
        (2, {2}),
        (-1, {5}),
        (range(4, 9), {4, 5}),
    ],
    ids=str,
)
def test_layers_and_steps_are_indices(indices, expected):
    assert {n for n in range(6) if active(fr.At(M, layers=indices), layer=n)} == expected
    assert {n for n in range(6) if active(fr.At(M, steps=indices), step=n, num_steps=6)} == expected


@pytest.mark.parametrize("indices", [slice(6, None), range(6, 9), [6], 6, -7, {-9, 8}], ids=str)
def test_layers_that_the_model_does_not_have_are_refused(indices):
    with pytest.raises(ValueError, match=r"^layers: expected some of the model's 6 layers, received"):
        active(fr.At(M, layers=indices))
    assert not active(fr.At(M, steps=indices))  # runs differ in length


@pytest.mark.parametrize("nothing", [slice(0, 0), slice(3, 2), range(0), [], slice(-2, -4)], ids=str)
def test_no_layers_at_all_is_a_choice(nothing):
    assert not active(fr.At(M, layers=nothing))


def test_kinds_of_block_that_the_model_does_not_have_are_refused():
    where = dict(kind="double", kinds=("double", "single"))
    with pytest.raises(
        ValueError, match=r"^kinds: expected some of the model's kinds of block, \('double', 'single'\)"
    ):
        active(fr.At(M, kinds="joint"), **where)
    assert active(fr.At(M, kinds=("joint", "double")), **where)
    assert not active(fr.At(M, kinds="single"), **where)
    assert not active(fr.At(M, kinds=()), **where)
    assert not active(fr.At(M, kinds="joint"), kind="double")  # where nobody says what there is


def test_all_conditions_must_hold():
    at = fr.At(M, layers=range(3), steps={1}, kinds="double")
    assert active(at, layer=1, step=1, kind="double")
    assert not active(at, layer=4, step=1, kind="double")
    assert not active(at, layer=1, step=2, kind="double")
    assert not active(at, layer=1, step=1, kind="single")
    assert active(fr.At(M, kinds=("single", "joint")), kind="joint")


def test_methods_lists_and_nesting():
    method = types.SimpleNamespace(modulations=lambda site: [M] * (site.layer == 2))
    at = fr.At([method, [fr.At(M, steps=0)]], layers=slice(1, None))
    counts = {(n, s): len(at.modulations(replace(SITE, layer=n, step=s))) for n in range(4) for s in range(2)}
    assert {where: n for where, n in counts.items() if n} == {(1, 0): 1, (2, 0): 2, (3, 0): 1, (2, 1): 1}


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((), {}, "what"),
        ((3,), {}, "what"),
        ((fr.BiasDelta,), {}, "what"),
        (([M, None],), {}, "what"),
        ((M,), {"layers": 1.5}, "layers"),
        ((M,), {"layers": "2"}, "layers"),
        ((M,), {"layers": {1.0}}, "layers"),
        ((M,), {"steps": [True]}, "steps"),
        ((M,), {"steps": torch.arange(3)}, "steps"),
        ((M,), {"kinds": "triple"}, "kinds"),
        ((M,), {"kinds": ["double", 3]}, "kinds"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .* received"):
        fr.At(*arguments, **options)


@pytest.mark.parametrize(("arguments", "name"), [({"num_layers": 0}, "num_layers"), ({"kind": "triple"}, "kind")])
def test_sites_know_their_block(arguments, name):
    assert (fr.Site(SITE.tokens).num_layers, fr.Site(SITE.tokens).kind) == (57, "joint")
    with pytest.raises(ValueError, match=rf"^{name}: expected .* received"):
        replace(SITE, **arguments)
