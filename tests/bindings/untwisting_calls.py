"""Calls of tiny hosts that share attention with a reference."""

from __future__ import annotations

import pytest
import torch
from tiny_transformers import TARGET, TEXT

import fastrope as fr

STEP, STEPS = 3, 7  # where dials that rise stand
CARRIED = pytest.mark.parametrize("carried", ["batched", "kept"])


DIALS = dict(s_hf=(0.3, 0.9), s_lf=(0.8, 1.5), beta=1.7, adain=0.4)


def plain_layout(host, text=TEXT, grid=TARGET) -> fr.TokenLayout:
    """A target of odd sides, no references. Z-Image fills texts and pictures up to 32 tokens."""
    if host.name == "z-image":
        return fr.TokenLayout(text + -text % 32, grid, order="text-last", padding=-grid[0] * grid[1] % 32)
    return fr.TokenLayout(text, grid)


def call_of(host, text: int, batch: int, grid=TARGET) -> dict:
    more = {"captions": [text] * batch} if host.name == "z-image" else {}
    return host.call(plain_layout(host, text, grid), batch=batch, **more)


def source_of(host, call: dict) -> fr.Reference:
    """A reference whose own call this is."""
    image = "x" if host.name == "z-image" else "hidden_states"
    latents = torch.stack(call[image]) if host.name == "z-image" else call[image]
    own = ("encoder_hidden_states", "pooled_projections", "cap_feats", "attention_mask", "img_ids", "txt_ids",
           "img_shapes", "encoder_hidden_states_mask")  # fmt: skip
    given = {name: value for name, value in call.items() if name in own}
    if not host.name.startswith("longcat"):  # what can be told from the target need not be said
        given = {name: value for name, value in given.items() if name not in ("img_ids", "txt_ids", "img_shapes")}
    return fr.Reference(lambda step, sigma: latents, given)


def apply(model, carried: str, source, *methods, **options):
    reference = source if carried == "batched" else fr.ReferenceCache(source)
    handle = fr.apply(model, *methods, reference=reference, **options)
    handle.set_step(STEP, STEPS)
    return handle
