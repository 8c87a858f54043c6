"""What a bound host costs, and how its projections reach the op."""

from __future__ import annotations

import types

import pytest
import torch
from masked_hosts import ALL, masked_call
from widening import widen

import fastrope as fr
from fastrope import device as devices
from fastrope.backends import fused

pytest.importorskip("diffusers")
from diffusers.models.normalization import RMSNorm
from diffusers_hosts import TINY_HOSTS, assert_same, grag_like, loose_like
from tiny_transformers import run

from fastrope.bindings.diffusers import processors


@ALL
def test_tensors_are_read_at_most_once_a_call(host, monkeypatch):
    """Ids and masks that came before are not read at all; fresh ones together, however many layers there are."""
    from fastrope.bindings.image import fingerprints

    reads, real = [], fingerprints._digests
    monkeypatch.setattr(fingerprints, "_digests", lambda tensors: reads.append(len(tensors)) or real(tensors))
    model, call = host.build().double(), host.call(host.layout)
    given = grag_like(host.layout)
    with fr.apply(model, types.SimpleNamespace(modulations=lambda site: given)):
        run(model, call)
        run(model, call)
        assert len(reads) <= 1
        reads.clear()
        run(model, {name: value.clone() if name.endswith("ids") else value for name, value in call.items()})
        assert reads == ([2] if "img_ids" in call else [])


@ALL
@pytest.mark.parametrize("rotation", ["op", "host"])
def test_half_precision_is_as_good_as_the_hosts(host, rotation):
    """The error of a modulated bfloat16 model, against float64 on the same weights, is that of the stock one."""
    low = host.build().to(torch.bfloat16)
    exact = host.build().double()
    exact.load_state_dict(low.state_dict())
    call = host.call(host.layout, dtype=torch.bfloat16)
    wide = {name: widen(value) for name, value in call.items()}
    mods = grag_like(host.layout) + loose_like(host.layout)
    stock = float((run(low, call).double() - run(exact, wide)).abs().max())
    with host.by_formulas(exact, host.attend(mods)):
        expected = run(exact, wide)
    with fr.apply(low, mods, rotation=rotation):
        error = float((run(low, call).double() - expected).abs().max())
    print(f"stock {stock:.3g}, modulated {error:.3g}")
    assert error < 2.5 * stock


# ---- from the projections to the op ----------------------------------------------------------------------------------


def watched(monkeypatch) -> list[bool]:
    """Whether each run of the kernels was handed streams."""
    calls, kernels = [], fused.run
    monkeypatch.setattr(
        fused, "run", lambda q, k, *rest: calls.append(not isinstance(k, torch.Tensor)) or kernels(q, k, *rest)
    )
    return calls


@pytest.mark.skipif(not devices.interpreted(), reason="runs the interpreted kernels")
@pytest.mark.parametrize(
    ("name", "masked"), [("flux", False), ("flux2", False), ("chroma", True), ("qwen", True), ("z-image", False)]
)
def test_the_fused_prologue_equals_the_steps_of_the_host(name, masked, monkeypatch):
    host = TINY_HOSTS[name]
    model, call = host.build().float(), masked_call(host)[0] if masked else host.call(host.layout)
    call = {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()}
    call = {k: [x.float() for x in v] if k in ("x", "cap_feats") else v for k, v in call.items()}
    mods = fr.At(grag_like(host.layout), layers={1, -1})  # on FLUX one of each kind
    with fr.apply(model, mods, backend="sdpa"):
        expected = run(model, call)
    calls = watched(monkeypatch)
    with fr.apply(model, mods, backend="triton"):
        assert_same(run(model, call), expected, 1e-4)
    assert calls == [True, True]


@pytest.mark.skipif(not devices.interpreted(), reason="runs the interpreted kernels")
@pytest.mark.parametrize("why", ["hooked", "not fused"])
def test_the_hosts_own_norms_are_called(why, monkeypatch):
    """Offloading and adapters hook modules, so that their weights alone do not say what they do; and where the prologue
    does not take a call (here in debug mode), the host's norms are as good."""
    host = TINY_HOSTS["z-image"]
    model, call = host.build().float(), host.call(host.layout, dtype=torch.float32)
    norm, seen = model.layers[1].attention.norm_k, []
    if why == "hooked":
        norm.register_forward_hook(lambda *_: seen.append(1))
    else:
        monkeypatch.setenv("FASTROPE_DEBUG", "1")
        forward = type(norm).forward
        monkeypatch.setattr(type(norm), "forward", lambda m, x: seen.extend([1] * (m is norm)) or forward(m, x))
    calls = watched(monkeypatch)
    with fr.apply(model, fr.At(grag_like(host.layout), layers=1), backend="triton"):
        run(model, call)
    assert calls == [False]
    assert seen == [1]


class Quantised(torch.Tensor):
    """Stands for tensors whose storage is not what they say."""


def quantised(norm):
    norm.weight = torch.nn.Parameter(norm.weight.detach().as_subclass(Quantised))
    return norm


@pytest.mark.parametrize(
    ("norm", "known"),
    [
        (torch.nn.RMSNorm(16, eps=1e-5), True),
        (torch.nn.RMSNorm(16, eps=1e-5, elementwise_affine=False), True),
        (RMSNorm(16, eps=1e-5), True),
        (torch.nn.RMSNorm(16), False),  # an eps that depends on the device
        (torch.nn.RMSNorm((2, 16), eps=1e-5, elementwise_affine=False), False),  # over all heads
        (RMSNorm(32, eps=1e-5), False),  # before heads are told apart
        (RMSNorm(16, eps=1e-5, bias=True), False),
        (quantised(torch.nn.RMSNorm(16, eps=1e-5)), False),
        (torch.nn.LayerNorm(16), False),
        (None, False),
    ],
)
def test_norms_the_prologue_knows(norm, known):
    x = torch.randn(1, 3, 2, 16)
    found = processors._as_norm(norm, x)
    assert (found is not None) == known
    if known:
        torch.testing.assert_close(found(x), norm(x))


@pytest.mark.skipif(not devices.interpreted(), reason="runs the interpreted kernels")
def test_queries_of_another_dtype_take_the_steps_of_the_host(monkeypatch):
    """An adapter that leaves queries wider than values: they are brought to one dtype first."""
    host = TINY_HOSTS["qwen"]
    model, call = host.build().half(), host.call(host.layout, dtype=torch.float16)
    for name, module in model.named_modules():
        if name.endswith(("to_q", "add_q_proj")):
            module.register_forward_hook(lambda module, args, out: out.float())
    outs, calls = [], watched(monkeypatch)
    for backend in ("sdpa", "triton"):
        with fr.apply(model, fr.At(grag_like(host.layout), layers=1), backend=backend):
            outs.append(run(model, call))
    assert_same(outs[1], outs[0], 1e-2)
    assert calls == [False]
