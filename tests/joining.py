"""Streams as projections leave them, and plans of their joint sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numerics import (
    axial,
    draw,
    generator,
    grid,
    lay_out,
    uniform,
)

import fastrope as fr

TEXT, IMAGE, DIM = 9, 25, 16


def streams(
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[int] = (TEXT, IMAGE),
    batch: int = 2,
    dim: int = DIM,
    layouts: Sequence[str] = ("fused", "fused"),
    weights: Sequence[torch.dtype | None] | None = None,
    heads: tuple[int, int] = (2, 1),
) -> list[fr.Stream]:
    """One stream per length, everything drawn; ``weights`` the dtype of each stream's norms, None for no weights;
    ``heads`` of queries and of keys."""
    g = generator(3)
    found = []
    for n, length in enumerate(lengths):
        q = draw(g, batch, length, heads[0], dim, dtype=dtype)
        k, v = (draw(g, batch, length, heads[1], dim, dtype=dtype) for _ in range(2))
        kind, drawn = dtype if weights is None else weights[n], uniform(g, 2, dim, low=0.5, high=1.5)
        norms = [fr.Norm(None if kind is None else w.to(kind), 10.0**-n) for w in drawn]
        found.append(fr.Stream(*(lay_out(x, layouts[n]) for x in (3 * q, 0.2 * k, v)), *norms))
    return found


def a_plan(length: int = TEXT + IMAGE, dim: int = DIM, pairing: str = "interleaved", **more) -> fr.Plan:
    return fr.plan(rope=axial(grid(length, min(TEXT, length // 2)), dim, pairing), **more)


def group(delta: float = 0.8, length: int = TEXT + IMAGE) -> list:
    return [fr.BiasDelta(1.0, delta, keys=slice(length // 3, None))]
