"""A LlamaGen small enough for any machine, with random weights and a fixed seed; its tokens are colours.

The tokenizer is no network: a code is the nearest of 125 colours to a patch's mean, so a picture survives it in
mosaic. Prompts are hashed words. Nothing here has learned anything: edits show the bookkeeping, not taste.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..bindings.llamagen import LlamaGen

LEVELS, PATCH = 5, 8  # colour levels per channel; pixels per code and side
WORDS, CHANNELS = 8, 16
CONTRAST = 24.0  # of the random output layer, so that some colours are likelier than others


class Mosaic:
    """Pixels ``(B, 3, H, W)`` in -1..1 to colours ``(B, N)`` and back."""

    def __init__(self, grid: int, device: torch.device) -> None:
        level = torch.linspace(-1, 1, LEVELS, device=device)
        self.grid, self.codebook = grid, torch.cartesian_prod(level, level, level)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The entry nearest to each patch's mean."""
        mean = torch.nn.functional.avg_pool2d(pixels.float(), PATCH).flatten(2).transpose(1, 2)
        return torch.cdist(mean, self.codebook.expand(len(mean), -1, -1)).argmin(-1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Patches of one colour."""
        colours = self.codebook[codes].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return colours.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


def describe(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``(B, WORDS, CHANNELS)`` of the last words of each prompt, at the end, and which of them count."""
    features = torch.zeros(len(prompts), WORDS, CHANNELS)
    mask = torch.zeros(len(prompts), WORDS, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        words = prompt.lower().split()[-WORDS:]
        for place, word in enumerate(words, WORDS - len(words)):
            generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
            features[row, place] = torch.randn(CHANNELS, generator=generator)
            mask[row, place] = True
    return features, mask


def tiny_model(size: int, device: torch.device, dtype: torch.dtype) -> LlamaGen:
    """The model on a grid of ``size x size``; the same weights every time."""
    from ..bindings.llamagen import LlamaGen, LlamaGenConfig

    config = LlamaGenConfig(
        dim=64, layers=2, heads=4, grid=size, vocabulary=LEVELS**3, prefix=WORDS, caption_dim=CHANNELS, hidden=128
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaGen(config).eval()
        model.output.weight.mul_(CONTRAST / config.dim**0.5)
    return model.to(device=device, dtype=dtype)
