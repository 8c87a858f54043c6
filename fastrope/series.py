"""Tables of the series kernel: which queries share a turn of the scaled keys, and how far apart their scales may lie.

The kernel (``kernels/series.py``) turns the keys by the middle scale of a tile of queries and leaves the rest, an angle
``x = (r_i - r) psi_j``, to a polynomial, of degree 3 for the half of the pairs that reach furthest and of degree 1 for
the others. Its error is at most ``x^4 / 187`` and ``x^2 / 4`` (Chebyshev's, of ``exp(i x)``), which bounds the width of
a tile. Like ``lowering.py`` this runs on CPU tensors and knows nothing of backends.
"""

from __future__ import annotations

import torch

from .lowering import SLOT_TILE

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}  # with tables of tiles of their own, by suffix
LEAST_FILLED = 0.5  # of the tiles' slots; with less the exact kernel, whose tiles hold 16 queries, is predicted faster


def tables(
    factor: torch.Tensor,
    slots: torch.Tensor,
    counts: list[int],
    angles: torch.Tensor,
    pairs: torch.Tensor,
    pairing: str,
) -> tuple[dict[str, torch.Tensor], float]:
    """Tables of a plan and the reach of its keys; none where tiles would be too empty in every dtype.

    Args:
        factor: ``(Bs, Sq)`` minus what the angles of keys are multiplied by for each query, float64.
        slots: ``(Bs, N)`` queries, those with a scale of their own first, sorted by it.
        counts: of queries with a scale of their own, in each row.
        angles: ``(Bk, n, D/2)`` of the scaled keys, in key order, float64.
        pairs: ``(D/2,)`` bool, the pairs that scales turn.
    """
    least, most = angles.amin(1), angles.amax(1)
    origin = torch.where(pairs, (least + most) / 2, 0.0)  # (Bk, D/2)
    furthest = torch.where(pairs, (most - least) / 2, 0.0).amax(0)  # (D/2,)
    reach = float(furthest.max()) or 1.0
    order = furthest.argsort(descending=True, stable=True)
    half = half_of(len(order))
    far, near = (float(furthest[order[n]]) if n < len(order) else 0.0 for n in (0, half))
    own = [row[slot[:n].long()] for row, slot, n in zip(factor, slots, counts, strict=True)]
    found, most_turned = {}, float(torch.cat(own).abs().max())
    for dtype, name in DTYPES.items():
        width = tile_width(far, near, most_turned, dtype)
        bounds = [tile_bounds(-row, width) for row in own]
        if width and sum(counts) >= LEAST_FILLED * SLOT_TILE * sum(len(b) - 1 for b in bounds):
            found |= {f"series_tiles_{name}": _stack(bounds), f"series_middle_{name}": _middles(own, bounds)}
    if not found:
        return {}, 0.0
    columns = torch.full((2 * half,), -1)
    columns[: len(order)] = order
    first, second = (2 * columns, 2 * columns + 1) if pairing == "interleaved" else (columns, columns + len(order))
    phase = torch.where(pairs, angles - origin[:, None], 0.0) / reach
    phase = torch.where(columns >= 0, phase[..., columns], 0.0).unflatten(2, (2, half)).transpose(1, 2)
    return {
        **found, "series_columns": columns.int(),
        "series_channels": torch.stack([first, second], dim=1).clamp(min=0).view(2, 2 * half),
        "series_origin": origin * (2 / torch.pi), "series_share": (furthest / reach).float(),
        "series_phase": phase.float().contiguous(),
    }, reach  # fmt: skip


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
    """Bounds of tiles of ascending scales ``r (n,)``, of at most ``SLOT_TILE`` queries ``width`` apart."""
    ends, bounds = torch.searchsorted(r, r + width, right=True).tolist(), [0]
    while (first := bounds[-1]) < len(r):
        bounds.append(min(max(ends[first], first + 1), first + SLOT_TILE))
    return bounds


def _stack(bounds: list[list[int]]) -> torch.Tensor:
    """``(B, T + 1)`` int32; rows of fewer tiles end in empty ones."""
    longest = max(map(len, bounds))
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in bounds], dtype=torch.int32)


def _middles(own: list[torch.Tensor], bounds: list[list[int]]) -> torch.Tensor:
    """``(B, T, 2)`` float32: the factor in the middle of each tile of ``own``, sorted, and how far its ends lie off."""
    out = torch.zeros(len(bounds), max(map(len, bounds)) - 1, 2)
    for b, (row, ends) in enumerate(zip(own, bounds, strict=True)):
        first, last = row[ends[:-1]], row[[end - 1 for end in ends[1:]]]
        out[b, : len(first)] = torch.stack([(first + last) / 2, (first - last).abs() / 2], dim=1)
    return out
