"""The editor: a FLUX-shaped transformer of a million parameters, for text to image and for editing by reference.

Latents are pixels, packed 2 x 2: 8 x 8 tokens of 12 channels, a reference's at axis 0 = 1. Rectified flow: at time t
the model sees ``(1 - t) * picture + t * noise`` and gives the velocity ``noise - picture``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

from . import scenes, words
from .digits import SIZE
from .training import Job, fast

GRID = SIZE // 2
SHAPES = dict(
    patch_size=1, in_channels=12, num_layers=1, num_single_layers=5, attention_head_dim=32, num_attention_heads=3,
    joint_attention_dim=words.CHANNELS, pooled_projection_dim=words.CHANNELS, axes_dims_rope=(4, 14, 14),
)  # fmt: skip
DRAWN, EDITED = 32, 16  # examples per step; they cost the same, for a reference doubles the tokens
TASK_WEIGHTS = torch.tensor([0.0, 0.2, 0.2, 0.3, 0.1, 0.2])  # of scenes.TASKS among the edited
TIMES = (0.3, 1.1)  # mean and standard deviation of logit(t)


def build():
    """The transformer with fresh weights."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**SHAPES)


def pack(pictures: torch.Tensor) -> torch.Tensor:
    """Tokens ``(B, 64, 12)`` of ``pictures (B, 3, 16, 16)``, in the order of diffusers' FLUX pipelines."""
    return F.pixel_unshuffle(pictures, 2).flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (GRID, GRID)), 2)


@lru_cache
def positions(references: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``(64 * (1 + references), 3)`` of image tokens and ``(5, 3)`` of words."""
    side = torch.arange(float(GRID))
    image = torch.cartesian_prod(torch.arange(1.0 + references), side, side)
    return image.to(device), torch.zeros(len(scenes.SLOTS), 3, device=device)


def velocity(model, tokens, prompt, time, reference=None) -> torch.Tensor:
    """The predicted velocity of ``tokens (B, 64, 12)`` at ``time (B,)``; ``prompt (B, 5)``, ``reference`` packed."""
    text, pooled = (x.to(tokens.device) for x in words.embed(prompt))
    image_ids, text_ids = positions(int(reference is not None), tokens.device)
    given = tokens if reference is None else torch.cat([tokens, reference], dim=1)
    out = model(given, text, pooled, time, image_ids, text_ids, return_dict=False)[0]
    return out[:, : tokens.shape[1]]


def losses(model, generator: torch.Generator, device: torch.device) -> Iterator[torch.Tensor]:
    """The losses of one step: text to image, then editing."""
    drawn = scenes.to_draw(DRAWN, generator)
    yield _loss(model, drawn, generator, device)
    task = torch.multinomial(TASK_WEIGHTS, EDITED, replacement=True, generator=generator)
    yield _loss(model, scenes.to_edit(task, generator), generator, device)


def _loss(model, examples: scenes.Examples, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    picture = pack(examples.target.render())
    noise = torch.randn(picture.shape, generator=generator)
    mean, deviation = TIMES
    time = torch.sigmoid(mean + deviation * torch.randn(len(picture), generator=generator))
    noisy = torch.lerp(picture, noise, time[:, None, None]).to(device)
    prompt = scenes.shorten(examples, generator)
    reference = None if examples.reference is None else pack(examples.reference).to(device)
    with fast(device):
        found = velocity(model, noisy, prompt, time.to(device), reference)
    return (found.float() - (noise - picture).to(device)).square().mean() / 2


def blocks(model) -> list:
    """The transformer's blocks."""
    return [*model.transformer_blocks, *model.single_transformer_blocks]


JOB = Job("editor", build, losses, DRAWN + EDITED, blocks)


@torch.no_grad()
def sample(
    model,
    prompt: torch.Tensor,
    generator: torch.Generator,
    reference: torch.Tensor | None = None,
    steps: int = 16,
    guidance: float = 1.0,
) -> torch.Tensor:
    """Pictures ``(B, 3, 16, 16)`` of ``prompt (B, 5)``; the same arithmetic as the pipelines, without their wrapping.

    Args:
        reference: pictures to edit, ``(B, 3, 16, 16)`` in -1..1.
        steps: of Euler's method, all of one length.
        guidance: above 1, the velocity is ``u + (c - u) * guidance`` with ``u`` that of the task word alone.
    """
    batch, device = len(prompt), model.device
    tokens = torch.randn(batch, GRID * GRID, 12, generator=generator).to(device)
    reference = None if reference is None else pack(reference).to(device)
    bare = torch.full_like(prompt, scenes.ANY)
    bare[:, 0] = prompt[:, 0]
    for index in range(steps):
        time = torch.full((batch,), 1 - index / steps, device=device)
        found = velocity(model, tokens, prompt, time, reference)
        if guidance != 1:
            plain = velocity(model, tokens, bare, time, reference)
            found = plain + (found - plain) * guidance
        tokens = tokens - found / steps
    return unpack(tokens).clamp(-1, 1).cpu()
