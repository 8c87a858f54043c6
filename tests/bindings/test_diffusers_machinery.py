"""What diffusers and torch do with whole models: skipped layers, IP-Adapters, parallelism, export."""

from __future__ import annotations

import pytest
import torch

import fastrope as fr
from fastrope import device as devices

pytest.importorskip("diffusers")
import diffusers
from diffusers.hooks.layer_skip import LayerSkipConfig, apply_layer_skip
from diffusers_hosts import TINY_HOSTS, assert_same, grag_like
from tiny_transformers import WIDTH, run

HANDS = pytest.mark.parametrize("name", ["flux", "chroma"])

# ---- skipped layers --------------------------------------------------------------------------------------------------

ATTENTION = dict(skip_attention=True, skip_ff=False)
SCORES = dict(skip_attention=False, skip_attention_scores=True, skip_ff=False)  # perturbed-attention guidance
SKIPS = pytest.mark.parametrize(
    ("name", "what"), [("qwen", SCORES), ("z-image", SCORES), ("z-image", ATTENTION)],
    ids=["qwen-scores", "z-image-scores", "z-image-attention"],
)  # fmt: skip  # stock Qwen-Image cannot skip attention alone


def skipping(host, what: dict) -> torch.nn.Module:
    """A model whose second layer is skipped."""
    torch.manual_seed(1)
    model = host.build()
    apply_layer_skip(model, LayerSkipConfig(indices=[1], **what))
    return model


@SKIPS
def test_layers_are_skipped_as_in_the_stock_model(name, what):
    """Bit for bit where nothing is modulated, whichever came first."""
    host = TINY_HOSTS[name]
    call = host.call(host.layout, dtype=torch.float32)
    stock = run(skipping(host, what), call)
    for methods in ([], grag_like(host.layout, 1.0, 1.0)):
        torch.manual_seed(1)
        model = host.build()
        whole = run(model, call)
        assert not torch.equal(whole, stock)
        with fr.apply(model, *methods):
            apply_layer_skip(model, LayerSkipConfig(indices=[1], **what))
            assert torch.equal(run(model, call), stock)
        later = skipping(host, what)
        with fr.apply(later, *methods):
            assert torch.equal(run(later, call), stock)


@SKIPS
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_what_modulates_a_skipped_layer_is_skipped_with_it(name, what, backend):
    """The kernels of a backend must not stand in for what diffusers leaves out."""
    host = TINY_HOSTS[name]
    if backend == "triton" and devices.kernel_obstacle(torch.empty(1)):
        pytest.skip("triton cannot run here")
    model, call = skipping(host, what), host.call(host.layout, dtype=torch.float32)
    mods = [fr.BiasDelta(1.5, 2.0, keys=host.layout.target)]
    stock = run(model, call)
    with fr.apply(model, fr.At(mods, layers=1), backend=backend):
        assert torch.equal(run(model, call), stock)
    with fr.apply(model, fr.At(mods, layers=[0, 2]), backend=backend):
        others = run(model, call)
    with fr.apply(model, mods, backend=backend):
        assert torch.equal(run(model, call), others)
    assert not torch.equal(others, stock)


def test_compiled_layers_are_perturbed_too():
    """The op that a compiler sees hides attention from what intercepts it."""
    host = TINY_HOSTS["qwen"]
    model, call = skipping(host, SCORES), host.call(host.layout, dtype=torch.float32)
    stock = run(model, call)
    with fr.apply(model, fr.At(fr.BiasDelta(1.5, 2.0, keys=host.layout.target), layers=1)):
        model.compile(backend="eager")
        assert_same(run(model, call), stock, 1e-6)


@pytest.mark.parametrize("name", ["qwen", "z-image"])
def test_a_guider_perturbs_and_lets_go(name):
    host = TINY_HOSTS[name]
    model, call = host.build(), host.call(host.layout, dtype=torch.float32)
    config = LayerSkipConfig(indices=[1], fqn=host.attentions(model)[0][0], **SCORES)
    guider = diffusers.PerturbedAttentionGuidance(
        perturbed_guidance_config=config, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
    )
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(900.0))

    def predictions() -> list[torch.Tensor]:
        found = []
        guider._count_prepared = 0
        for _ in range(guider.num_conditions):
            guider.prepare_models(model)
            found.append(run(model, call))
            guider.cleanup_models(model)
        return found

    stock = predictions()
    assert not torch.equal(stock[0], stock[-1])
    with fr.apply(model):
        assert all(torch.equal(a, b) for a, b in zip(predictions(), stock, strict=True))
    with fr.apply(model, fr.At(fr.BiasDelta(1.5, 2.0, keys=host.layout.target), layers=1)):
        changed = predictions()
    assert not torch.equal(changed[0], stock[0])
    assert torch.equal(changed[-1], stock[-1])


# ---- IP-Adapters -----------------------------------------------------------------------------------------------------


def ip_adapter(model) -> dict:
    """Weights as files of the kind hold them."""
    hidden = model.inner_dim
    one = {"to_k_ip.weight": (hidden, WIDTH), "to_k_ip.bias": (hidden,)}
    one |= {name.replace("_k_", "_v_"): shape for name, shape in one.items()}
    layers = {f"{n}.{name}": torch.randn(shape) for n in range(2) for name, shape in one.items()}
    picture = {"proj.weight": torch.randn(4 * WIDTH, 8), "proj.bias": torch.randn(4 * WIDTH)}
    return {"image_proj": picture | {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)},
            "ip_adapter": layers}  # fmt: skip


@HANDS
def test_loading_an_ip_adapter_into_a_bound_model_is_refused(name):
    host = TINY_HOSTS[name]
    pipe = host.pipeline()
    model, call = pipe.transformer, host.call(host.layout, dtype=torch.float32)
    load = dict(weight_name="", subfolder="", image_encoder_pretrained_model_name_or_path=None)
    handle = fr.apply(pipe, grag_like(host.layout))
    before = run(model, call)
    with pytest.raises(NotImplementedError, match=r"^IP-Adapter: .*call handle\.remove\(\) before loading it$"):
        pipe.load_ip_adapter(ip_adapter(model), **load)
    assert torch.equal(run(model, call), before)
    handle.remove()
    pipe.load_ip_adapter(ip_adapter(model), **load)
    with pytest.raises(NotImplementedError, match=r"^IP-Adapter: expected "):
        fr.apply(pipe)


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [[], [fr.BiasDelta(1.5, 2.0, keys=slice(0, 4))]], ids=["bound", "modulated"])
def test_export_is_refused_by_name(methods):
    host = TINY_HOSTS["flux"]
    model, call = host.build(), host.call(host.layout, dtype=torch.float32)
    with fr.apply(model, *methods):
        with pytest.raises(NotImplementedError, match=r"^torch\.export: .*call handle\.remove\(\) before"):
            torch.export.export(model, (), call)
        with pytest.raises(Exception, match=r"to export a transformer, call handle\.remove\(\) first"):
            torch.export.export(model, (), call, strict=True)
        with pytest.raises(NotImplementedError, match=r"^torch\.jit\.trace: .*call handle\.remove\(\) before"):
            torch.jit.trace(model, example_kwarg_inputs=call, strict=False, check_trace=False)
    exported = torch.export.export(model, (), call).module()
    assert_same(exported(**call)[0].detach(), run(model, call), 1e-5)
