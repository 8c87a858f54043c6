"""Bad input: every wrong argument raises, and the message names it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from numerics import (
    DEVICE,
    axial,
    draw,
    generator,
    grid,
    uniform,
)
from small_calls import BATCH, PAIRS, TOKENS, good, modulated, ones

import fastrope as fr
from fastrope import device as devices

BACKENDS = ("auto", "eager", "sdpa", "triton")
META = torch.device("meta")


def random(*shape: int) -> torch.Tensor:
    return draw(generator(1), *shape)


def half_rope(**changes) -> fr.RoPE:
    return fr.RoPE(**{"angles": ones(TOKENS, PAIRS), "axis": torch.zeros(PAIRS, dtype=torch.int64), **changes})


# name: (changes to a good call, the argument its message names); values are made late, since constructors raise too
BAD = {
    "q is no tensor": (lambda: {"q": [1.0]}, "q"),
    "q has three dimensions": (lambda: {"q": random(2, 12, 16)}, "q"),
    "q is empty": (lambda: {"q": random(2, 0, 4, 16)}, "q"),
    "q is integer": (lambda: {"q": torch.ones(2, 12, 4, 16, dtype=torch.int64, device=DEVICE)}, "q"),
    "k is no tensor": (lambda: {"k": None}, "k"),
    "v has two dimensions": (lambda: {"v": random(12, 16)}, "v"),
    "k has no keys": (lambda: {"k": random(2, 0, 2, 16), "v": random(2, 0, 2, 16)}, "k"),
    "k of another dtype": (lambda: {"k": random(2, 12, 2, 16).half()}, "k"),
    "v of another dtype": (lambda: {"v": random(2, 12, 2, 16).double()}, "v"),
    "k of another batch": (lambda: {"k": random(3, 12, 2, 16), "v": random(3, 12, 2, 16)}, "k"),
    "k of another head dim": (lambda: {"k": random(2, 12, 2, 32), "v": random(2, 12, 2, 32)}, "k"),
    "v of another length": (lambda: {"v": random(2, 11, 2, 16)}, "v"),
    "heads that do not divide": (lambda: {"k": random(2, 12, 3, 16), "v": random(2, 12, 3, 16)}, "k"),
    "odd head dim": (lambda: {n: random(2, 12, 4, 17) for n in "qkv"}, "q"),
    "head dim too large": (lambda: {n: random(2, 12, 4, 512) for n in "qkv"}, "q"),
    "head dim unlike the rope": (lambda: {n: random(2, 12, 4, 32) for n in "qkv"}, "q"),
    "k on another device": (lambda: {"k": random(2, 12, 2, 16).to(META)}, "k"),
    "v on another device": (lambda: {"v": random(2, 12, 2, 16).to(META)}, "v"),
    "rope on another device": (lambda: {"rope": half_rope(angles=ones(TOKENS, PAIRS, device=META))}, r"rope\.angles"),
    "rope of another length": (lambda: {"rope": axial(grid(11), 16)}, r"rope\.angles"),
    "rope is a tensor": (lambda: {"rope": ones(TOKENS, PAIRS)}, "rope"),
    "rope of another batch": (lambda: {"rope": half_rope(angles=ones(3, TOKENS, PAIRS))}, "batch"),
    "key_rope without rope": (lambda: {"rope": None, "key_rope": axial(grid(12), 16)}, "rope"),
    "key_rope of another length": (lambda: {"key_rope": axial(grid(13), 16)}, r"key_rope\.angles"),
    "key_rope of another pairing": (lambda: {"key_rope": axial(grid(12), 16, "half")}, r"key_rope\.pairing"),
    "key_rope of other pairs": (lambda: {"key_rope": axial(grid(12), 32)}, r"key_rope\.angles"),
    "key_rope of other axes": (lambda: {"key_rope": fr.RoPE.axial(grid(12), (8, 4, 4))}, r"key_rope\.axis"),
    "key_rope on another device": (
        lambda: {"key_rope": half_rope(angles=ones(TOKENS, PAIRS, device=META), axis=None)}, r"key_rope\.angles"),
    "mask of floats": (lambda: {"key_mask": ones(2, 12)}, "key_mask"),
    "mask of one dimension": (lambda: {"key_mask": ones(12, dtype=torch.bool)}, "key_mask"),
    "mask of another length": (lambda: {"key_mask": ones(2, 13, dtype=torch.bool)}, "key_mask"),
    "mask of another batch": (lambda: {"key_mask": ones(3, 12) > ones(12).cumsum(0) - 8}, "batch"),
    "mask is a list": (lambda: {"key_mask": [True] * 12}, "key_mask"),
    "scale is not a number": (lambda: {"scale": float("nan")}, "scale"),
    "scale is infinite": (lambda: {"scale": float("inf")}, "scale"),
    "no such backend": (lambda: {"backend": "cuda"}, "backend"),
    "modulations of another kind": (lambda: {"modulations": ["QueryScale"]}, "modulations"),
    "modulation is a class": (lambda: {"modulations": [fr.LogitGain]}, "modulations"),
    "method for a modulation": (lambda: {"modulations": [fr.GRAG()]}, "modulations: .*bound by fastrope.apply"),
    "heads before tokens": (lambda: {n: random(2, 4, 12, 16) for n in "qkv"}, r"rope\.angles: .*dim 1 of q"),
    # RoPE
    "angles of integers": (lambda: {"rope": half_rope(angles=ones(TOKENS, PAIRS).long())}, r"RoPE\.angles"),
    "angles of half precision": (lambda: {"rope": half_rope(angles=ones(TOKENS, PAIRS).half())}, r"RoPE\.angles"),
    "angles of one dimension": (lambda: {"rope": half_rope(angles=ones(PAIRS))}, r"RoPE\.angles"),
    "axis of floats": (lambda: {"rope": half_rope(axis=ones(PAIRS))}, r"RoPE\.axis"),
    "axis of another length": (lambda: {"rope": half_rope(axis=ones(PAIRS + 1).long())}, r"RoPE\.axis"),
    "pairing unknown": (lambda: {"rope": half_rope(pairing="llama")}, r"RoPE\.pairing"),
    "applied is a number": (lambda: {"rope": half_rope(applied=1)}, r"RoPE\.applied"),
    "positions of bfloat16": (lambda: {"rope": axial(grid(12).bfloat16(), 16)}, "positions"),
    "positions of one dimension": (lambda: {"rope": axial(torch.arange(12), 16)}, "positions"),
    "axes_dim for other axes": (lambda: {"rope": fr.RoPE.axial(grid(12), (8, 8))}, "axes_dim"),
    "axes_dim odd": (lambda: {"rope": fr.RoPE.axial(grid(12), (5, 5, 6))}, "axes_dim"),
    "theta negative": (lambda: {"rope": fr.RoPE.axial(grid(12), (4, 6, 6), theta=-1.0)}, "theta"),
    # QueryScale
    "scale of another length": (lambda: {"modulations": [fr.QueryScale(ones(11))]}, r"QueryScale\.scale"),
    "scale of three dimensions": (lambda: {"modulations": [fr.QueryScale(ones(1, 2, 12))]}, r"QueryScale\.scale"),
    "scale of integers": (lambda: {"modulations": [fr.QueryScale(ones(12).long())]}, r"QueryScale\.scale"),
    "scale is a list": (lambda: {"modulations": [fr.QueryScale([1.0] * 12)]}, r"QueryScale\.scale"),
    "scale of another batch": (lambda: {"modulations": [fr.QueryScale(uniform(generator(1), 3, 12))]}, "batch"),
    "scale holds NaN": (lambda: {"modulations": [fr.QueryScale(ones(12) * torch.nan)]}, r"QueryScale\.scale"),
    "scale on another device": (lambda: {"modulations": [fr.QueryScale(ones(12, device=META))]}, r"QueryScale\.scale"),
    "scale without rope": (lambda: {"rope": None, "modulations": [fr.QueryScale(ones(12))]}, "rope"),
    "two scales": (lambda: {"modulations": [fr.QueryScale(ones(12))] * 2}, "QueryScale"),
    "axes unknown": (lambda: {"modulations": [fr.QueryScale(ones(12), axes=(3,))]}, r"QueryScale\.axes"),
    "axes twice": (lambda: {"modulations": [fr.QueryScale(ones(12), axes=(1, 1))]}, r"QueryScale\.axes"),
    "axes negative": (lambda: {"modulations": [fr.QueryScale(ones(12), axes=(-1,))]}, r"QueryScale\.axes"),
    "axes empty": (lambda: {"modulations": [fr.QueryScale(ones(12), axes=())]}, r"QueryScale\.axes"),
    "axes is a number": (lambda: {"modulations": [fr.QueryScale(ones(12), axes=1)]}, r"QueryScale\.axes"),
    "axes of a rope without": (
        lambda: {"rope": half_rope(axis=None), "modulations": [fr.QueryScale(ones(12), axes=(1,))]}, r"rope\.axis"),
    "scale requires grad": (
        lambda: {"modulations": [fr.QueryScale(ones(12).requires_grad_())]}, r"QueryScale\.scale.*require grad"),
    # BandWeight
    "weight of another length": (lambda: {"modulations": [fr.BandWeight(ones(16))]}, r"BandWeight\.weight"),
    "weight of two dimensions": (lambda: {"modulations": [fr.BandWeight(ones(1, 8))]}, r"BandWeight\.weight"),
    "weight without rope": (lambda: {"rope": None, "modulations": [fr.BandWeight(ones(8))]}, "rope"),
    "weight holds infinity": (lambda: {"modulations": [fr.BandWeight(ones(8) / 0)]}, r"BandWeight\.weight"),
    "weight on another device": (lambda: {"modulations": [fr.BandWeight(ones(8, device=META))]}, r"BandWeight\.weight"),
    # BiasDelta
    "bias is a string": (lambda: {"modulations": [fr.BiasDelta("1")]}, r"BiasDelta\.bias"),
    "bias is a truth": (lambda: {"modulations": [fr.BiasDelta(True)]}, r"BiasDelta\.bias"),
    "bias holds NaN": (lambda: {"modulations": [fr.BiasDelta(float("nan"))]}, r"BiasDelta\.bias"),
    "delta of two dimensions": (lambda: {"modulations": [fr.BiasDelta(1.0, ones(2, 1))]}, r"BiasDelta\.delta"),
    "delta of another batch": (lambda: {"modulations": [fr.BiasDelta(1.0, 2 * ones(3))]}, "batch|BiasDelta"),
    "delta of another batch, then one of one": (
        lambda: {"modulations": [fr.BiasDelta(1.0, 2 * ones(3), slice(0, 3)), fr.BiasDelta(2.0, 1.0, slice(3, 5))]},
        "batch|BiasDelta"),
    "bias and delta of two batches": (
        lambda: {"modulations": [fr.BiasDelta(2 * ones(3), 2 * ones(2))]}, "BiasDelta"),
    "delta on another device": (
        lambda: {"modulations": [fr.BiasDelta(1.0, ones(2, device=META))]}, r"BiasDelta\.delta"),
    "groups overlap": (
        lambda: {"modulations": [fr.BiasDelta(2.0, keys=slice(0, 3)), fr.BiasDelta(2.0, keys=slice(2, 4))]},
        r"BiasDelta\.keys"),
    # LogitGain
    "gain of another length": (lambda: {"modulations": [fr.LogitGain(ones(13))]}, r"LogitGain\.gain"),
    "gain of another batch": (lambda: {"modulations": [fr.LogitGain(2 * ones(3, 12))]}, "batch"),
    "gains of two batches": (
        lambda: {"modulations": [fr.LogitGain(2 * ones(3, 12)), fr.LogitGain(2 * ones(1, 12))]}, "batch"),
    "gain holds NaN": (lambda: {"modulations": [fr.LogitGain(ones(12) * torch.nan)]}, r"LogitGain\.gain"),
    # LogitBias, KeyBias, ValueGain, BiasDelta on values
    "bias of another length": (lambda: {"modulations": [fr.LogitBias(ones(13))]}, r"LogitBias\.bias"),
    "bias of one query of many": (lambda: {"modulations": [fr.LogitBias(ones(12)), fr.LogitBias(ones(2, 11))]},
                                  r"LogitBias\.bias"),
    "bias of another batch": (lambda: {"modulations": [fr.LogitBias(ones(3, 1))]}, "batch"),
    "biases of two batches": (
        lambda: {"modulations": [fr.KeyBias(ones(3, 12)), fr.ValueGain(2 * ones(2, 12))]}, "batch"),
    "bias of three dimensions": (lambda: {"modulations": [fr.LogitBias(ones(1, 1, 12))]}, r"LogitBias\.bias"),
    "bias of infinity": (lambda: {"modulations": [fr.LogitBias(float("inf"))]}, r"LogitBias\.bias"),
    "bias is NaN": (lambda: {"modulations": [fr.LogitBias(float("nan"))]}, r"LogitBias\.bias"),
    "bias holds infinity": (lambda: {"modulations": [fr.LogitBias(ones(12) / 0)]}, r"LogitBias\.bias.*hides"),
    "bias of integers": (lambda: {"modulations": [fr.LogitBias(ones(12).long())]}, r"LogitBias\.bias"),
    "bias is a list": (lambda: {"modulations": [fr.LogitBias([0.5] * 12)]}, r"LogitBias\.bias"),
    "bias requires grad": (
        lambda: {"modulations": [fr.LogitBias(ones(12).requires_grad_())]}, r"LogitBias\.bias.*require grad"),
    "key bias is a number": (lambda: {"modulations": [fr.KeyBias(0.5)]}, r"KeyBias\.bias"),
    "key bias of another length": (lambda: {"modulations": [fr.KeyBias(ones(13))]}, r"KeyBias\.bias"),
    "key bias holds NaN": (lambda: {"modulations": [fr.KeyBias(ones(12) * torch.nan)]}, r"KeyBias\.bias"),
    "key bias on another device": (lambda: {"modulations": [fr.KeyBias(ones(12, device=META))]}, r"KeyBias\.bias"),
    "value gain of another length": (lambda: {"modulations": [fr.ValueGain(2 * ones(1, 5), slice(4))]},
                                     r"ValueGain\.gain"),
    "value gain of too many rows": (lambda: {"modulations": [fr.ValueGain(2 * ones(5), slice(4))]}, "batch"),
    "value gain holds infinity": (lambda: {"modulations": [fr.ValueGain(-float("inf"))]}, r"ValueGain\.gain"),
    "value gain is a truth": (lambda: {"modulations": [fr.ValueGain(True)]}, r"ValueGain\.gain"),
    "value gains of one key": (
        lambda: {"modulations": [fr.ValueGain(2 * ones(2), torch.tensor([3, 3]))]}, r"ValueGain\.keys.*once"),
    "no such side": (lambda: {"modulations": [fr.BiasDelta(2.0, on="logits")]}, r"BiasDelta\.on"),
    "groups of values overlap": (
        lambda: {"modulations": [fr.BiasDelta(2.0, keys=slice(0, 3), on="values"),
                                 fr.BiasDelta(1.0, keys=slice(2, 4), on="values")]}, r"BiasDelta\.keys.*of values"),
    # key sets
    "keys is a list": (lambda: {"modulations": [fr.BiasDelta(keys=[1, 2])]}, r"BiasDelta\.keys"),
    "keys of floats": (lambda: {"modulations": [fr.BiasDelta(keys=ones(12))]}, r"BiasDelta\.keys"),
    "keys of two dimensions": (lambda: {"modulations": [fr.BiasDelta(keys=ones(2, 12) > 0)]}, r"BiasDelta\.keys"),
    "keys mask of another length": (lambda: {"modulations": [fr.BiasDelta(keys=ones(11) > 0)]}, r"BiasDelta\.keys"),
    "keys out of range": (lambda: {"modulations": [fr.BiasDelta(keys=torch.tensor([3, 12]))]}, r"BiasDelta\.keys"),
    "keys negative": (lambda: {"modulations": [fr.BiasDelta(keys=torch.tensor([-1]))]}, r"BiasDelta\.keys"),
    "keys beyond": (lambda: {"modulations": [fr.BiasDelta(keys=slice(0, 13))]}, r"BiasDelta\.keys"),
    "keys before": (lambda: {"modulations": [fr.BiasDelta(keys=slice(-13, None))]}, r"BiasDelta\.keys"),
    "keys up to half a key": (lambda: {"modulations": [fr.BiasDelta(keys=slice(0, 2.5))]}, r"BiasDelta\.keys"),
    "keys up to a float tensor": (
        lambda: {"modulations": [fr.BiasDelta(keys=slice(0, torch.tensor(3.0)))]}, r"BiasDelta\.keys"),
    "keys up to several": (
        lambda: {"modulations": [fr.BiasDelta(keys=slice(0, torch.tensor([3, 4])))]}, r"BiasDelta\.keys"),
    "keys up to a truth": (
        lambda: {"modulations": [fr.BiasDelta(keys=slice(0, torch.tensor(True)))]}, r"BiasDelta\.keys"),
    "keys is a range": (lambda: {"modulations": [fr.BiasDelta(keys=range(3))]}, r"BiasDelta\.keys"),
    "keys backwards": (lambda: {"modulations": [fr.BiasDelta(keys=slice(None, None, -1))]}, r"BiasDelta\.keys"),
    "no key in a slice": (lambda: {"modulations": [fr.BiasDelta(keys=slice(4, 4))]}, r"BiasDelta\.keys"),
    "no key in a mask": (lambda: {"modulations": [fr.BiasDelta(keys=ones(12) < 0)]}, r"BiasDelta\.keys"),
    "no index": (lambda: {"modulations": [fr.BiasDelta(keys=torch.tensor([], dtype=torch.int64))]}, r"BiasDelta\.keys"),
    # plans
    "plan of another kind": (lambda: {"rope": None, "plan": {}}, "plan"),
    "plan and rope": (lambda: {"plan": fr.plan(rope=good()["rope"])}, "plan"),
    "plan and modulations": (lambda: {"rope": None, "plan": fr.plan(), "modulations": [fr.BiasDelta(2.0)]}, "plan"),
    "plan and mask": (lambda: {"rope": None, "plan": fr.plan(), "key_mask": ones(2, 12) > 0}, "plan"),
    "plan of another length": (lambda: {"rope": None, "plan": fr.plan(rope=axial(grid(13), 16))}, "plan"),
    "plan of another head dim": (lambda: {"rope": None, "plan": fr.plan(rope=axial(grid(12), 32))}, "q"),
    "plan of another batch": (
        lambda: {"rope": None, "plan": fr.plan(modulations=[fr.BiasDelta(1.0, 2 * ones(3))], num_keys=12)}, "plan"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    changes, argument = BAD[name]
    with pytest.raises(ValueError, match=argument) as caught:
        fr.attention(**{**good(), **changes()})
    message = str(caught.value)
    assert "expected" in message, message
    assert "received" in message, message


@pytest.mark.parametrize("name", BAD)
def test_explain_refuses_what_attention_refuses(name):
    changes, argument = BAD[name]
    with pytest.raises(ValueError, match=argument):
        fr.explain(**{**good(), **changes()})


def test_a_plan_wants_a_list_as_a_call_does():
    for function in (fr.plan, lambda modulations: fr.attention(**good(), modulations=modulations)):
        with pytest.raises(
            ValueError, match="modulations: expected a list or tuple of modulations, received BiasDelta"
        ):
            function(modulations=fr.BiasDelta(2.0))


def test_the_good_call_is_good():
    for backend in ("auto", "eager", "sdpa"):
        assert fr.attention(**good(), backend=backend).shape == (BATCH, TOKENS, 4, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_explicit_backend_still_validates(backend):
    with pytest.raises(ValueError, match=r"LogitGain\.gain"):
        fr.attention(**good(), modulations=[fr.LogitGain(ones(13))], backend=backend)


def test_errors_survive_optimised_python():
    """``python -O`` strips asserts, so no check may be one."""
    code = "import torch, fastrope as f; q = torch.ones(1, 4, 3, 16); f.attention(q, q[:, :, :2], q[:, :, :2])"
    found = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: k: expected a number of heads that divides H = 3, received 2" in found.stderr


def test_triton_is_forward_only():
    call = good()
    call["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match=r'backend="triton" is forward only.*requires_grad=True'):
        fr.attention(**call, backend="triton")
    assert fr.explain(**call).backend == "sdpa"
    with torch.no_grad():
        assert fr.explain(**call, backend="triton" if DEVICE == "cuda" else "auto").backend


@pytest.mark.skipif(not devices.interpreted(), reason="speaks of the interpreter")
def test_the_interpreter_refuses_bfloat16():
    call = {n: x.bfloat16() if n in "qkv" else x for n, x in good().items()}
    with pytest.raises(NotImplementedError, match="interpreter computes bfloat16 wrongly"):
        fr.attention(**call, backend="triton")


def test_triton_refuses_float64():
    call = {n: x.double() if n in "qkv" else x for n, x in good().items()}
    with pytest.raises(NotImplementedError, match="float64"):
        fr.attention(**call, backend="triton")


def test_without_the_interpreter_a_cpu_call_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    call = {n: x.cpu() if n in "qkv" else x for n, x in good().items() if n != "rope"}
    with pytest.raises(NotImplementedError, match=r"no kernel for device cpu|triton is not installed"):
        fr.attention(**call, backend="triton")


def test_lengths_nothing_tells():
    with pytest.raises(ValueError, match="num_keys"):
        fr.plan(modulations=[fr.BiasDelta(2.0)])
    assert fr.plan(modulations=[fr.BiasDelta(2.0)], num_keys=4).lowered.num_keys == 4


# ---- debug mode and explanations -------------------------------------------------------------------------------------


def test_explain_says_what_runs():
    call, mods = good(), modulated()
    found = fr.explain(**call, modulations=[*mods["modulations"], fr.LogitGain(ones(TOKENS))])
    assert found.backend == ("sdpa" if DEVICE == "cpu" else "triton")
    assert found.dropped == 1
    assert [(s.start, s.stop) for s in found.segments] == [(0, 4), (4, 12)]
    assert len(found.scale_buckets) == len(mods["modulations"][0].scale.unique()) - 1
    for part in ("backend: ", "not eager", "segments of keys", "QueryScale", "scale buckets: 1", "dropped: 1"):
        assert part in str(found)


def test_auto_equals_the_backend_it_names():
    call, mods = good(), modulated()
    name = fr.explain(**call, **mods).backend
    assert torch.equal(fr.attention(**call, **mods), fr.attention(**call, **mods, backend=name))


def test_contiguous_output_in_the_dtype_of_q():
    call = good()
    transposed = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in call.items() if n in "qkv"}
    assert fr.attention(**{**call, **transposed}).is_contiguous()


def test_importing_costs_nothing_heavy():
    code = "import sys, fastrope; print([m for m in ('triton', 'diffusers', 'transformers') if m in sys.modules])"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == "[]"
