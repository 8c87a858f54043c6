"""Folded and split-off work goes to any plain attention, and nothing else runs for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from folding import MODULATIONS, a_call
from numerics import (
    Call,
    assert_close,
    axial,
    draw,
    generator,
    grid,
    key_masks,
    scales,
    skip_unless_runnable,
    tensors,
)

import fastrope as fr
from fastrope.backends import folded, lse_merge, sdpa
from fastrope.backends.plain import Plain
from fastrope.rope import rotate

REFERENCE = slice(20, 37)
LOOSE = {
    "scales": [fr.QueryScale(torch.where(torch.arange(37) < 9, 0.6, 1.0), REFERENCE)],
    "own scales": [fr.QueryScale(torch.where(torch.arange(37) < 12, 0.3 + torch.arange(37) / 20, 1.0), REFERENCE)],
    "gains": [fr.LogitGain(torch.where(torch.arange(37) < 9, 1.4, 1.0), REFERENCE)],
    "biases": [fr.LogitBias(torch.where(torch.arange(37) < 9, -torch.inf, 0.0), REFERENCE)],
}


class Spy:
    """A plain attention that keeps what it is given."""

    def __init__(self):
        self.seen = []

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert (attn_mask, dropout_p, is_causal, enable_gqa) == (None, 0.0, False, False)
        self.seen.append((query, key, value))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


class SpyWithLse(Spy):
    """The same, which can return its log-sum-exp."""

    returns_lse = True

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, return_lse=False):
        out = super().__call__(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return (out, (torch.einsum("bihd,bjhd->bhij", query, key) * scale).logsumexp(-1)) if return_lse else out


def held(call: Call, spy: Spy | str, **options) -> torch.Tensor:
    out = call.run("auto", False, plain=spy, **options)
    assert_close(out, call.exact()[0], call.low()[0], name=call.label)
    return out


@pytest.fixture
def alone(monkeypatch):
    """No other attention may run."""

    def refuse(*_, **__):
        raise AssertionError("another attention runs")

    for name in ("_fused", "log_sum_exp"):
        monkeypatch.setattr(sdpa, name, refuse)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("mask", [None, "row"])
@pytest.mark.parametrize("case", MODULATIONS)
def test_all_of_a_call_that_folds(case, mask, heads, alone):
    """One call of it, or one per batch row that has a key, on as many keys as that has."""
    call = a_call(modulations=MODULATIONS[case], heads=heads[0], key_heads=heads[1])
    call, spy = replace(call, key_mask=key_masks(generator(3), mask, 2, 37), label=case), Spy()
    held(call, spy)
    keys = [37] if mask is None else [int(call.key_mask[0].sum())]
    assert [k.shape[1] for _, k, _ in spy.seen] == keys


def test_grag_arrives_folded(alone):
    """The spy's queries, keys and values are the formula's."""
    call = a_call(
        torch.float64, modulations=lambda g: [fr.BiasDelta(1.3, 0.6, REFERENCE), fr.ValueGain(-0.5, REFERENCE)]
    )
    spy = Spy()
    held(call, spy)
    ((query, key, value),) = spy.seen
    khat = rotate(call.k, call.rope.angles, "interleaved")
    mu = khat[:, REFERENCE].mean(1, keepdim=True)
    khat[:, REFERENCE] = 1.3 * mu + 0.6 * (khat[:, REFERENCE] - mu)
    gained = call.v.clone()
    gained[:, REFERENCE] *= -0.5
    assert torch.allclose(query, rotate(call.q, call.rope.angles, "interleaved"), atol=1e-12)
    assert torch.allclose(key, khat, atol=1e-12)
    assert torch.equal(value, gained)


@pytest.mark.parametrize("mask", [None, "random"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", LOOSE)
def test_unmodulated_queries_of_a_call_that_splits(case, batch, mask):
    call, spy = a_call(batch=batch, modulations=lambda g: [*LOOSE[case], fr.BiasDelta(1.2, 0.7, REFERENCE)]), Spy()
    call = replace(call, key_mask=key_masks(generator(3), mask, batch, 37), label=case)
    held(call, spy)
    modulated = 12 if case == "own scales" else 9
    assert [q.shape[1] for q, _, _ in spy.seen] == [37 - modulated] * (1 if mask is None else batch)
    said = str(fr.explain(call.q, call.k, call.v, **call.tokens(), plain=spy))
    assert f"unmodulated queries: {37 - modulated}, through Spy" in said


def test_rows_with_scales_of_their_own_split_alike():
    r = scales(generator(2), "levels", 37, batch=2)
    r[:, 15:] = 1
    call, spy = a_call(modulations=lambda g: [fr.QueryScale(r, REFERENCE)]), Spy()
    held(call, spy)
    assert [q.shape[1] for q, _, _ in spy.seen] == [int((r == 1).all(0).sum())]


@pytest.mark.parametrize("modulations", [
    [fr.LogitBias(0.5, REFERENCE)], [fr.KeyBias(torch.linspace(-1, 1, 37))], [fr.LogitGain(torch.full((37,), 0.5))],
])  # fmt: skip
def test_what_neither_folds_nor_splits_hands_over_nothing(modulations):
    call, spy = a_call(modulations=lambda g: modulations), Spy()
    held(call, spy)
    call.run("auto", True, plain=spy)
    a_call().run("auto", True, plain=spy)  # a log-sum-exp
    assert not spy.seen


CONSTANT = {
    "a number": [fr.LogitBias(0.7, REFERENCE)],
    "two pictures, one hidden": [fr.LogitBias(0.5, slice(20, 30)), fr.LogitBias(-torch.inf, slice(30, 37))],
    "a number of each row": [fr.LogitBias(torch.tensor([[0.3], [-1.5]]).expand(2, 37), REFERENCE)],
    "beside what folds": [fr.LogitBias(0.7, REFERENCE), fr.BandWeight(torch.linspace(0.3, 1.2, 8), slice(9, 30)),
                          fr.BiasDelta(1.3, 0.6, slice(15, 30)), fr.ValueGain(-0.5, slice(3, 30))],
}  # fmt: skip


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("case", CONSTANT)
def test_biases_that_are_the_same_for_all_queries_weigh_runs_of_keys(case, heads, alone):
    call, spy = a_call(modulations=lambda g: CONSTANT[case], heads=heads[0], key_heads=heads[1]), SpyWithLse()
    held(replace(call, label=case), spy)
    assert [k.shape[1] for _, k, _ in spy.seen] == ([20, 10, 7] if case.startswith("two") else [20, 17])
    said = fr.explain(call.q, call.k, call.v, **call.tokens(), plain=spy)
    assert said.passes == len(spy.seen)
    assert "SpyWithLse" in said.reason
    spy.seen.clear()
    held(a_call(modulations=MODULATIONS["together"]), spy)  # no run needs a log-sum-exp
    assert len(spy.seen) == 1


@pytest.mark.parametrize("bias", [torch.tensor([[0.5], [-torch.inf]]).expand(2, 37), -torch.inf], ids=["a row", "all"])
def test_a_query_to_which_all_keys_are_hidden_gets_zeros(bias):
    spy = SpyWithLse()
    out = held(a_call(modulations=lambda g: [fr.LogitBias(bias)]), spy)
    assert len(spy.seen) == 1
    assert not out[1].any()


def test_a_plan_with_other_biases_folds_as_a_new_one():
    """Whether band weights are in the rotation of the keys, and queries set apart, depends on the biases."""
    band, varied = fr.BandWeight(torch.linspace(0.3, 1.2, 8), slice(9, 30)), torch.linspace(-1, 1, 37)
    call = a_call(modulations=lambda g: [fr.LogitBias(varied, REFERENCE), band])
    found = call.planned().with_biases([0.7])
    fresh = replace(call, modulations=[fr.LogitBias(0.7, REFERENCE), band]).planned()
    assert found.spec == fresh.spec
    assert all(map(torch.equal, found.tensors, fresh.tensors))
    few = replace(call, modulations=[fr.LogitBias(torch.where(torch.arange(37) < 30, 0.0, 2.0), REFERENCE)]).planned()
    assert few.lowered.unmodulated is not None
    neutral = few.with_biases([0.0]).lowered
    assert neutral.biases.constant
    assert not lse_merge.merges(neutral) or neutral.unmodulated is None


def test_diffusers_own_attention_is_not_asked_for_what_it_refuses():
    """It has the parameter return_lse, and raises where it is True."""
    dispatcher = pytest.importorskip("diffusers.models.attention_dispatch")
    call = a_call(modulations=lambda g: CONSTANT["a number"])
    held(call, dispatcher._native_attention)
    held(replace(call, modulations=[fr.BiasDelta(1.2, 0.7, REFERENCE)]), dispatcher._native_attention)


def test_runs_of_keys_behind_our_prologue():
    """As on a GPU: band weights are in the rotation of the keys."""
    pytest.importorskip("triton")
    skip_unless_runnable("triton")
    call, spy = a_call(modulations=lambda g: CONSTANT["beside what folds"]), SpyWithLse()
    lowered, scale = call.planned().lowered, 0.25
    call, merged = replace(call, scale=scale), lse_merge.by_runs(Plain.of(spy), lowered)
    prepares = folded.prepares(call.q, call.k, call.v, lowered)
    out = folded.run(call.q, call.k, call.v, lowered, scale, prepares, plain=merged)
    assert_close(out, call.exact()[0], call.low()[0])


def test_other_numbers_in_the_biases_of_a_plan():
    call, spy = a_call(modulations=lambda g: CONSTANT["a number"]), SpyWithLse()
    plan = call.planned()
    for bias, runs in ((0.2, 2), (torch.linspace(-1, 1, 37), 0), (0.2, 2)):
        plan = plan.with_biases([bias])
        given = replace(call, modulations=[fr.LogitBias(bias, REFERENCE)])
        spy.seen.clear()
        assert_close(fr.attention(call.q, call.k, call.v, plan=plan, plain=spy), given.exact()[0], given.low()[0])
        assert len(spy.seen) == runs
        assert fr.planning.Lowered.unflatten(plan.tensors, plan.spec).biases.constant == (runs > 0)


@pytest.mark.parametrize("case", ["of queries", "a mask", "too many", "a gradient"])
def test_biases_that_do_not_weigh_runs_stay_with_us(case):
    biases = {"of queries": [fr.LogitBias(torch.linspace(-1, 1, 37), REFERENCE)],
              "too many": [fr.LogitBias(n / 9, slice(n, n + 1)) for n in range(1, 10)]}  # fmt: skip
    call, spy = a_call(modulations=lambda g: biases.get(case, CONSTANT["a number"])), SpyWithLse()
    if case == "a mask":
        call = replace(call, key_mask=key_masks(generator(3), "random", 2, 37))
    if case == "a gradient":
        call = replace(call, q=call.q.clone().requires_grad_())
    held(call, spy)
    assert not spy.seen


@pytest.mark.parametrize("name", ["native", "math"])
def test_torchs_own_by_name(name):
    call = a_call(modulations=MODULATIONS["together"], heads=4, key_heads=2)
    held(call, name)
    said = fr.explain(call.q, call.k, call.v, **call.tokens(), plain=name)
    assert said.backend == "sdpa"
    assert f"torch's {name} attention" in said.reason


def test_gradients_go_through_it():
    call, found = a_call(torch.float64, modulations=lambda g: [*LOOSE["gains"], fr.ValueGain(-0.5, REFERENCE)]), []
    for options in ({"plain": Spy()}, {"backend": "eager"}):
        inputs = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
        out = fr.attention(*inputs, **call.tokens(), **options)
        found.append(torch.autograd.grad(out.square().sum(), inputs))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_joint_attention_hands_over_too():
    g, spy = generator(4), Spy()
    q, k, v = tensors(g, queries=30, dim=16)
    plan = fr.plan(rope=axial(grid(30, 4), 16), modulations=[fr.BiasDelta(1.2, 0.7, slice(9, 20))])
    norm = fr.Norm(1 + 0.1 * draw(g, 16), 1e-6)
    streams = [fr.Stream(q[:, s], k[:, s], v[:, s], norm, norm) for s in (slice(0, 4), slice(4, None))]
    out = fr.joint_attention(streams, plan=plan, plain=spy)
    assert len(spy.seen) == 1
    assert_close(out, fr.attention(norm(q).double(), norm(k).double(), v.double(), plan=plan, backend="eager"),
                 fr.attention(norm(q), norm(k), v, plan=plan, backend="eager"))  # fmt: skip


@pytest.mark.parametrize(("options", "name"), [
    ({"plain": "fastest"}, "plain"), ({"plain": 3}, "plain"),
    ({"plain": lambda query, key, value, **_: key[:, :1]}, "plain"),
    ({"plain": lambda query, key, value, **_: query.double()}, "plain"),
    ({"plain": Plain("one", lambda query, *_, **options: query, True), "modulations": [fr.LogitBias(1.0)]}, "plain"),
    ({"plain": Plain("two", lambda query, *_, **options: (query, query), True), "modulations": [fr.LogitBias(1.0)]},
     "plain"),
    ({"plain": "math", "backend": "eager"}, "backend"), ({"plain": Spy(), "backend": "triton"}, "backend"),
])  # fmt: skip
def test_what_is_refused(options, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .* received"):
        fr.attention(*tensors(generator(1), queries=5, dim=16), **options)


# ---- torch's own signature -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("gqa", [False, True])
def test_torchs_function_with_our_keywords(gqa, mask):
    """Without modulations it is torch's, heads before tokens; with them it is ours."""
    call = a_call(heads=4, key_heads=2 if gqa else 4)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    rows = {"bool": torch.arange(37)[None, None, None] < torch.tensor([30, 11])[:, None, None, None],
            "float": torch.linspace(-2, 1, 37)[None], None: None}[mask]  # fmt: skip
    arguments = {"attn_mask": rows, "scale": 0.3, "enable_gqa": gqa}
    expected = F.scaled_dot_product_attention(q, k, v, **arguments)
    assert torch.allclose(fr.scaled_dot_product_attention(q, k, v, **arguments), expected, atol=1e-5)
    gain, spy = [fr.ValueGain(-1.0)], Spy()
    out, lse = fr.scaled_dot_product_attention(q, k, v, **arguments, modulations=gain, return_lse=True)
    assert torch.allclose(out, -expected, atol=1e-5)
    assert lse.shape == (2, 4, 37)
    fr.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, modulations=gain, plain=spy)
    assert torch.equal(spy.seen[0][2], -call.v)


@pytest.mark.parametrize(("given", "error", "name"), [
    ({"dropout_p": 0.1}, NotImplementedError, "dropout_p"), ({"is_causal": True}, NotImplementedError, "is_causal"),
    ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, NotImplementedError, "attn_mask.*LogitBias"),
    ({"attn_mask": torch.ones(2, 5, 1, 5)}, NotImplementedError, "attn_mask"),
    ({"attn_mask": torch.ones(1, 5, dtype=torch.bool), "plan": fr.plan()}, ValueError, "plan"),
    ({"attn_mask": torch.ones(1, 4)}, ValueError, "KeyBias"), ({"attn_mask": [True]}, ValueError, "attn_mask"),
    ({"enable_gqa": False}, ValueError, "key.*enable_gqa"), ({"query": torch.ones(5, 16)}, ValueError, "query"),
])  # fmt: skip
def test_what_torchs_function_refuses(given, error, name):
    q, k, v = (x.transpose(1, 2) for x in tensors(generator(1), queries=5, heads=4, key_heads=2, dim=16))
    with pytest.raises(error, match=name):
        fr.scaled_dot_product_attention(**{"query": q, "key": k, "value": v, "enable_gqa": True, **given})
