"""The picture of the idea: what one query looks at in a reference picture, plain and under each modulation.

``python -m fastrope.demo.idea docs`` writes ``idea-light.png`` and ``idea-dark.png``, for a README that follows the
reader's theme.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import fastrope as fr

from . import scene as scenes
from . import style
from .probe import attention_weights, grid_positions
from .untwisting import head_weights

AXES, GRID, SEED = (16, 56, 56), 64, 3
QUERY = (18, 23)  # row, column
NEAR, ALIKE, WIDTH = 3.2, 1.5, 8.0  # preference for near keys, for keys of like colour, and how like
SCALE, S_HF, S_LF, BIAS, DELTA, GAIN = 0.35, 0.0, 1.25, 1.0, 1.5, 0.5


@dataclass(frozen=True)
class Panel:
    """One modulation: its name, its formula as math text, what it does, and the weights ``(GRID, GRID)``."""

    name: str
    formula: str
    effect: str
    weights: torch.Tensor


def tokens_of(picture: torch.Tensor, near: float = NEAR, alike: float = ALIKE) -> torch.Tensor:
    """Queries, or keys, ``(rows * columns, D)`` of a picture ``(3, rows, columns)``; ``near`` and ``alike`` say how
    strongly they prefer what is close and what has their colour.

    Keys prefer near queries through the fast pairs of each axis and queries of their own colour through the slow ones:
    pair ``c`` of a token with colour ``x`` is ``(cos w_c x, sin w_c x)``, whose dot product is a kernel in the colour.
    """
    generator = torch.Generator().manual_seed(SEED)
    band = torch.cat([torch.linspace(0, 1, dim // 2) for dim in AXES])
    spatial = torch.cat([torch.zeros(AXES[0] // 2), torch.ones((AXES[1] + AXES[2]) // 2)])
    fast = near * spatial * torch.exp(-0.5 * ((band - 0.27) / 0.1) ** 2)
    slow = alike * spatial * (band > 0.6)
    frequencies = torch.randn(3, len(band), generator=generator) / (0.1 * WIDTH)
    phase = 2 * torch.pi * torch.rand(len(band), generator=generator)
    turn = torch.where(slow > 0, picture.flatten(1).T @ frequencies, phase)  # (tokens, pairs)
    length = fast + slow
    return torch.stack([length * turn.cos(), length * turn.sin()], dim=-1).flatten(1)


def compute(device: torch.device) -> tuple[list[Panel], torch.Tensor]:
    """The five panels, and the crop ``(GRID, GRID)`` that LogitGain covers."""
    scene = scenes.draw_scene()
    keys = tokens_of(scenes.at_size(scene, GRID))
    positions, index = grid_positions(GRID, GRID), QUERY[0] * GRID + QUERY[1]
    rope = fr.RoPE.axial(positions[index : index + 1].to(device), AXES)
    key_rope = fr.RoPE.axial(positions.to(device), AXES)
    crop = scenes.mask_tokens(scene, GRID, dilate=3)
    one = torch.ones(1, device=device)
    modulations = {
        "plain": (),
        "QueryScale": (fr.QueryScale(SCALE * one, axes=(1, 2)),),
        "BandWeight": (fr.BandWeight(head_weights(AXES, S_HF, S_LF).to(device)),),
        "BiasDelta": (fr.BiasDelta(BIAS, DELTA),),
        "LogitGain": (fr.LogitGain(GAIN * one, keys=crop.to(device)),),
    }
    texts = {
        "plain": (r"$\langle R(\varphi_i)\,q_i,\ R(\varphi_j)\,k_j\rangle$", "looks near, and at\nwhat is like itself"),
        "QueryScale": (r"$\varphi \rightarrow r_i\,\varphi$", "positions shrink:\nthe view widens"),
        "BandWeight": (r"$k_c \rightarrow w_c\,k_c$", "fast bands fade: likeness\ncounts, place does not"),
        "BiasDelta": (r"$k \rightarrow \lambda\mu + \delta\,(k-\mu)$", "δ is a temperature,\nλ the group's share"),
        "LogitGain": (r"$s_{ij} \rightarrow g_i\,s_{ij}$", "a crop of the keys\nquieter (or louder)"),
    }
    q, k = keys[None, index : index + 1].to(device), keys[None].to(device)
    panels = []
    for name, mods in modulations.items():
        weights = attention_weights(q, k, rope=rope, key_rope=key_rope, modulations=mods)
        panels.append(Panel(name, *texts[name], weights[0, 0].view(GRID, GRID).double().cpu()))
    return panels, crop.view(GRID, GRID)


def draw(panels: list[Panel], crop: torch.Tensor, path: Path, paper: style.Paper) -> Path:
    """A spotlight per panel: the reference picture, lit where the query looks."""
    from matplotlib import rc_context

    composite = scenes.draw_scene().composite
    cell = scenes.SIZE / GRID
    with rc_context(style.settings(paper)):
        figure = style.new_figure(12.4, 3.6, paper)
        axes = figure.subplots(1, len(panels))
        for n, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
            spotlight(ax, composite, panel.weights / panel.weights.quantile(0.993), QUERY, paper)
            if panel.name == "LogitGain":
                grid = ((torch.arange(GRID) + 0.5) * cell).numpy()
                ax.contour(grid, grid, crop.float().numpy(), [0.5], colors="white", linewidths=1.2, linestyles="--")
            ax.set_title(panel.name if n else "attention with RoPE", fontsize=13, fontweight="bold", loc="center")
            ax.set_xlabel(f"{panel.formula}\n{panel.effect}", fontsize=11.5, linespacing=1.45, labelpad=8,
                          parse_math=True)  # fmt: skip
        return style.save(figure, path)


def spotlight(ax, picture: torch.Tensor, weights: torch.Tensor, query: tuple[int, int], paper: style.Paper) -> None:
    """A picture ``(3, h, w)``, lit as far as ``weights (rows, columns)`` go from 0 to 1, with a ring at the query."""
    size, cell = picture.shape[1:], picture.shape[1] / weights.shape[0]
    light = F.interpolate(weights.clamp(0, 1).sqrt()[None, None].float(), size=size, mode="bilinear")[0]
    grey = picture.mean(0, keepdim=True)
    lit = 0.34 * grey + light * (picture - 0.34 * grey)
    ax.imshow(lit.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    x, y = (query[1] + 0.5) * cell, (query[0] + 0.5) * cell
    for colour, width in (("white", 2.2), ("black", 0.8)):
        ax.plot(x, y, "o", markersize=8, fillstyle="none", markeredgecolor=colour, markeredgewidth=width)
    style.picture_axes(ax, paper)


def main(argv: list[str] | None = None) -> int:
    """Write both pictures into the folder named (``docs`` by default)."""
    style.require_extras()
    arguments = sys.argv[1:] if argv is None else argv
    folder = Path(arguments[0] if arguments else "docs")
    panels, crop = compute(torch.device("cpu"))
    for name, paper in (("light", style.LIGHT), ("dark", style.DARK)):
        print(draw(panels, crop, folder / f"idea-{name}.png", paper))
    return 0


if __name__ == "__main__":
    sys.exit(main())
