"""The lab's trained editor, 16 x 16 pixels, and one call of it on a pasted digit."""

from __future__ import annotations

import torch

import fastrope as fr
from fastrope import lab

STEPS, SIDE = 4, 16


def pipeline():
    return lab.pipeline()


def arguments() -> dict:
    """Of the pipeline's call: a pasted digit, fixed noise."""
    noise = torch.randn(1, SIDE * SIDE // 4, 12, generator=torch.Generator().manual_seed(1))
    changed = dict(num_inference_steps=STEPS, latents=noise, image=pasted()[0])
    return lab.CALL | lab.prompt("blend") | changed


def run(pipe, *methods) -> torch.Tensor:
    """Pixels ``(3, 16, 16)`` of a call under some methods."""
    with fr.apply(pipe, *methods):
        latents = pipe(**arguments() | {"output_type": "latent"}).images
    return pipe._unpack_latents(latents, SIDE, SIDE, pipe.vae_scale_factor)[0].double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root of the mean squared difference."""
    return float((a - b).square().mean().sqrt())


def pasted() -> tuple:
    """A picture with a pasted digit, and the picture before."""
    return lab.pasted()
