"""Pictures of an edit: what was drawn, which tokens moved, how the window closed; one report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..islock import ISLock
from ..outputs import write_picture
from ..pictures import to_picture

CLASSES = ("kept", "moved", "fallback")


@dataclass(frozen=True)
class Run:
    """An edit: pixels ``(1, 3, H, W)`` and ``(B, 3, H, W)`` in 0..1, and the record of its B rows."""

    lock: ISLock
    grid: tuple[int, int]
    record: object
    source: str
    prompt: str | None
    edit_prompts: Sequence[str]
    original: torch.Tensor
    edits: torch.Tensor
    plain: torch.Tensor | None
    conditions: str


def names(edits: int) -> list[str]:
    """The files that :func:`write` makes."""
    pictures = ["original", *(f"edit-{row}" for row in range(edits)), "pictures", "map", "window"]
    return [*(f"{name}.png" for name in pictures), "report.md", "report.html"]


def write(run: Run, out: Path) -> tuple[Path, Path]:
    """Draw everything into ``out`` and write ``report.md`` and ``report.html`` around it."""
    from ..demo import report

    write_picture(out / "original.png", to_picture("original", run.original))
    for row, edit in enumerate(run.edits):
        write_picture(out / f"edit-{row}.png", to_picture(f"edit {row}", edit))
    lock, conditions = run.lock, report.literal(run.conditions)
    rule = f"K {lock.candidates}, alpha {lock.alpha:g}, tau {lock.tau:g}, metric {lock.metric}"
    counts = run.record.counts()
    total = run.grid[0] * run.grid[1]
    rows = tuple(
        (prompt, *(f"{counts[name][row]} ({counts[name][row] / total:.0%})" for name in CLASSES), _median(run, row))
        for row, prompt in enumerate(run.edit_prompts)
    )
    origin = "a picture" if run.source == "picture" else f"the prompt “{report.literal(run.prompt)}”"
    sections = [
        report.Section("1. Pictures", (
            report.Picture(
                draw_pictures(run, out / "pictures.png"),
                "The original, as its tokens decode, and the edits"
                + (", each above the same prompt without anchors." if run.plain is not None else "."),
                "Original and edited pictures side by side", f"{conditions}, {rule}",
            ),
        )),
        report.Section("2. Tokens", (
            "Kept: the original's token was among the candidates. Moved: another candidate lay within tau of it, and "
            "the nearest was taken. Fallback: none did, and the most probable token was taken.",
            report.Picture(
                draw_map(run, out / "map.png"), "What happened to each token, at its place in the image.",
                "Map of kept, moved and fallback tokens over the grid", f"{conditions}, {rule}",
            ),
            report.Table(
                ("edit prompt", *CLASSES, "median distance"), rows,
                "Tokens of each class, and the median distance of the nearest candidate to the anchor.",
                f"{conditions}, {rule}",
            ),
        )),
        report.Section("3. Window", (
            report.Picture(
                draw_window(run, out / "window.png"),
                "Candidates compared at every token, in the order they are drawn, and how far the nearest was.",
                "Window size and nearest distance over time", f"{conditions}, {rule}",
            ),
        )),
    ]  # fmt: skip
    lead = f"Anchor token matching (ISLock) between {origin} and {len(run.edits)} edit(s): `fastrope ar-edit`."
    return report.write("FastRoPE: an autoregressive edit", lead, sections, out)


def draw_pictures(run: Run, path: Path) -> Path:
    """Original and edits in a row, edits without anchors below."""
    from matplotlib import rc_context

    from ..demo import style

    columns, lines = 1 + len(run.edits), 1 if run.plain is None else 2
    with rc_context(style.settings()):
        figure = style.new_figure(3.2 * columns, 3.4 * lines)
        panels = figure.subplots(lines, columns, squeeze=False)
        title = "original" if run.prompt is None or run.source == "picture" else _short(run.prompt)
        _show(panels[0, 0], run.original[0], title)
        for column, (edit, prompt) in enumerate(zip(run.edits, run.edit_prompts, strict=True), 1):
            _show(panels[0, column], edit, _short(prompt))
            if run.plain is not None:
                _show(panels[1, column], run.plain[column - 1], "without anchors")
        if run.plain is not None:
            panels[1, 0].set_axis_off()
        return style.save(figure, path)


def draw_map(run: Run, path: Path) -> Path:
    """A map over the grid for every edit."""
    from matplotlib import rc_context
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    from ..demo import style

    colours = (style.BLUE, style.ORANGE, style.PINK)
    with rc_context(style.settings()):
        figure = style.new_figure(3.4 * len(run.edits) + 1.2, 3.6)
        panels = figure.subplots(1, len(run.edits), squeeze=False)[0]
        for row, (axes, prompt) in enumerate(zip(panels, run.edit_prompts, strict=True)):
            style.picture_axes(axes)
            axes.imshow(classes(run, row).numpy(), cmap=ListedColormap(colours), vmin=-0.5, vmax=2.5)
            axes.set_title(_short(prompt))
        handles = [Patch(color=colour, label=name) for colour, name in zip(colours, CLASSES, strict=True)]
        figure.legend(handles=handles, loc="outside right center")
        return style.save(figure, path)


def draw_window(run: Run, path: Path) -> Path:
    """Window size over time, the formula behind it, and the nearest distances."""
    from matplotlib import rc_context

    from ..demo import style

    total = run.grid[0] * run.grid[1]
    with rc_context(style.settings()):
        figure = style.new_figure(9, 3.4)
        left, right = figure.subplots(1, 2)
        formula = [run.lock.window(i, total) for i in range(total)]
        left.plot(formula, color=style.BLUE, label="floor(K (1 - alpha i / N))")
        for row, prompt in enumerate(run.edit_prompts):
            label = f"edit {row}: {_short(prompt)}"
            left.plot(run.record.window[row].tolist(), color=style.ORANGE, alpha=0.7, linewidth=1, label=label)
            distance = [d if math.isfinite(d) else math.nan for d in run.record.distance[row].tolist()]
            right.plot(distance, ".", markersize=3, label=label)
        left.set(xlabel="token, in raster order", ylabel="candidates", ylim=(0, None), title="window")
        if math.isfinite(run.lock.tau):
            right.axhline(run.lock.tau, color=style.RED, linewidth=1, linestyle="--", label="tau")
        right.set(xlabel="token, in raster order", ylabel=f"distance ({run.lock.metric})", title="nearest candidate")
        for axes in (left, right):
            axes.legend(loc="best")
        return style.save(figure, path)


def classes(run: Run, row: int) -> torch.Tensor:
    """``(height, width)`` long: the index into :data:`CLASSES` of every token of an edit."""
    record = run.record
    return (record.moved[row].long() + 2 * record.fallback[row].long()).view(run.grid).cpu()


def _show(axes, pixels: torch.Tensor, title: str) -> None:
    from ..demo import style

    style.picture_axes(axes)
    axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title)


def _median(run: Run, row: int) -> str:
    finite = run.record.distance[row][run.record.distance[row].isfinite()]
    return f"{float(finite.median()):.3g}" if len(finite) else "none"


def _short(text: str, length: int = 34) -> str:
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."
