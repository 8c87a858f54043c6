"""Figures of the commands: one palette, one set of sizes, one way to lay pictures out. Matplotlib is imported late."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

# Okabe and Ito's palette: told apart with every common colour vision.
BLUE, ORANGE, PINK = "#0072B2", "#E69F00", "#CC79A7"
DPI = 150


@dataclass(frozen=True)
class Paper:
    """Colours of the sheet a figure is drawn on."""

    sheet: str
    ink: str
    muted: str


LIGHT = Paper("#ffffff", "#1f2328", "#59636e")
DARK = Paper("#0d1117", "#f0f6fc", "#9da7b3")
PAPERS = {"light": LIGHT, "dark": DARK}


@dataclass(frozen=True)
class Cell:
    """A picture of a sheet, with a line above it and lines below it."""

    picture: Image
    title: str = ""
    below: str = ""


def sheet(rows: Sequence[Sequence[Cell | None]], caption: str = "", paper: Paper = LIGHT, side: float = 2.1) -> Image:
    """Pictures in rows and columns, as one PIL picture.

    Args:
        rows: cells from the left; None leaves a place empty, and so does a row that ends early.
        caption: on top, in as many lines as it needs.
        side: width of a cell, inches.
    """
    columns = max(map(len, rows))
    heights = [max(_height(cell, side) for cell in row if cell is not None) for row in rows]
    lines = textwrap.wrap(caption, width=int(13 * side * columns))  # characters of this size per inch, about
    with canvas(side * columns, sum(heights) + 0.2 * len(lines) + 0.1, paper) as figure:
        panels = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        for line, row in zip(panels, rows, strict=True):
            for axes, cell in zip_longest(line, row):
                if cell is None:
                    axes.set_axis_off()
                else:
                    show(axes, cell.picture, paper)
                    axes.set_title(cell.title)
                    axes.set_xlabel(cell.below)
        figure.suptitle("\n".join(lines), fontsize=9)
        return as_picture(figure)


def _height(cell: Cell, side: float) -> float:
    lines = sum(text.count("\n") + bool(text) for text in (cell.title, cell.below))
    return side * cell.picture.height / cell.picture.width + 0.2 * lines + 0.1


@contextlib.contextmanager
def canvas(width: float, height: float, paper: Paper = LIGHT) -> Iterator[Any]:
    """A figure of ``width x height`` inches, independent of any display; draw and save it inside the context."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {
        "figure.facecolor": paper.sheet, "savefig.facecolor": paper.sheet, "axes.facecolor": paper.sheet,
        "text.color": paper.ink, "axes.labelcolor": paper.ink, "axes.titlecolor": paper.ink, "font.size": 10,
        "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans", "axes.titlesize": 11, "axes.labelsize": 10,
        "text.parse_math": False, "text.usetex": False,  # labels hold prompts, and a dollar is a dollar
    }  # fmt: skip
    with rc_context(settings):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def show(axes: Any, picture: Any, paper: Paper = LIGHT) -> None:
    """Put a picture, PIL or ``(h, w, 3)``, into axes with a thin frame and no ticks; small ones keep their pixels."""
    width = picture.width if hasattr(picture, "width") else picture.shape[1]
    axes.imshow(picture, interpolation="nearest" if width <= 256 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.7)
        spine.set_color(paper.muted)


def as_picture(figure: Any) -> Image:
    """The figure as a PIL picture in RGB."""
    from PIL import Image

    data = io.BytesIO()
    figure.savefig(data, dpi=DPI, format="png")
    return Image.open(data).convert("RGB")


def short(text: str, length: int = 34) -> str:
    """Text that fits above a picture."""
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."
