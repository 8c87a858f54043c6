"""Methods in the real ComfyUI, held to an independent computation: its sampler, tiny random models of every family.

Needs ``COMFYUI_PATH``.
"""

from __future__ import annotations

import json
from pathlib import Path

import comfyui_models as real
import comfyui_oracle as oracle
import pytest
import torch
from comfyui_models import NEAR, edit, report

import fastrope as fr
from fastrope.bindings.comfyui.patching import steer


def test_the_recorded_interface_is_the_real_one():
    recorded = json.loads((Path(__file__).parent / "comfyui_interface.json").read_text(encoding="utf-8"))
    recorded.pop("comfyui")
    assert real.interface(recorded["signatures"]) == recorded


@pytest.mark.parametrize("name", real.MODELS)
def test_a_neutral_node_gives_the_same_bits(name):
    model, (positive, negative) = real.patcher(name), edit(name)
    stock = real.sample(model, name, positive, negative, cfg=2.0)
    assert torch.equal(stock, real.sample(steer(model, fr.GRAG(1.0, 1.0)), name, positive, negative, cfg=2.0))
    late = fr.At(fr.GRAG(text_delta=2.0), steps={7})
    assert torch.equal(stock, real.sample(steer(model, late), name, positive, negative, cfg=2.0))


@pytest.mark.parametrize("name", real.MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_grag_equals_an_independent_computation(name, batch, capsys):
    model, (positive, negative) = real.patcher(name), edit(name)
    run = dict(positive=positive, negative=negative, cfg=2.0, noise=real.latent(name, batch=batch))
    text = {"flux2": 512, "z-image": 32}.get(name, 5)
    if name in real.EDITS:
        method, rule = fr.GRAG(0.8, 1.5), oracle.grag(0.8, 1.5)
    else:
        method, rule = fr.GRAG(text_bias=1.3, text_delta=1.5), oracle.grag(1, 1, text, (1.3, 1.5))
    stock, found = real.sample(model, name, **run), real.sample(steer(model, method), name, **run)
    expected = real.sample(oracle.patched(model, rule), name, **run)
    report(capsys, f"GRAG, {name}, batch {batch}", found, expected)
    assert not torch.allclose(found, stock, rtol=0, atol=1e-3)
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("name", real.EDITS)
def test_reference_strength_equals_copies_of_the_reference(name, capsys):
    model, (positive, negative) = real.patcher(name), edit(name)

    def thrice(q, k, v, options, ids):
        """The last of two references three times."""
        count = options["reference_image_num_tokens"][-1]
        k, v = (torch.cat([x, x[:, :, -count:], x[:, :, -count:]], dim=2) for x in (k, v))
        return oracle.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, v)

    run = dict(positive=positive, negative=negative, cfg=2.0)
    found = real.sample(steer(model, fr.ReferenceStrength(3.0, [1])), name, **run)
    expected = real.sample(oracle.patched(model, thrice), name, **run)
    report(capsys, f"Reference strength, {name}", found, expected)
    assert not torch.allclose(found, real.sample(model, name, **run), rtol=0, atol=1e-3)
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "krea"])
@pytest.mark.parametrize("placed", [None, "offset", "uxo", "negative_index", "index_timestep_zero"])
def test_looserope_equals_an_independent_computation(name, placed, capsys):
    if (name, placed) == ("flux", "index_timestep_zero"):
        pytest.skip("the host's own code fails where guidance is embedded")
    model = real.patcher(name)
    positive, negative = edit(name, **({} if placed is None else {"reference_latents_method": placed}))
    dit = model.model.diffusion_model
    grid, patch = ((8, 12), 1) if name == "flux2" else ((4, 6), 2)
    saliency, mask = torch.rand(grid, generator=torch.Generator().manual_seed(4)), torch.zeros(grid)
    mask[1:3, 1:4] = 1
    method = fr.LooseRoPE(saliency, mask, levels=None, dilation=0, cutoffs=(), steps=None)
    energy, inside = method.on_grid(grid)
    scale, gain = (torch.where(inside, x, 1.0).flatten() for x in method.factors(energy))
    first = method._mask_on((4 // patch, 6 // patch)).flatten()
    crop = torch.cat([first, torch.zeros(6 * 4 // patch**2, dtype=torch.bool)])

    def rule(q, k, v, options, ids):
        """The first of two references alone is covered."""
        counts = options["reference_image_num_tokens"]
        one = oracle.loose(scale, gain, crop[: counts[0]], dit.pe_embedder.axes_dim, dit.pe_embedder.theta)
        return one(q, k, v, options, ids)

    references = [positive[0][1]["reference_latents"][:1]] * 2
    for conditioning, kept in zip((positive, negative), references, strict=True):
        conditioning[0][1]["reference_latents"] = kept
    run = dict(positive=positive, negative=negative, cfg=2.0)
    found = real.sample(steer(model, method, refers=True), name, **run)
    expected = real.sample(oracle.patched(model, rule), name, **run)
    report(capsys, f"LooseRoPE, {name}, references placed by {placed}", found, expected)
    assert not torch.allclose(found, real.sample(model, name, **run), rtol=0, atol=1e-4)
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("name", real.MODELS)
def test_high_resolution_equals_other_frequencies_in_the_hosts_own_embedding(name, capsys):
    """NTK is another base on two axes; the host's embedding is given that, axis by axis."""
    model, (positive, negative) = real.patcher(name), edit(name)
    trained, grid = (2, 3), ((8, 12) if name == "flux2" else (4, 6))
    steered = steer(steer(model, fr.HighResolution("ntk", trained)), fr.GRAG(1.0, 1.0, 1.2, 0.9))
    run = dict(positive=positive, negative=negative, cfg=2.0)
    if name == "z-image":
        with pytest.raises(NotImplementedError, match="no patch reaches"):
            real.sample(steered, name, **run)
        return
    from comfy.ldm.flux.layers import EmbedND
    from comfy.ldm.flux.math import rope

    found = real.sample(steered, name, **run)
    text = {"flux2": 512}.get(name, 5)
    dit = model.model.diffusion_model
    scale = [1.0, grid[0] / trained[0], grid[1] / trained[1], 1.0]

    def forward(self, ids):
        bases = [self.theta * s ** (d / (d - 2)) if s > 1 else self.theta for s, d in zip(scale, self.axes_dim)]  # noqa: B905
        parts = [rope(ids[..., n], d, bases[n]) for n, d in enumerate(self.axes_dim)]
        return torch.cat(parts, dim=-3).unsqueeze(1)

    dit.pe_embedder.__class__ = type("Other", (EmbedND,), {"forward": forward})
    expected = real.sample(oracle.patched(model, oracle.grag(1, 1, text, (1.2, 0.9))), name, **run)
    report(capsys, f"High resolution and GRAG, {name}", found, expected)
    assert not torch.allclose(
        found, real.sample(steer(real.patcher(name), fr.GRAG(1.0, 1.0, 1.2, 0.9)), name, **run), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(found, expected, **NEAR)
