"""Runs of tiny pipelines along a given reference."""

from __future__ import annotations

import pytest
import torch
from diffusers_hosts import TINY_HOSTS
from tiny_pipelines import latent_arguments, prompt
from tiny_transformers import TEXT
from untwisting_calls import call_of, source_of

import fastrope as fr

STEPS = 3


DIALS = dict(s_hf=(0.2, 0.9), s_lf=(0.9, 1.6), beta=2.0, adain=0.5)


CARRIED = pytest.mark.parametrize("carried", ["batched", "kept"])


def flux2_generate(pipe, steps, batch, lengths):
    """The tiny host's own call has references."""
    return pipe(prompt_embeds=prompt(batch, lengths[0]), **latent_arguments(steps, pixels=2))[0]


GENERATE = {"flux2": flux2_generate}


NAMES = ("flux", "chroma", "flux2", "qwen", "z-image", "ovis")


class Path:
    """A reference whose latents differ from step to step; it writes down what it was asked."""

    def __init__(self, call: dict, image: str):
        g = torch.Generator().manual_seed(8)
        clean = torch.stack(call[image]) if isinstance(call[image], list) else call[image]
        self.clean, self.noise = clean, torch.randn(clean.shape, generator=g)
        own = ("encoder_hidden_states", "pooled_projections", "cap_feats")
        self.arguments = {name: value for name, value in call.items() if name in own}
        self.asked = []

    def latents(self, step: int, sigma: float) -> torch.Tensor:
        self.asked.append((step, sigma))
        return (1 - sigma) * self.clean + sigma * self.noise


def texts_of(host) -> tuple[int, int | None, int]:
    """Lengths of prompt, negative prompt and the reference's text."""
    return (*host.lengths, TEXT + 2) if host.name != "z-image" else (TEXT, TEXT + 3, 40)


def to_float(value):
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        return [x.float() for x in value]
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def small(name: str = "flux", **changes):
    """A model, a call, and a reference with some arguments changed or (None) missing."""
    host = TINY_HOSTS[name]
    source = source_of(host, call_of(host, 5, 1))
    given = {key: value for key, value in {**source.arguments, **changes}.items() if value is not None}
    return host.build().double(), call_of(host, 5, 2), fr.Reference(source.latents, given)
