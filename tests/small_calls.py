"""Small calls that are right, for tests that make one thing wrong."""

from __future__ import annotations

import torch
from numerics import (
    DEVICE,
    axial,
    generator,
    grid,
    scales,
    tensors,
)

import fastrope as fr

TOKENS, PAIRS, BATCH = 12, 8, 2


def good() -> dict:
    g = generator(0)
    q, k, v = tensors(g, batch=BATCH, queries=TOKENS, heads=4, key_heads=2, dim=2 * PAIRS)
    return dict(q=q, k=k, v=v, rope=axial(grid(TOKENS), 2 * PAIRS))


def ones(*shape: int, **options) -> torch.Tensor:
    return torch.ones(*shape, device=options.pop("device", DEVICE), **options)


def modulated(g=None) -> dict:
    g = g or generator(2)
    return {"modulations": [fr.QueryScale(scales(g, "levels", TOKENS), slice(4, None), (1, 2)), fr.BiasDelta(1.2, 0.9)]}
