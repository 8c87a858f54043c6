"""GRAG against its formula written out in full, its schedules, its errors."""

from __future__ import annotations

import pytest
import torch
from methods.oracle import attend

import fastrope as fr
from fastrope.methods import Linear, PerLayer, PerStep

TOKENS = fr.TokenLayout(text=3, target=(3, 5), references=[(2, 3), (4, 3)])
AXES = (4, 6, 6)
GROUPS = {"text": list(range(0, 3)), 0: list(range(18, 24)), 1: list(range(24, 36))}


def site(**kwargs) -> fr.Site:
    return fr.Site(TOKENS, axes_dim=AXES, **kwargs)


def check(method: fr.GRAG, groups, where: fr.Site) -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, len(TOKENS), 2, sum(AXES), generator=g, dtype=torch.float64)
    positions = TOKENS.positions("flux")
    rope = fr.RoPE.axial(positions, axes_dim=AXES)
    out = fr.attention(q, k, v, rope=rope, modulations=method.modulations(where), backend="sdpa")
    expected = attend(q, k, v, positions, AXES, groups=tuple((GROUPS[n], bias, delta) for n, bias, delta in groups))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_every_reference_is_a_group_of_its_own():
    check(fr.GRAG(0.9, 1.3), [(0, 0.9, 1.3), (1, 0.9, 1.3)], site())


def test_references_with_values_of_their_own_and_the_text():
    method = fr.GRAG(bias=[0.8, 1.2], delta=[1.5, Linear(0.5, 0.9)], text_bias=1.1, text_delta=0.7)
    check(method, [(0, 0.8, 1.5), (1, 1.2, 0.7), ("text", 1.1, 0.7)], site(step=2, num_steps=5))


def test_the_text_alone_needs_no_reference():
    bare = fr.TokenLayout(3, (2, 2))
    for method in (fr.GRAG(text_delta=0.7), fr.GRAG(1, 1, text_delta=0.7), fr.GRAG(text_delta=PerStep([0.7, 1.0]))):
        first, last = (method.modulations(fr.Site(bare, step=step, num_steps=2)) for step in range(2))
        assert [(m.bias, m.delta, m.keys) for m in first] == [(1.0, 0.7, slice(0, 3))]
        assert len(last) == (not callable(method.text_delta))


def test_values_move_like_keys():
    """DCAG: the values of a picture, about their own mean."""
    method = fr.GRAG(1, 1, value_bias=0.9, value_delta=[1.5, Linear(1.0, 0.6)])
    found = [(m.on, m.keys, m.bias, m.delta) for m in method.modulations(site(step=1, num_steps=3))]
    assert found == [("values", slice(18, 24), 0.9, 1.5), ("values", slice(24, 36), 0.9, 0.8)]
    both = fr.GRAG(1, 1.1, text_delta=0.9, value_delta=1.15).modulations(site())
    assert [(m.on, m.delta) for m in both] == [("keys", 1.1)] * 2 + [("keys", 0.9)] + [("values", 1.15)] * 2
    with pytest.raises(ValueError, match="GRAG: expected a sequence with at least one reference picture"):
        fr.GRAG(text_delta=0.9, value_delta=1.1).modulations(fr.Site(fr.TokenLayout(3, (2, 2))))
    with pytest.raises(ValueError, match="^GRAG.value_delta: expected 2 values, one per reference, received 1"):
        fr.GRAG(value_delta=[1.1]).modulations(site())


def test_chosen_references():
    check(fr.GRAG(1.2, 0.8, references=[1]), [(1, 1.2, 0.8)], site())


def test_defaults_are_those_of_the_published_demo():
    (group,) = fr.GRAG().modulations(fr.Site(fr.TokenLayout(4, (2, 2), [(2, 2)])))
    assert (group.bias, group.delta, group.keys) == (1.0, 1.1, slice(8, 12))


def test_schedules():
    method = fr.GRAG(bias=PerLayer([1.0, 1.2]), delta=PerStep([1.3, 1.2, 1.1]))
    values = [
        [(m.bias, m.delta) for m in method.modulations(site(layer=layer, step=step, num_steps=3))[:1]]
        for layer in range(2)
        for step in range(3)
    ]
    assert values == [[(1.0, 1.3)], [(1.0, 1.2)], [(1.0, 1.1)], [(1.2, 1.3)], [(1.2, 1.2)], [(1.2, 1.1)]]


def test_neutral_is_no_modulation():
    assert fr.GRAG(1, 1).modulations(site()) == []
    assert len(fr.GRAG(1, [1, 1.1]).modulations(site())) == 1


def test_layers_and_steps():
    method = fr.GRAG(layers=range(1, 3), steps=(0.0, 0.5))
    active = [(n, s) for n in range(4) for s in range(4) if method.modulations(site(layer=n, step=s, num_steps=4))]
    assert active == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_same_objects_while_nothing_changes():
    method = fr.GRAG(delta=Linear(1.2, 1.0))
    first = method.modulations(site(layer=0, step=1))
    again = fr.GRAG(delta=Linear(1.2, 1.0)).modulations(site(layer=7, step=1))
    assert len(first) == 2
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert method.modulations(site(step=2))[0] is not first[0]


@pytest.mark.parametrize(("kwargs", "name"), [
    (dict(bias="1"), "GRAG.bias"), (dict(delta=None), "GRAG.delta"), (dict(delta=True), "GRAG.delta"),
    (dict(bias=[]), "GRAG.bias"), (dict(delta=[1.0, "x"]), r"GRAG.delta\[1\]"),
    (dict(text_bias=[1.0]), "GRAG.text_bias"), (dict(value_bias="1"), "GRAG.value_bias"),
    (dict(value_delta=[]), "GRAG.value_delta"),
    (dict(text_delta=float("inf")), "GRAG.text_delta"), (dict(references=[0, 0]), "GRAG.references"),
    (dict(references=0), "GRAG.references"), (dict(layers="all"), "layers"), (dict(steps=0.5), "steps"),
])  # fmt: skip
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, received "):
        fr.GRAG(**kwargs)


@pytest.mark.parametrize("kwargs", [
    dict(bias=1, delta=1), dict(bias=1, delta=PerStep([1.0] * 28)), dict(bias=[1, 1], delta=1, references=[0, 5]),
])  # fmt: skip
def test_neutral_values_modulate_nothing_on_any_sequence(kwargs):
    assert fr.GRAG(**kwargs).modulations(fr.Site(fr.TokenLayout(3, (2, 2)))) == []
    assert fr.At(fr.GRAG(**kwargs), layers=0).modulations(fr.Site(fr.TokenLayout(3, (2, 2)))) == []


@pytest.mark.parametrize(("kwargs", "tokens", "message"), [
    ({}, fr.TokenLayout(3, (2, 2)), "GRAG: expected a sequence with at least one reference picture"),
    (dict(delta=1.2, text_delta=0.9), fr.TokenLayout(3, (2, 2)), "GRAG: expected a sequence with at least one"),
    (dict(references=[0], text_delta=0.9), fr.TokenLayout(3, (2, 2)), "GRAG: expected a sequence with at least one"),
    (dict(references=[2]), TOKENS, r"GRAG.references: expected references in \[0, 2\), received \(2,\)"),
    (dict(delta=[1.1]), TOKENS, "GRAG.delta: expected 2 values, one per reference, received 1"),
    (dict(bias=lambda s: "x"), TOKENS, "GRAG.bias: expected a finite number from the schedule"),
])  # fmt: skip
def test_sites_that_do_not_fit(kwargs, tokens, message):
    with pytest.raises(ValueError, match=message):
        fr.GRAG(**kwargs).modulations(fr.Site(tokens))
