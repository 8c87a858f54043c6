"""A picture as 8 x 8 codes: each 2 x 2 patch is the nearest of 512 that k-means found among the patches of scenes."""

from __future__ import annotations

import torch

from .editor import pack, unpack

CODES = 512
PATCH = 2  # pixels per code and side


class Codebook:
    """Pictures ``(B, 3, 16, 16)`` in -1..1 to codes ``(B, 64)`` in raster order, and back.

    Args:
        codebook: entries ``(codes, 12)``: packed patches.
    """

    def __init__(self, codebook: torch.Tensor):
        self.codebook = codebook

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """The nearest entry of every patch."""
        tokens = pack(pictures.float())
        return torch.cdist(tokens, self.codebook.float().expand(len(tokens), -1, -1)).argmin(-1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The patches of ``codes``, side by side."""
        return unpack(self.codebook[codes])


def fit(pictures: torch.Tensor, generator: torch.Generator, codes: int = CODES, rounds: int = 15) -> torch.Tensor:
    """Entries ``(codes, 12)`` for ``pictures (n, 3, 16, 16)``: k-means on their patches, started far apart."""
    patches = pack(pictures).flatten(0, 1)
    entries = patches[:1]
    while len(entries) < codes:  # candidates are drawn by their squared distance to what is there
        distance = torch.cdist(patches, entries).amin(1).square()
        count = min(len(entries), codes - len(entries))
        entries = torch.cat([entries, patches[torch.multinomial(distance, count, generator=generator)]])
    for _ in range(rounds):
        nearest = torch.cdist(patches, entries).argmin(1)
        count = torch.bincount(nearest, minlength=codes)[:, None]
        mean = torch.zeros_like(entries).index_add_(0, nearest, patches) / count.clamp(min=1)
        entries = torch.where(count > 0, mean, entries)
    return entries
