"""ReferenceStrength: the modulations it makes, its errors."""

from __future__ import annotations

import math

import pytest

import fastrope as fr
from fastrope.methods import Linear, PerStep

TOKENS = fr.TokenLayout(text=3, target=(3, 5), references=[(2, 3), (4, 3)])


def site(tokens: fr.TokenLayout = TOKENS, **kwargs) -> fr.Site:
    return fr.Site(tokens, axes_dim=(4, 6, 6), **kwargs)


def biases(method, **kwargs) -> list:
    return [(m.keys, m.bias) for m in method.modulations(site(**kwargs))]


def test_reference_strength_is_a_log_weight_per_reference():
    first, second = slice(18, 24), slice(24, 36)
    assert biases(fr.ReferenceStrength(2)) == [(first, math.log(2)), (second, math.log(2))]
    assert biases(fr.ReferenceStrength([0, 0.5])) == [(first, -math.inf), (second, math.log(0.5))]
    assert biases(fr.ReferenceStrength(0.5, references=[1])) == [(second, math.log(0.5))]
    assert biases(fr.ReferenceStrength([1, Linear(1, 3)]), step=1, num_steps=3) == [(second, math.log(2))]


def test_reference_strength_acts_where_it_is_asked_to():
    method = fr.ReferenceStrength(PerStep([2, 1, 0]), layers=[1])
    found = [bool(method.modulations(site(layer=n, step=s, num_steps=3))) for n in range(2) for s in range(3)]
    assert found == [False, False, False, True, False, True]
    first = fr.ReferenceStrength(Linear(1, 2)).modulations(site(step=3))
    again = fr.ReferenceStrength(Linear(1, 2)).modulations(site(step=3, layer=4))
    assert first[0] is again[0]
    assert fr.ReferenceStrength(1).modulations(site(fr.TokenLayout(3, (2, 2)))) == []


@pytest.mark.parametrize(("arguments", "message"), [
    ((-1,), "ReferenceStrength.weight: expected a weight of at least 0, received -1"),
    (([1, -0.5],), "ReferenceStrength.weight: expected a weight of at least 0"),
    ((float("nan"),), "ReferenceStrength.weight"), (("2",), "ReferenceStrength.weight"), (([],), "weight: expected"),
    ((2, [0, 0]), "ReferenceStrength.references: expected distinct indices"), ((2, None, "all"), "layers"),
])  # fmt: skip
def test_mistakes_of_reference_strength_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fr.ReferenceStrength(*arguments)


@pytest.mark.parametrize(("method", "tokens", "message"), [
    (fr.ReferenceStrength(2), fr.TokenLayout(3, (2, 2)), "ReferenceStrength: expected a sequence with at least one"),
    (fr.ReferenceStrength(2, [2]), TOKENS, r"ReferenceStrength.references: expected references in \[0, 2\)"),
    (fr.ReferenceStrength([2]), TOKENS, "ReferenceStrength.weight: expected 2 values, one per reference, received 1"),
    (fr.ReferenceStrength(Linear(-1, 1)), TOKENS, "ReferenceStrength.weight: expected a weight of at least 0"),
])  # fmt: skip
def test_sites_that_do_not_fit_reference_strength(method, tokens, message):
    with pytest.raises(ValueError, match=message):
        method.modulations(site(tokens))
