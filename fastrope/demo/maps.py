"""Section 2: where one query looks on a reference grid when its positions shrink."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fastrope as fr

from . import style
from .probe import attention_weights, grid_positions, smooth_noise

AXES, SEED = (16, 56, 56), 0
SCALES = (1.0, 0.8, 0.65, 0.3)
COMMON, NOISE = 3.0, 0.4  # size of the common vector and of the noise, per channel
CENTRE, WIDTH = 0.3, 0.12  # where the common vector lives on the bands of an axis, 0 the fastest, 1 the slowest


@dataclass(frozen=True)
class Maps:
    """``weights (len(SCALES), grid, grid)`` of one query; ``distance (len(SCALES),)`` mean distance in tokens."""

    grid: int
    query: tuple[int, int]
    weights: torch.Tensor
    distance: torch.Tensor


def common_vector(generator: torch.Generator, axes_dim: tuple[int, ...] = AXES) -> torch.Tensor:
    """``(D,)``: what all tokens share: pairs of random phase, longest where a turn takes tens of tokens, as in heads
    that look near. RoPE turns it into a preference for near keys."""
    band = torch.cat([torch.linspace(0, 1, dim // 2) for dim in axes_dim])
    length = COMMON * torch.exp(-0.5 * ((band - CENTRE) / WIDTH) ** 2)
    phase = 2 * torch.pi * torch.rand(len(band), generator=generator)
    return torch.stack([length * phase.cos(), length * phase.sin()], dim=-1).flatten()


def field(grid: int, common: torch.Tensor, generator: torch.Generator, size: float = NOISE) -> torch.Tensor:
    """``(grid * grid, D)`` features that vary smoothly over a grid, by ``size``, around one common vector."""
    noise = size * smooth_noise((len(common), grid, grid), 1.5, generator)
    return common + noise.flatten(1).T


def compute(device: torch.device, grid: int = 64, wrap: Callable = iter) -> Maps:
    """One query, four values of ``r`` in one call: each row of the call is the same query with another ``r``."""
    generator = torch.Generator().manual_seed(SEED)
    keys = field(grid, common_vector(generator), generator)
    row, column = round(0.4 * grid), round(0.45 * grid)
    index = row * grid + column
    positions = grid_positions(grid, grid)
    rope = fr.RoPE.axial(positions[index].expand(len(SCALES), -1).to(device), AXES)
    key_rope = fr.RoPE.axial(positions.to(device), AXES)
    scale = fr.QueryScale(torch.tensor(SCALES, device=device), axes=(1, 2))
    q = keys[index].expand(1, len(SCALES), -1).to(device)
    weights = attention_weights(q, keys[None].to(device), rope=rope, key_rope=key_rope, modulations=[scale])
    weights = weights[0].double().cpu()  # (scales, grid * grid)
    offsets = (positions - positions[index])[:, 1:].double().norm(dim=1)
    return Maps(grid, (row, column), weights.view(-1, grid, grid), weights @ offsets)


def draw(data: Maps, path: Path) -> Path:
    """The picture of :func:`compute`."""
    from matplotlib import rc_context
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Circle

    with rc_context(style.settings()):
        figure = style.new_figure(12, 3.9)
        panels = figure.subplots(1, len(SCALES), sharey=True)
        top = float(data.weights.max())
        norm = LogNorm(vmin=top / 1e3, vmax=top, clip=True)
        row, column = data.query
        for axes, r, weights, distance in zip(panels, SCALES, data.weights, data.distance, strict=True):
            image = axes.imshow(weights.numpy(), cmap=style.ATTENTION, norm=norm, interpolation="nearest")
            circle = Circle((column, row), float(distance), fill=False, color="white", linestyle="--", linewidth=1.2)
            axes.add_patch(circle)
            axes.plot(column, row, marker="+", color="white", markersize=9, markeredgewidth=1.6)
            axes.grid(False)
            axes.set_title(f"r = {r:g}")
            axes.set_xlabel(f"column (tokens)\nmean distance {distance:.1f} tokens")
            ticks = range(0, data.grid + 1, data.grid // 4)
            axes.set_xticks(list(ticks)[:-1])
            axes.set_yticks(list(ticks)[:-1])
        panels[0].set_ylabel("row (tokens)")
        bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.015, extend="min")
        bar.set_label("attention weight (log scale)")
        return style.save(figure, path)
