"""Tables and curves of findings: means with their 95 % bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .findings import Findings, Row

BLUE, ORANGE, GREEN, PINK, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
SHARES = ("asked", "source", "copied", "digit", "texture", "success", "kept", "colours")  # written in percent


def cell(row: Row, outcome: str) -> str:
    """``mean [low, high]``, shares in percent."""
    numbers = [row.mean(outcome), *row.interval(outcome)]
    form = "{:.0f} % [{:.0f}, {:.0f}]" if outcome in SHARES else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(*(100 * n if outcome in SHARES else n for n in numbers))


def table(rows: Iterable[Row], columns: Mapping[str, str], dial: str | None = None) -> str:
    """A table in Markdown, a row per setting.

    Args:
        columns: outcome -> heading.
        dial: heading of the first column; None: the setting's sweep stands before its value.
    """
    lines = [f"| {dial or 'setting'} | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        value = row.value if isinstance(row.value, str) else f"{row.value:g}"
        sweep = row.sweep.rpartition(", ")[2]
        name = value if dial or isinstance(row.value, str) else f"{sweep} {value}"
        lines.append(f"| {name} | {' | '.join(cell(row, outcome) for outcome in columns)} |")
    return "\n".join(lines)


def share(row: Row, outcome: str) -> str:
    """The mean of a share."""
    return f"{100 * row.mean(outcome):.0f} %"


def claim(holds: bool, yes: str, no: str) -> str:
    """What the page says of a published effect: ``yes`` where the numbers show it, else ``no``."""
    return yes if holds else no


def curve(axes, rows: Sequence[Row], outcome: str, label: str, colour: str, places: Sequence[float] | None = None):
    """Means over the dial as a line, intervals as a band."""
    x = [row.value for row in rows] if places is None else places
    low, high = zip(*(row.interval(outcome) for row in rows), strict=True)
    axes.plot(x, [row.mean(outcome) for row in rows], marker="o", markersize=4, color=colour, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def show_strips(figure, findings: Findings, names: Mapping[str, str]) -> None:
    """Strips of sample pictures below each other, with their names at the left."""
    panels = figure.subplots(len(names), 1)
    for axes, (name, label) in zip(np.atleast_1d(panels), names.items(), strict=True):
        pictures = findings.pictures[name]
        gap = np.full((pictures.shape[1], 1, 3), 255, np.uint8)
        axes.imshow(np.concatenate([x for p in pictures for x in (p, gap)][:-1], axis=1), interpolation="nearest")
        axes.set_axis_off()
        axes.text(-2, 8, label, ha="right", va="center", fontsize=9)
