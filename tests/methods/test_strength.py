"""ReferenceStrength, PromptWeights and Temperature: the modulations they make, their errors."""

from __future__ import annotations

import math

import pytest
import torch

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


def test_prompt_weights_are_a_bias_or_a_gain_per_text_token():
    for weights in (torch.tensor([2.0, 1.0, 0.0]), [2, 1, 0], {0: 2, 2: 0.0}):
        (on_logits,) = fr.PromptWeights(weights).modulations(site())
        expected = torch.zeros(36, dtype=torch.float64)
        expected[0], expected[2] = math.log(2), -math.inf
        torch.testing.assert_close(on_logits.bias, expected)
        (on_values,) = fr.PromptWeights(weights, on="values").modulations(site())
        assert (on_values.keys, on_values.gain.tolist()) == (slice(0, 3), [2, 1, 0])
    last = fr.TokenLayout(3, (2, 2), [(2, 2)], order="text-last")
    (on_logits,) = fr.PromptWeights({1: 3}).modulations(site(last))
    assert on_logits.bias.nonzero().tolist() == [[9]]
    (on_values,) = fr.PromptWeights({1: -1}, on="values").modulations(site(last))
    assert (on_values.keys, on_values.gain.tolist()) == (slice(8, 11), [1, -1, 1])


def test_prompt_weights_act_where_they_are_asked_to():
    method = fr.PromptWeights([2, 1, 1], layers=[1], text_tokens=3)
    assert [len(method.modulations(site(layer=n))) for n in range(2)] == [0, 1]
    assert method.modulations(site(fr.TokenLayout(4, (2, 2)), layer=1)) == []
    assert method.modulations(site(layer=1, step=1))[0] is method.modulations(site(layer=1))[0]
    for on in ("logits", "values"):
        assert fr.PromptWeights([1, 1, 1], on).modulations(site()) == []


def test_prompt_weights_of_words(tokenizer):
    """<s> a red boat , a red ##dish sun: ``red`` is a word in one of its two places."""
    prompt = "a red boat, a reddish sun"

    def weights(words, **options):
        return dict(fr.PromptWeights.of_words(tokenizer, prompt, words, **options).weights)

    assert weights({"red": 1.4}) == {2: 1.4}
    assert weights({"reddish": 0.5, "red boat": 2}) == {6: 0.5, 7: 0.5, 2: 2, 3: 2}
    assert weights({"a": -1}, start=10, on="values") == {11: -1, 15: -1}
    for words, message in (
        ({"blue": 2}, "words: expected words of the prompt 'a red boat, a reddish sun', received 'blue'"),
        ({"red": 2, "red boat": 3}, "words: expected words that share no token"), ({}, "words"), ({"": 2}, "words"),
        ({"red": -1}, "expected a weight of at least 0 on logits"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            weights(words)
    with pytest.raises(ValueError, match="tokenizer: expected a fast tokenizer"):
        fr.PromptWeights.of_words(str.split, prompt, {"red": 2})


@pytest.mark.parametrize(("arguments", "message"), [
    (([],), "PromptWeights.weights"), (("red",), "PromptWeights.weights"), ((torch.ones(1, 3),), "weights: expected"),
    (([1, -1],), r"weights\[1\]: expected a weight of at least 0 on logits"), (([1, "x"],), r"weights\[1\]"),
    (({-1: 2},), "weights: expected indices"), (([2], "keys"), "PromptWeights.on"), (([2], "values", 0), "text_tokens"),
])  # fmt: skip
def test_mistakes_of_prompt_weights_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fr.PromptWeights(*arguments)
    for weights in ([2, 1], [2, 1, 1, 1], {3: 2}):
        with pytest.raises(ValueError, match=r"^PromptWeights.weights: expected (3 weights|indices below 3)"):
            fr.PromptWeights(weights).modulations(site())


def test_temperature_grows_with_the_logarithm_of_the_tokens():
    for trained in ((2, 4), 8, [2, 4]):
        (found,) = fr.Temperature(trained).modulations(site(fr.TokenLayout(3, (8, 8), [(2, 3)])))
        assert found.keys == slice(None)
        torch.testing.assert_close(found.weight, torch.full((8,), math.sqrt(2), dtype=torch.float64))  # log 64 / log 8
        assert fr.Temperature(trained).modulations(site(fr.TokenLayout(3, (4, 2), [(9, 9)]))) == []
    method = fr.Temperature(4, layers=[1])
    first, again = (method.modulations(site(layer=n)) for n in (0, 1))
    assert (first, len(again)) == ([], 1)
    assert again[0] is fr.Temperature((2, 2)).modulations(site(layer=3))[0]
    for wrong in (1, (1, 1), (2, 2, 2), "64", 2.5, True):
        with pytest.raises(ValueError, match="Temperature.trained"):
            fr.Temperature(wrong)


def test_temperature_multiplies_all_logits_and_folds():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, len(TOKENS), 2, 16, generator=g, dtype=torch.float64)
    arguments = dict(rope=fr.RoPE.axial(TOKENS.positions("flux"), axes_dim=(4, 6, 6)))
    found = fr.Temperature(4).modulations(site())
    out = fr.attention(q, k, v, modulations=found, backend="sdpa", **arguments)
    factor = math.sqrt(math.log(15) / math.log(4))
    torch.testing.assert_close(out, fr.attention(q, k, v, scale=factor / 4, backend="eager", **arguments))
