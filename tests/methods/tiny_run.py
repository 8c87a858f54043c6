"""The tiny Kontext pipeline of the demo, and one call of it."""

from __future__ import annotations

import torch

import fastrope as fr
from fastrope.demo import kontext, scene, tiny

quiet = tiny.quiet
SETTINGS = kontext.Settings(pixels=32, steps=4)
CPU = torch.device("cpu")


def pipeline():
    return tiny.pipeline(0, CPU, torch.float32)


def arguments() -> dict:
    """Of the pipeline's call: the composite, random embeddings, fixed noise; the result are packed latents."""
    return kontext._inputs(SETTINGS, CPU, torch.float32)


def run(pipe, *methods) -> torch.Tensor:
    """Pixels ``(3, 32, 32)`` of a call under some methods."""
    with fr.apply(pipe, *methods), tiny.quiet():
        latents = pipe(**arguments(), output_type="latent").images
    return pipe._unpack_latents(latents, SETTINGS.pixels, SETTINGS.pixels, pipe.vae_scale_factor)[0].double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root of the mean squared difference."""
    return float((a - b).square().mean().sqrt())


def pasted() -> scene.Scene:
    return scene.draw_scene()
