"""The binding in the real ComfyUI: its sampler, tiny random models of every family. Needs ``COMFYUI_PATH``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import fastrope as fr

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("set COMFYUI_PATH to a checkout of ComfyUI to run these", allow_module_level=True)

import comfyui_models as real
import comfyui_oracle as oracle

from fastrope.bindings.comfyui.steering import steer

NEAR = dict(rtol=0, atol=2e-5)


def edit(name: str, **options):
    """Conditionings of an edit, where the family has references; else of a prompt."""
    references = [real.latent(name, 4, 6, seed=9), real.latent(name, 6, 4, seed=8)] if name in real.EDITS else []
    return [real.conditioning(name, seed=seed, references=references, **options) for seed in (2, 3)]


def report(capsys, what: str, found, expected) -> None:
    with capsys.disabled():
        print(f"\n  {what}: largest difference {float((found - expected).abs().max()):.2e}", end="")


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
