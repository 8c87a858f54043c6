"""A model, a call and a reference, and references of any host along a path."""

from __future__ import annotations

import torch
from diffusers_hosts import TINY_HOSTS
from tiny_transformers import TEXT
from untwisting_calls import call_of, source_of
from untwisting_runs import Path, to_float

import fastrope as fr

FLUX = TINY_HOSTS["flux"]


def small() -> tuple[torch.nn.Module, dict, fr.Reference]:
    """A model, the call of two targets, a reference."""
    return FLUX.build().double(), call_of(FLUX, 5, 2), source_of(FLUX, call_of(FLUX, 6, 1))


def path_of(host) -> Path:
    text = 40 if host.name == "z-image" else TEXT + 2
    call = {key: to_float(value) for key, value in call_of(host, text, 1).items()}
    path = Path(call, "x" if host.name == "z-image" else "hidden_states")
    for name in ("img_ids", "img_shapes"):  # of any target
        if name in call:
            path.arguments[name] = call[name]
    return path
