"""The pictures of section 4."""

from __future__ import annotations

from pathlib import Path

import torch

from . import scene as scenes
from . import style
from .kontext import CROP_FACTORS, NAMES, RANGE_FACTORS, Settings, crop_levels


def as_picture(latents: torch.Tensor):
    """Pixels in -1..1, ``(3, h, w)``, as an array ``(h, w, 3)`` in 0..1."""
    return (latents / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference over the channels, in 0..1 units of a pixel, ``(h, w)``."""
    return (a - b).abs().mean(0) / 2


def draw_scene(settings: Settings, path: Path) -> Path:
    """Composite, what the model sees of it, mask and saliency levels."""
    from matplotlib import rc_context
    from matplotlib.colors import BoundaryNorm, ListedColormap

    scene, grid = scenes.draw_scene(), settings.grid
    mask, level = crop_levels(scene, grid)
    with rc_context(style.settings()):
        figure = style.new_figure(12.4, 3.5)
        axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1))
        for ax in axes:
            style.picture_axes(ax)
        axes[0].imshow(scene.composite.permute(1, 2, 0).numpy())
        axes[0].set_title("composite: a balloon pasted in")
        axes[1].imshow(scenes.at_size(scene, settings.pixels).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes[1].set_title(f"what the model gets, {settings.pixels} px")
        shade = 0.35 + 0.65 * mask.view(grid, grid).float()
        small = scenes.at_size(scene, grid).permute(1, 2, 0) * shade[..., None]
        axes[2].imshow(small.numpy(), interpolation="nearest")
        axes[2].set_title(f"crop, {int(mask.sum())} of {grid * grid} tokens")
        colours = ["#e8eaed", *_levels_palette()]
        shown = torch.where(mask, level + 1, 0).view(grid, grid)
        image = axes[3].imshow(shown.numpy(), cmap=ListedColormap(colours), norm=BoundaryNorm(range(7), 6))
        axes[3].set_title("saliency level: r, g")
        bar = figure.colorbar(image, ax=axes[3], ticks=[n + 0.5 for n in range(6)], pad=0.03, shrink=0.8)
        bar.ax.set_yticklabels(
            ["outside: 1, 1", *(f"{r:.2f}, {g:.2f}" for r, g in zip(RANGE_FACTORS, CROP_FACTORS, strict=True))]
        )
        bar.ax.tick_params(length=0)
        bar.ax.grid(False)
        return style.save(figure, path)


def draw_runs(runs: dict[str, torch.Tensor], path: Path) -> Path:
    """What each modulation draws, and by how much that differs from the unmodulated run."""
    from matplotlib import rc_context
    from matplotlib.colors import PowerNorm

    with rc_context(style.settings()):
        figure = style.new_figure(12.4, 4.5)
        axes = figure.subplots(2, len(NAMES))
        changes = {name: 100 * difference(runs[name], runs["none"]) for name in NAMES}
        norm = PowerNorm(0.5, vmin=0, vmax=max(float(d.max()) for d in changes.values()))
        for column, name in enumerate(NAMES):
            for ax in axes[:, column]:
                style.picture_axes(ax)
            axes[0, column].imshow(as_picture(runs[name]), interpolation="nearest")
            axes[0, column].set_title("no modulation" if name == "none" else name, loc="center")
            change = changes[name].numpy()
            image = axes[1, column].imshow(change, cmap=style.ATTENTION, norm=norm, interpolation="nearest")
            axes[1, column].set_xlabel(f"mean {change.mean():.2g} %")
        axes[0, 0].set_ylabel("picture")
        axes[1, 0].set_ylabel("change")
        bar = figure.colorbar(image, ax=axes[1, :], pad=0.01, aspect=12)
        bar.set_label("|change| (% of the range)")
        return style.save(figure, path)


def draw_backends(reference: dict, runs: dict[str, dict], path: Path) -> Path:
    """Contact sheet: one row per backend that ran, one column per modulation.

    Args:
        reference: eager in float64, name -> latents.
        runs: backend -> name -> latents.
    """
    from matplotlib import rc_context

    with rc_context(style.settings()):
        figure = style.new_figure(12.4, 2.3 * (len(runs) + 1))
        axes = figure.subplots(len(runs) + 1, len(NAMES), squeeze=False)
        rows = [("eager, float64\n(reference)", reference), *((f"{name}, float32", r) for name, r in runs.items())]
        for row, (label, pictures) in zip(axes, rows, strict=True):
            row[0].set_ylabel(label)
            for ax, name in zip(row, NAMES, strict=True):
                style.picture_axes(ax)
                ax.imshow(as_picture(pictures[name]), interpolation="nearest")
                if pictures is not reference:
                    error = float((pictures[name] - reference[name]).abs().max())
                    ax.set_xlabel(f"max |Δ| {error:.0e}")
        for ax, name in zip(axes[0], NAMES, strict=True):
            ax.set_title("no modulation" if name == "none" else name, loc="center")
        return style.save(figure, path)


def _levels_palette() -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[style.SEQUENTIAL](x)) for x in (0.0, 0.28, 0.52, 0.76, 1.0)]
