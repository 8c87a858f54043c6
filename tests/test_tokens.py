"""Spans and positions of a joint sequence, held against diffusers' own builders."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastrope as fr

GRIDS = [(3, 5), (4, 2), (1, 7)]  # odd, even, one row; no two alike


def spans(layout: fr.TokenLayout) -> list[slice]:
    return [layout.text, layout.target, *(layout.reference(i) for i in range(len(layout.reference_grids)))]


@pytest.mark.parametrize("order", ["text-first", "text-last"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("references", [[], GRIDS[1:]])
def test_spans_tile_the_sequence(order, padding, references):
    layout = fr.TokenLayout(text=6, target=GRIDS[0], references=references, order=order, padding=padding)
    covered = torch.zeros(len(layout), dtype=torch.int64)
    for span in spans(layout):
        covered[span] += 1
    assert len(layout) == 6 + 15 + padding + (15 if references else 0)
    assert int(covered.sum()) == len(layout) - padding
    assert int(covered.max()) == 1
    padded = slice(layout.target.stop, layout.target.stop + padding)
    assert bool((covered[padded] == 0).all())
    assert layout.references == slice(padded.stop, padded.stop + (15 if references else 0))
    first = layout.text if order == "text-first" else layout.target
    assert first.start == 0


def test_references_follow_the_target_in_order():
    layout = fr.TokenLayout(text=512, target=(64, 64), references=[(64, 64), (32, 16)])
    assert layout.text == slice(0, 512)
    assert layout.target == slice(512, 4608)
    assert layout.reference(0) == slice(4608, 8704)
    assert layout.reference(1) == slice(8704, 9216)
    assert layout.references == slice(4608, 9216)
    assert len(layout) == 9216


def test_layouts_are_values():
    one = fr.TokenLayout(4, (2, 3), [(2, 3)])
    same = fr.TokenLayout(4, [2, 3], ((2, 3),))
    assert one == same
    assert hash(one) == hash(same)
    assert one != fr.TokenLayout(4, (3, 2), [(2, 3)])
    assert eval(repr(one), {"TokenLayout": fr.TokenLayout}) == one
    last = fr.TokenLayout(4, (2, 3), order="text-last", padding=2)
    assert eval(repr(last), {"TokenLayout": fr.TokenLayout}) == last
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.text_tokens = 5


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"text": -1}, "text"),
        ({"text": 2.0}, "text"),
        ({"text": True}, "text"),
        ({"target": (0, 4)}, "target"),
        ({"target": (4,)}, "target"),
        ({"target": 16}, "target"),
        ({"target": (4.0, 4)}, "target"),
        ({"references": (4, 4)}, r"references\[0\]"),
        ({"references": 7}, "references"),
        ({"references": [(4, 4), (4, 0)]}, r"references\[1\]"),
        ({"order": "text"}, "order"),
        ({"padding": -1}, "padding"),
    ],
)
def test_bad_layouts_are_refused(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .* received"):
        fr.TokenLayout(**arguments)


@pytest.mark.parametrize("i", [-1, 1, 0.0, None])
def test_unknown_references_are_refused(i):
    layout = fr.TokenLayout(4, (2, 2), [(2, 2)])
    with pytest.raises(ValueError, match=r"^i: expected a reference in \[0, 1\)"):
        layout.reference(i)


def test_positions_refuse_what_a_convention_does_not_know():
    layout = fr.TokenLayout(4, (2, 2), [(2, 2)])
    with pytest.raises(ValueError, match=r"^convention: expected one of"):
        layout.positions("sd3")
    with pytest.raises(ValueError, match=r"^references: expected none"):
        layout.positions("z-image")
    with pytest.raises(ValueError, match=r"^padding: expected 0"):
        fr.TokenLayout(4, (2, 2), padding=2).positions("flux")


@pytest.mark.parametrize("convention", ["flux", "flux2", "qwen"])
def test_order_moves_spans_and_nothing_else(convention):
    first = fr.TokenLayout(4, GRIDS[0], GRIDS[1:])
    last = fr.TokenLayout(4, GRIDS[0], GRIDS[1:], order="text-last")
    a, b = first.positions(convention), last.positions(convention)
    assert a.dtype == torch.int64
    for one, other in zip(spans(first), spans(last), strict=True):
        assert torch.equal(a[one], b[other])


# ---- diffusers as the oracle -----------------------------------------------------------------------------------------


def test_flux_positions():
    pytest.importorskip("diffusers")
    from diffusers import FluxKontextPipeline

    build = FluxKontextPipeline._prepare_latent_image_ids
    target, reference = (build(1, *g, "cpu", torch.float32) for g in GRIDS[:2])
    reference[..., 0] = 1  # as FluxKontextPipeline.prepare_latents does
    layout = fr.TokenLayout(6, GRIDS[0], GRIDS[1:2])
    expected = torch.cat([torch.zeros(6, 3), target, reference])
    assert torch.equal(layout.positions("flux").float(), expected)


def test_flux2_positions():
    pytest.importorskip("diffusers")
    from diffusers import Flux2Pipeline

    text = Flux2Pipeline._prepare_text_ids(torch.zeros(1, 6, 8))[0]
    target = Flux2Pipeline._prepare_latent_ids(torch.zeros(1, 4, *GRIDS[0]))[0]
    references = Flux2Pipeline._prepare_image_ids([torch.zeros(1, 4, *g) for g in GRIDS[1:]])[0]
    layout = fr.TokenLayout(6, GRIDS[0], GRIDS[1:])
    assert torch.equal(layout.positions("flux2"), torch.cat([text, target, references]))


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1], [(2, 2), (9, 4)]])
def test_qwen_positions(grids):
    pytest.importorskip("diffusers")
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    axes = (4, 6, 6)
    table = QwenEmbedRope(theta=10_000, axes_dim=list(axes), scale_rope=True)
    images, text = table([[(1, *g) for g in grids]], device=torch.device("cpu"), max_txt_seq_len=6)
    layout = fr.TokenLayout(6, grids[0], grids[1:])
    angles = fr.RoPE.axial(layout.positions("qwen"), axes).angles
    expected = torch.cat([text, images]).to(torch.complex128)
    torch.testing.assert_close(torch.polar(torch.ones_like(angles), angles), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(8, 8), (3, 5)])  # with and without filler tokens
def test_z_image_positions(grid):
    pytest.importorskip("diffusers")
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[4, 6, 6], axes_lens=[128, 16, 16],
    )  # fmt: skip
    latents = torch.zeros(4, 1, 2 * grid[0], 2 * grid[1])
    found = model.patchify_and_embed([latents], [torch.zeros(20, 8)], 2, 1)
    images, captions, image_ids, caption_ids = found[0][0], found[1][0], found[3][0], found[4][0]
    text, target = len(captions), grid[0] * grid[1]
    layout = fr.TokenLayout(text, grid, order="text-last", padding=len(images) - target)
    assert len(layout) == len(images) + text
    expected = torch.cat([image_ids, caption_ids[:text]]).long()  # the host cuts its table to the caption's length
    assert torch.equal(layout.positions("z-image"), expected)


# ---- sites -----------------------------------------------------------------------------------------------------------


def test_progress_runs_from_zero_to_one():
    tokens = fr.TokenLayout(4, (2, 2))
    assert [fr.Site(tokens, step=s, num_steps=5).progress for s in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert fr.Site(tokens, num_steps=1).progress == 0


def test_sites_are_values():
    tokens = fr.TokenLayout(4, (2, 2))
    site = fr.Site(tokens, layer=3, step=2, axes_dim=[16, 56, 56])
    assert site == fr.Site(fr.TokenLayout(4, (2, 2)), 3, 2)
    assert hash(site) == hash(fr.Site(tokens, 3, 2))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"tokens": 512}, "tokens"),
        ({"layer": -1}, "layer"),
        ({"layer": 1.0}, "layer"),
        ({"step": 28}, "step"),
        ({"step": -1}, "step"),
        ({"num_steps": 0}, "num_steps"),
        ({"axes_dim": (16, 55, 57)}, "axes_dim"),
        ({"axes_dim": ()}, "axes_dim"),
        ({"axes_dim": 128}, "axes_dim"),
        ({"spatial_axes": (1, 3)}, "spatial_axes"),
        ({"spatial_axes": (1, 1)}, "spatial_axes"),
    ],
)
def test_bad_sites_are_refused(arguments, name):
    arguments = {"tokens": fr.TokenLayout(4, (2, 2))} | arguments
    with pytest.raises(ValueError, match=rf"^{name}: expected .* received"):
        fr.Site(**arguments)
