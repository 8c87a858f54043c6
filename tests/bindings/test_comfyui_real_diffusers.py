"""The same weights in the real ComfyUI and in diffusers. Needs ``COMFYUI_PATH``."""

from __future__ import annotations

import comfyui_models as real
import pytest
import torch

import fastrope as fr
from fastrope.bindings.comfyui.patching import steer


def diffusers_flux(model):
    """The host's transformer as diffusers', by the host's own map of names."""
    import diffusers

    host, config = real.comfy(), real.FLUX | {"mlp_ratio": 4.0}
    found = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    weights, names = model.model.diffusion_model.state_dict(), host.utils.flux_to_diffusers(config)
    made = {}
    for name in found.state_dict():
        source = names[name]
        source = (source, None) if isinstance(source, str) else source
        value = weights[source[0]]
        if source[1] is not None:
            value = value.narrow(*source[1])
        made[name] = source[2](value) if len(source) > 2 else value
    found.load_state_dict(made)
    return found


def diffusers_qwen(model):
    """Both name their weights alike."""
    import diffusers

    found = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    found.load_state_dict(model.model.diffusion_model.state_dict())
    return found


def packed(latent):
    """``(B, C, H, W)`` as tokens."""
    latent = latent.squeeze(2) if latent.ndim == 5 else latent
    return torch.nn.functional.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", ["flux", "qwen"])
@pytest.mark.parametrize("method", ["GRAG", "LooseRoPE", "UntwistingRoPE", "none"])
def test_the_same_weights_in_diffusers_give_the_same_velocities(name, method, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    if name == "flux":
        monkeypatch.setitem(real.MODELS, "flux", real.FLUX | {"mlp_ratio": 4.0})
    torch.manual_seed(0)
    saliency, mask = torch.rand(4, 6), torch.zeros(4, 6)
    mask[1:3, 1:4] = 1
    methods = {
        "GRAG": [fr.GRAG(0.8, 1.5, 1.2, 0.9)], "none": [],
        "LooseRoPE": [fr.LooseRoPE(saliency, mask, dilation=0)],
        "UntwistingRoPE": [fr.UntwistingRoPE(reference=0)],
    }[method]  # fmt: skip
    model = real.patcher(name)
    twin = (diffusers_flux if name == "flux" else diffusers_qwen)(model)
    steered = model
    for each in methods:
        steered = steer(steered, each)
    text = torch.randn(1, 5, 12)
    x, reference = real.latent(name), real.latent(name, 4, 8, seed=9)  # Qwen hosts centre odd sides differently
    inner, sigmas = model.model, torch.tensor([1.0, 0.7, 0.3, 0.0])
    given = dict(c_crossattn=text, ref_latents=[inner.process_latent_in(reference)])
    if name == "flux":
        given |= dict(y=torch.randn(1, 8), guidance=torch.tensor([3.0]))
    ids = [torch.zeros(rows, columns, 3) for rows, columns in ((4, 6), (2, 4))]
    for n, each in enumerate(ids):
        each[..., 0], each[..., 1], each[..., 2] = n, torch.arange(len(each))[:, None], torch.arange(each.shape[1])
    tokens = torch.cat([packed(x), packed(given["ref_latents"][0])], dim=1)
    largest = 0.0
    with torch.no_grad(), fr.apply(twin, *methods) as handle:
        for step, sigma in enumerate(sigmas[:-1]):
            options = {"sigmas": sigma[None], "sample_sigmas": sigmas, "wrappers": steered.wrappers}
            denoised = inner.apply_model(x, sigma[None], transformer_options=options, **given)
            found = packed((x - denoised) / sigma)
            handle.set_step(step, 3)
            call = dict(hidden_states=tokens, encoder_hidden_states=text, timestep=sigma[None])
            if name == "flux":
                call |= dict(pooled_projections=given["y"], guidance=given["guidance"], txt_ids=torch.zeros(5, 3))
                call |= dict(img_ids=torch.cat([each.flatten(0, 1) for each in ids]))
            else:
                call |= dict(img_shapes=[[(1, 4, 6), (1, 2, 4)]])
            expected = twin(**call, return_dict=False)[0][:, : found.shape[1]]
            largest = max(largest, float((found - expected).abs().max()))
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    with capsys.disabled():
        print(f"\n  diffusers binding, {name}, {method}: largest difference {largest:.2e}", end="")
