"""What else users do to a model while a handle is bound: LoRA, fused projections, offload, backends, saving."""

from __future__ import annotations

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS, assert_differ, assert_same, grag_like, loose_like
from tiny_pipelines import flux_generate, flux_pipeline
from tiny_transformers import run

ALL = pytest.mark.parametrize("host", TINY_HOSTS.values(), ids=TINY_HOSTS)


def mods_of(host) -> list:
    return grag_like(host.layout) + loose_like(host.layout)


@ALL
def test_fused_projections(host):
    """Fused and separated again while bound; FLUX.2's single blocks always are, Qwen-Image and Z-Image never."""
    model, call = host.build().double(), host.call(host.layout)
    with host.by_formulas(model, host.attend(mods_of(host))):
        expected = run(model, call)
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip("the host cannot fuse projections")
    with fr.apply(model, mods_of(host)):
        model.fuse_qkv_projections()
        fused = [getattr(attn, "fused_projections", False) for _, attn in host.attentions(model)]
        assert any(fused) == (not host.name.startswith("qwen"))
        assert_same(run(model, call), expected, 1e-10)
        model.unfuse_qkv_projections()
        assert_same(run(model, call), expected, 1e-10)
    model.fuse_qkv_projections()
    with fr.apply(model, mods_of(host)):
        assert_same(run(model, call), expected, 1e-10)


@ALL
def test_lora(host):
    """An adapter added before or after takes part in the projections, and is dropped with them."""
    peft = pytest.importorskip("peft")
    model, call = host.build().double(), host.call(host.layout)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_qkv_mlp_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    with fr.apply(model, mods_of(host)):
        bare = run(model, call)
        model.add_adapter(config)
        model.double()
        adapted = run(model, call)
    assert_differ(adapted, bare)
    with host.by_formulas(model, host.attend(mods_of(host))):
        assert_same(adapted, run(model, call), 1e-10)
    with fr.apply(model, mods_of(host)):
        assert_same(run(model, call), adapted, 1e-10)
        model.disable_adapters()
        assert_same(run(model, call), bare, 1e-10)


@pytest.mark.parametrize("after", [False, True], ids=["offload, then apply", "apply, then offload"])
@pytest.mark.parametrize("sequential", [False, True], ids=["model", "layer by layer"])
def test_offload(after, sequential):
    """Hooks of accelerate that move weights in and out around every forward, as enable_model_cpu_offload sets them."""
    accelerate = pytest.importorskip("accelerate")
    host = TINY_HOSTS["kontext"]
    model, call = host.build(), host.call(host.layout, dtype=torch.float32)
    with host.by_formulas(model, host.attend(mods_of(host))):
        expected = run(model, call)

    def offload():
        if sequential:
            accelerate.cpu_offload(model, torch.device("cpu"))
        else:
            accelerate.cpu_offload_with_hook(model, torch.device("cpu"))

    if not after:
        offload()
    with fr.apply(model, mods_of(host)):
        if after:
            offload()
        assert_same(run(model, call), expected, 1e-4)
        assert_same(run(model, call), expected, 1e-4)


def test_layerwise_casting_hooks():
    """Diffusers' own hooks wrap the forwards of model and blocks."""
    host = TINY_HOSTS["kontext"]
    model, call = host.build(), host.call(host.layout, dtype=torch.float32)
    with host.by_formulas(model, host.attend(mods_of(host))):
        expected = run(model, call)
    with fr.apply(model, mods_of(host)):
        model.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)
        assert_same(run(model, call), expected, 1e-4)


@ALL
@pytest.mark.parametrize("when", ["before", "while"])
def test_attention_backends(host, when):
    """The host's backend serves the layers that nothing modulates, and of the others what folds or splits off."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    model, call = host.build().double(), host.call(host.layout)
    first = host.attentions(model)[0][1].processor
    backend = "_native_math"
    for _, attn in host.attentions(model):
        assert attn.processor._attention_backend is None

    def choose():
        for _, attn in host.attentions(model):
            attn.processor._attention_backend = AttentionBackendName(backend)

    with host.by_formulas(model, host.attend(mods_of(host)), layers={0}):
        expected = run(model, call)
    if when == "before":
        choose()
    half = type("Half", (), {"modulations": lambda self, site: mods_of(host) if site.layer == 0 else []})()
    with fr.apply(model, half):
        if when == "while":
            choose()
        assert host.attentions(model)[1][1].processor._attention_backend == backend
        assert_same(run(model, call), expected)
    assert host.attentions(model)[0][1].processor is first
    assert first._attention_backend == backend


def test_set_attention_backend_and_its_context(own_backend):
    """Through diffusers' own switches, on a pipeline."""
    from diffusers.models.attention_dispatch import attention_backend

    pipe = flux_pipeline()
    stock = flux_generate(pipe)
    mods = loose_like(TINY_HOSTS["flux"].layout)
    with fr.apply(pipe, mods):
        expected = flux_generate(pipe)
    pipe.transformer.set_attention_backend("_native_math")
    with fr.apply(pipe, mods):
        assert_same(flux_generate(pipe), expected, 1e-4)
        pipe.transformer.set_attention_backend("native")
        assert_same(flux_generate(pipe), expected, 1e-4)
        with attention_backend("_native_math"):
            pipe.transformer.reset_attention_backend()
            assert_same(flux_generate(pipe), expected, 1e-4)
    assert_same(flux_generate(pipe), stock, 1e-4)


@pytest.fixture
def own_backend(monkeypatch):
    """A model that sets its attention backend sets that of all models of the process: until the test ends."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    monkeypatch.setattr(Registry, "_active_backend", Registry._active_backend)


@pytest.mark.parametrize("name", ["_native_math", "flex"])
def test_the_models_own_backend_takes_what_folds_or_splits_off(name, monkeypatch, own_backend):
    """All queries under a BiasDelta, the unmodulated ones under scales; what hands work to it changes no result."""
    from diffusers.models import attention_dispatch as diffusers_dispatch

    backend, seen = diffusers_dispatch.AttentionBackendName(name), []
    backends = diffusers_dispatch._AttentionBackendRegistry._backends
    attend = backends[backend]
    monkeypatch.setitem(backends, backend, lambda **given: seen.append(given["query"].shape[1]) or attend(**given))
    host = TINY_HOSTS["kontext"]
    model, call, tokens = host.build(), host.call(host.layout, dtype=torch.float32), len(host.layout)
    scale = torch.ones(tokens)
    scale[host.layout.target] = torch.where(torch.arange(scale[host.layout.target].numel()) < 3, 0.6, 1.0)
    layers = len(host.attentions(model))
    folds = fr.BiasDelta(1.2, 0.7, keys=host.layout.reference(0))
    splits = fr.QueryScale(scale, keys=host.layout.reference(0), axes=(1, 2))
    model.set_attention_backend(name)
    for modulation, queries in ((folds, tokens), (splits, tokens - 3)):
        seen.clear()
        with fr.apply(model, modulation, plain="fastrope"):
            expected = run(model, call)
        assert not seen
        with fr.apply(model, modulation):
            assert_same(run(model, call), expected, 1e-4)
        assert seen == [queries] * layers
        with fr.apply(model, modulation, plain="math"):
            assert_same(run(model, call), expected, 1e-4)
        assert len(seen) == layers
    with pytest.raises(ValueError, match="^plain: expected"):
        fr.apply(model, folds, plain="fastest")


def test_saved_while_bound(tmp_path):
    """The same files as without a handle, and what loads has the stock processors."""
    host = TINY_HOSTS["kontext"]
    model, call = host.build(), host.call(host.layout, dtype=torch.float32)
    stock, state = run(model, call), model.state_dict()
    with fr.apply(model, mods_of(host)):
        model.save_pretrained(tmp_path)
        assert list(model.state_dict()) == list(state)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())
    assert {type(p).__name__ for p in loaded.attn_processors.values()} == {"FluxAttnProcessor"}
    assert torch.equal(run(loaded, call), stock)


def test_weights_loaded_while_bound():
    host = TINY_HOSTS["kontext"]
    model, other, call = host.build().double(), host.build().double(), host.call(host.layout)
    with host.by_formulas(other, host.attend(mods_of(host))):
        expected = run(other, call)
    with fr.apply(model, mods_of(host)):
        run(model, call)
        model.load_state_dict(other.state_dict())
        assert_same(run(model, call), expected, 1e-10)


def test_controlnet_residuals_do_not_mind():
    """They are added to the tokens between blocks, outside attention."""
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    tokens = call["hidden_states"].shape[1]
    call |= {"controlnet_block_samples": [torch.randn(2, tokens, 32).double()]}
    call |= {"controlnet_single_block_samples": [torch.randn(2, tokens, 32).double()]}
    with host.by_formulas(model, host.attend(mods_of(host))):
        expected = run(model, call)
    with fr.apply(model, mods_of(host)):
        assert_same(run(model, call), expected, 1e-10)


def test_moved_to_another_dtype_while_bound():
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    with fr.apply(model, mods_of(host)):
        expected = run(model, call)
        model.to(torch.bfloat16)
        low = {name: value.to(torch.bfloat16) for name, value in call.items()}
        out = run(model, low)
    assert out.dtype == torch.bfloat16
    assert_same(out.double(), expected, 0.1)


def test_gradient_checkpointing():
    """Blocks run again in the backward pass, with the plans of the call."""
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    leaf = call["hidden_states"].requires_grad_()
    grads = []
    with fr.apply(model, mods_of(host)):
        for checkpointing in (False, True):
            if checkpointing:
                model.enable_gradient_checkpointing()
            model.train()
            model(**call, return_dict=False)[0].square().sum().backward()
            grads.append(leaf.grad.clone())
            leaf.grad = None
    assert_same(grads[1], grads[0], 1e-12)
    assert float(grads[0].abs().max()) > 0
