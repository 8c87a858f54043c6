"""The polynomial for queries with per-query scales, in 16 bits: which queries share a turn of the scaled keys, and how
far apart their scales may lie.

The kernel (``kernels/polynomial.py``) turns the keys by the middle scale of a tile of queries. It leaves the remaining
angle ``x = (r_i - r) psi_j`` to a polynomial, of degree 3 for the half of the pairs that reach furthest and of degree 1
for the others. The error is at most ``x^4 / 187`` and ``x^2 / 4`` (Chebyshev's, of ``exp(i x)``). This bounds the width
of a tile.

It has one entry, :func:`polynomial`.
"""

from __future__ import annotations

import torch

from ..kernels.abi import QUERY_TILE
from ..kernels.tables import Polynomial, PolynomialTiles
from .axis_blocks import split
from .resolved import Scale
from .tables import Rotation, SortedQueries

LEAST_FILLED = 0.5  # of a tile's places; with less, axis blocks, whose tiles hold 16 queries, are predicted faster


def polynomial(
    scale: Scale,
    queries: SortedQueries,
    counts: list[int],
    angles: torch.Tensor,
    rows: torch.Tensor,
    source: torch.Tensor,
    pairing: str,
    applied: bool,
) -> Polynomial | None:
    """Tables of a plan; None where tiles would be too empty in every dtype, or float32 could not turn the keys.

    Args:
        counts: of queries with per-query scales, in each row of the scale.
        angles: ``(Bk, n, D/2)`` float64 of the scaled keys, in key order.
        rows, source: ``(n,)`` of the scaled keys: where they stand in key order, and which token each is.
        applied: True where keys arrive rotated.
    """
    turned_by = 1 - scale.r if applied else -scale.r
    least, most = angles.amin(1), angles.amax(1)
    origin = torch.where(scale.pairs, (least + most) / 2, 0.0)  # (Bk, D/2)
    furthest = torch.where(scale.pairs, (most - least) / 2, 0.0).amax(0)  # (D/2,)
    max_key_angle = float(furthest.max()) or 1.0
    order = furthest.argsort(descending=True, stable=True)
    half = half_of(len(order))
    far, near = (float(furthest[order[n]]) if n < len(order) else 0.0 for n in (0, half))
    factors = [row[places[:n].long()] for row, places, n in zip(turned_by, queries.queries, counts, strict=True)]
    most_turned = float(torch.cat(factors).abs().max())
    tiles = {}
    for name in ("float16", "bfloat16"):
        width = tile_width(far, near, most_turned, getattr(torch, name))
        bounds = [tile_bounds(-row, width) for row in factors]
        filled = width and sum(counts) >= LEAST_FILLED * QUERY_TILE * sum(len(b) - 1 for b in bounds)
        tiles[name] = PolynomialTiles(_stack(bounds), _middles(factors, bounds)) if filled else None
    if not any(tiles.values()):
        return None
    columns = torch.full((2 * half,), -1, device="cpu")
    columns[: len(order)] = order
    first, second = (2 * columns, 2 * columns + 1) if pairing == "interleaved" else (columns, columns + len(order))
    phase = torch.where(scale.pairs, angles - origin[:, None], 0.0) / max_key_angle
    phase = torch.where(columns >= 0, phase[..., columns], 0.0).unflatten(2, (2, half)).transpose(1, 2)
    made: Rotation | None = None
    if not applied:  # scaled keys packed for the polynomial alone, turned on the pairs that no scale turns
        made = Rotation.of(torch.where(scale.pairs, 0.0, angles))
        rows = torch.arange(len(rows), device="cpu")
    return Polynomial(
        columns=columns.int(), share=(furthest / max_key_angle).float(), origin=split(origin * (2 / torch.pi)),
        factor=split(turned_by), phase=phase.float().contiguous(), max_key_angle=max_key_angle, **tiles,
        channels=torch.stack([first, second], dim=1).clamp(min=0).view(2, 2 * half).int(), rows=rows.int(),
        source=made and source.int(), cos=made and made.cos, sin=made and made.sin,
    )  # fmt: skip


def half_of(pairs: int) -> int:
    """Pairs that go together in the kernel: half of them, in a power of two, at least 8."""
    return max(8, 1 << (pairs - 1).bit_length() - 1)


def tile_width(far: float, near: float, factor: float, dtype: torch.dtype) -> float:
    """How far apart the scales of a tile may lie so that no pair is turned wrongly by more than half of what rounding
    to ``dtype`` can change in it; 0 where float32 cannot turn the keys so exactly, however equal the scales.

    Args:
        far, near: radians that the two halves of the pairs reach.
        factor: the largest by which float32 turns the keys.
    """
    allowed = torch.finfo(dtype).eps / 4 - factor * far * 2.0**-22
    if allowed <= torch.finfo(dtype).eps / 8:
        return 0.0
    widths = [2 * x / angle for x, angle in (((187 * allowed) ** 0.25, far), (2 * allowed**0.5, near)) if angle]
    return min(widths, default=float("inf"))


def tile_bounds(r: torch.Tensor, width: float) -> list[int]:
    """Bounds of tiles of ascending scales ``r (n,)``, of at most ``QUERY_TILE`` queries ``width`` apart."""
    ends, bounds = torch.searchsorted(r, r + width, right=True).tolist(), [0]
    while (first := bounds[-1]) < len(r):
        bounds.append(min(max(ends[first], first + 1), first + QUERY_TILE))
    return bounds


def _stack(bounds: list[list[int]]) -> torch.Tensor:
    """``(B, T + 1)`` int32; rows of fewer tiles end in empty ones."""
    longest = max(map(len, bounds))
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in bounds], dtype=torch.int32, device="cpu")


def _middles(factors: list[torch.Tensor], bounds: list[list[int]]) -> torch.Tensor:
    """``(B, T, 2)`` float32: the middle of each tile of ``factors``, sorted, and how far its ends lie from it."""
    out = torch.zeros(len(bounds), max(map(len, bounds)) - 1, 2, dtype=torch.float32, device="cpu")
    for b, (row, ends) in enumerate(zip(factors, bounds, strict=True)):
        first, last = row[ends[:-1]], row[[end - 1 for end in ends[1:]]]
        out[b, : len(first)] = torch.stack([(first + last) / 2, (first - last).abs() / 2], dim=1)
    return out
