"""The author: a LlamaGen-shaped autoregressive model of a million parameters over the codes of a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from . import codes, scenes, words
from .editor import GRID
from .training import Job, fast

BATCH = 32
UNCONDITIONAL = 0.1  # share of examples without a prompt, for guidance
PICTURES = 1200  # that the codebook is fitted to
SHAPES = dict(
    dim=128, layers=5, heads=4, hidden=384, grid=GRID, vocabulary=codes.CODES, prefix=len(scenes.SLOTS),
    caption_dim=words.CHANNELS,
)  # fmt: skip


class Author(nn.Module):
    """A LlamaGen transformer and the codebook it writes in: ``transformer``, and ``codebook (512, 12)``.

    Empty but for the shapes: :func:`build` starts a training, ``fastrope.lab.load`` has the trained one.
    """

    def __init__(self):
        from ..bindings.llamagen import LlamaGen, LlamaGenConfig

        super().__init__()
        self.transformer = LlamaGen(LlamaGenConfig(**SHAPES))
        self.register_buffer("codebook", torch.zeros(codes.CODES, 12))


def build() -> Author:
    """Fresh weights, and a codebook fitted to random scenes."""
    generator, author = torch.Generator().manual_seed(0), Author()
    author.codebook.copy_(codes.fit(pure(scenes.draw(PICTURES, generator)).render(), generator))
    for name, p in author.named_parameters():
        if p.ndim == 2:  # torch's own embeddings are far too large, and outputs of layers add up
            scale = 0.5 if name.endswith(("wo.weight", "w2.weight")) else 1.0
            nn.init.normal_(p, std=0.02 if "embeddings" in name else scale * p.shape[1] ** -0.5)
    return author


def pure(shown: scenes.Scenes) -> scenes.Scenes:
    """``shown`` in the palette's own colours: few enough patches for a codebook."""
    return replace(shown, jitter=torch.zeros_like(shown.jitter))


def losses(author: Author, generator: torch.Generator, device: torch.device) -> Iterator[torch.Tensor]:
    """Cross entropy of every code, given the prompt and the codes before it."""
    examples = scenes.to_draw(BATCH, generator)
    tokens = codes.Codebook(author.codebook).encode(pure(examples.target).render().to(device))
    features = words.embed(scenes.shorten(examples, generator))[0].to(device)
    alone = torch.rand(BATCH, 1, 1, generator=generator) < UNCONDITIONAL
    features = torch.where(alone.to(device), author.transformer.no_condition(BATCH), features)
    with fast(device):
        logits = author.transformer(tokens[:, :-1], features)
    yield F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


JOB = Job("author", build, losses, BATCH, blocks=lambda author: list(author.transformer.layers))
