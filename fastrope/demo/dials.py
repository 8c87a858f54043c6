"""The picture of the dials: what a query of the target looks at in a reference, over s_hf, s_lf and beta.

``python -m fastrope.demo.dials docs`` writes ``untwisting-dials.png``, for docs/untwisting.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import fastrope as fr

from . import idea, style
from . import scene as scenes
from .probe import attention_weights, grid_positions

GRID, QUERY = 64, (0.35, 0.62)  # of rows, of columns: the target's balloon, where the reference has sky
ROWS = (
    ("s_hf", (1.0, 0.75, 0.5, 0.25, 0.0), {"s_lf": 1.2, "beta": 2.0}),
    ("s_lf", (0.6, 0.8, 1.0, 1.2, 1.5), {"s_hf": 0.25, "beta": 2.0}),
    ("beta", (0.5, 1.0, 2.0, 3.0, 5.0), {"s_hf": 0.25, "s_lf": 1.5}),
)
PLACE, COLOUR = 3.0, 2.0  # how strongly a query prefers keys that are near, and keys of its colour
NEAR = 0.06  # of the side, around the query's own place


@dataclass(frozen=True)
class Panel:
    """Attention to the reference at one setting of the dials.

    Args:
        weights: ``(grid, grid)``, of a softmax over the target's own tokens and the reference's.
        share: their sum.
        locked: the part of it next to the query's own place.
    """

    dial: str
    value: float
    weights: torch.Tensor
    share: float
    locked: float


def compute(device: torch.device, grid: int = GRID) -> list[list[Panel]]:
    """One row of panels per dial. The target is the scene the other way round."""
    scene = scenes.at_size(scenes.draw_scene(), grid)
    row, column = place(grid)
    index = row * grid + column
    own, reference = (idea.tokens_of(picture, PLACE, COLOUR) for picture in (scene.flip(2), scene))
    layout = fr.TokenLayout(0, (grid, grid), shared=[(grid, grid)])
    positions = grid_positions(grid, grid)
    rope = fr.RoPE.axial(positions[index : index + 1].to(device), idea.AXES)
    key_rope = fr.RoPE.axial(torch.cat([positions, positions]).to(device), idea.AXES)
    q, k = own[None, index : index + 1].to(device), torch.cat([own, reference])[None].to(device)
    near = (positions[:, 1:] - positions[index, 1:]).double().norm(dim=1) <= NEAR * grid
    found = []
    for dial, values, others in ROWS:
        found.append([])
        for value in values:
            method = fr.UntwistingRoPE(**{dial: value}, **others, adain=0.0)
            mods = method.modulations(fr.Site(layout, axes_dim=idea.AXES))
            seen = attention_weights(q, k, rope=rope, key_rope=key_rope, modulations=mods)[0, 0]
            seen = seen[layout.shared].double().cpu()
            share = float(seen.sum())
            found[-1].append(Panel(dial, value, seen.view(grid, grid), share, float(seen[near].sum()) / share))
    return found


def place(grid: int) -> tuple[int, int]:
    """Row and column of the query."""
    return int(QUERY[0] * grid), int(QUERY[1] * grid)


def draw(rows: list[list[Panel]], path: Path) -> Path:
    """A spotlight per panel, each on a scale of its own: where a query looks; how much of it is written below."""
    from matplotlib import rc_context

    composite = scenes.draw_scene().composite
    with rc_context(style.settings()):
        figure = style.new_figure(9.8, 7.3)
        axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        for line, panels, (_, _, others) in zip(axes, rows, ROWS, strict=True):
            for ax, panel in zip(line, panels, strict=True):
                weights = panel.weights / panel.weights.quantile(0.995)
                idea.spotlight(ax, composite, weights, place(len(weights)), style.LIGHT)
                ax.set_title(f"{panel.dial} {panel.value:g}", loc="center", fontweight="bold")
                ax.set_xlabel(f"share {panel.share:.2g}, {panel.locked:.0%} here")
            line[0].set_ylabel(", ".join(f"{name} {value:g}" for name, value in others.items()))
        return style.save(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Write the picture into the folder named (``docs`` by default)."""
    style.require_extras()
    arguments = sys.argv[1:] if argv is None else argv
    print(draw(compute(torch.device("cpu")), Path(arguments[0] if arguments else "docs") / "untwisting-dials.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
