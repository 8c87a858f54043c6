"""Maps over an image or its token grid: ``(B, h, w)`` float64 or bool; ``B = 1`` if all batch rows share one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..checks import require
from ..device import wide_on_cpu

COVERAGE = 0.25  # a token is inside a mask that covers at least this share of its area
SIGMA = 1.1  # of the 5 x 5 Gaussian; image libraries derive it from the width: 0.3 ((5 - 1) / 2 - 1) + 0.8
GAUSSIAN = tuple(math.exp(-0.5 * (n / SIGMA) ** 2) for n in range(-2, 3))


def as_map(name: str, value: Any) -> torch.Tensor:
    """A copy of an array or tensor ``(h, w)`` or ``(B, h, w)`` as ``(B, h, w)`` float64 on the CPU.

    Raises:
        ValueError: another rank, an empty map, values that are not finite.
    """
    hint = "an array or tensor (h, w) or (B, h, w)"
    require(isinstance(value, (np.ndarray, torch.Tensor)), name, hint, type(value).__name__)
    x = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.detach()
    x = wide_on_cpu(x).clone()
    require(x.ndim in (2, 3) and x.numel() > 0, name, hint, tuple(x.shape))
    require(bool(x.isfinite().all()), name, "finite values", "values that are not")
    return x.reshape(-1, *x.shape[-2:])


def crop_mask(composite: torch.Tensor, original: torch.Tensor, threshold: float = 5.0) -> torch.Tensor:
    """Where any channel of two pictures ``(B, 3, H, W)`` differs by more than ``threshold`` of 255; ``(B, H, W)``."""
    return ((composite - original).abs() > threshold).any(dim=1)


def dilate(mask: torch.Tensor, iterations: int) -> torch.Tensor:
    """A mask ``(B, h, w)`` grown ``iterations`` times by a 4-connected cross."""
    for _ in range(iterations):
        grown = mask.clone()
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        grown[:, :, 1:] |= mask[:, :, :-1]
        grown[:, :, :-1] |= mask[:, :, 1:]
        mask = grown
    return mask


def areas(mask: torch.Tensor) -> list[torch.Tensor]:
    """The 4-connected areas of one mask ``(1, h, w)``, each a mask of that shape."""
    left, found = mask.clone(), []
    while bool(left.any()):
        area = torch.zeros_like(left)
        area.view(-1)[left.view(-1).nonzero()[0]] = True
        while not torch.equal(grown := dilate(area, 1) & left, area):
            area = grown
        found.append(area)
        left &= ~area
    return found


def resize(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A map averaged over the cells of ``grid = (rows, columns)``; a map of that size comes back as it is."""
    return x if tuple(x.shape[1:]) == tuple(grid) else F.interpolate(x[:, None], size=tuple(grid), mode="area")[:, 0]


def resize_mask(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Cells of ``grid`` of which a mask ``(B, h, w)`` covers at least a quarter. If it covers no quarter of any cell,
    those of which it covers the most."""
    share = resize(mask.double(), grid)
    most = share.amax(dim=(1, 2), keepdim=True)
    return (share >= most.clamp(max=COVERAGE) - 1e-9) & (share > 0)


def mask_at_centres(name: str, mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Cells of ``grid`` where a mask ``(B, h, w)``, interpolated bilinearly at their centres, is above one half.

    This is no average: only the few pixels around the centre of a cell count.

    Raises:
        ValueError: a row with a paste but without a centre inside.
    """
    share = F.interpolate(mask[:, None].double(), size=tuple(grid), mode="bilinear", align_corners=False)[:, 0]
    inside = share > 128.5 / 255  # values above 128 in an 8-bit picture of the mask
    found = inside.flatten(1).any(dim=1) | ~(mask != 0).flatten(1).any(dim=1)
    require(bool(found.all()), name, f"a paste that covers the centre of a token, on a grid of {tuple(grid)} tokens",
            "one that is too small or too thin")  # fmt: skip
    return inside


def resize_by_overlap(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A map averaged over the cells of ``grid``. A pixel on a border counts in each cell by the area inside it."""
    rows, columns = (_overlaps(n, size).to(x) for n, size in zip(grid, x.shape[1:], strict=True))
    return rows @ x @ columns.T


def _overlaps(cells: int, pixels: int) -> torch.Tensor:
    """``(cells, pixels)``: the share of each cell that each pixel covers."""
    edges = torch.arange(cells + 1, dtype=torch.float64, device="cpu")[:, None] * pixels / cells
    at = torch.arange(pixels, dtype=torch.float64, device="cpu")
    covered = torch.minimum(edges[1:], at + 1) - torch.maximum(edges[:-1], at)
    return covered.clamp(min=0) * cells / pixels


def blur(x: torch.Tensor, line: Sequence[float] = GAUSSIAN, mirrored: bool = False) -> torch.Tensor:
    """A map filtered in both directions with the kernel ``line``, divided by its sum.

    Beyond the edges the outermost cells are repeated. With ``mirrored``, the map is mirrored about them instead.
    """
    kernel, radius = torch.tensor(line, dtype=x.dtype, device=x.device) / sum(line), len(line) // 2
    rows, columns = (_padded_index(n, radius, mirrored) for n in x.shape[1:])
    padded = x[:, rows][:, :, columns]
    return F.conv2d(padded[:, None], (kernel[:, None] * kernel)[None, None])[:, 0]


def _padded_index(cells: int, radius: int, mirrored: bool) -> torch.Tensor:
    """The cell that stands at each place from ``-radius`` to ``cells - 1 + radius``."""
    at = torch.arange(-radius, cells + radius, device="cpu")
    if not mirrored or cells == 1:
        return at.clamp(0, cells - 1)
    at = at.abs() % (2 * (cells - 1))
    return torch.minimum(at, 2 * (cells - 1) - at)


def normalise(x: torch.Tensor) -> torch.Tensor:
    """Each row of a map, stretched to 0..1 (min-max). A flat row becomes 0.5, because nothing in it stands out."""
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    span = high - low
    flat = span <= 1e-12 * high.abs().clamp(min=1e-300)
    return torch.where(flat, 0.5, (x - low) / torch.where(flat, 1.0, span))


def fill_outside(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A map with the smallest value inside a mask for all cells outside, row by row."""
    inside = torch.where(mask, x, math.inf).amin(dim=(1, 2), keepdim=True)
    return torch.where(mask, x, torch.where(inside.isinf(), x.amin(dim=(1, 2), keepdim=True), inside))
