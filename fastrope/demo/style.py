"""How the pictures look: one palette, one set of sizes. Matplotlib is imported on first use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..extras import require_packages
from ..outputs import write

# Okabe and Ito's palette: told apart with every common colour vision.
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
SEQUENTIAL = "cividis"
ATTENTION = "magma"
DPI = 150


@dataclass(frozen=True)
class Paper:
    """Colours of the sheet a picture is drawn on."""

    sheet: str
    ink: str
    muted: str
    grid: str


LIGHT = Paper("#ffffff", "#1f2328", "#59636e", "#d9dee4")
DARK = Paper("#0d1117", "#f0f6fc", "#9da7b3", "#30363d")


def require_extras() -> None:
    """Require what the demo draws with.

    Raises:
        MissingExtra: naming the packages and how to install them.
    """
    require_packages("matplotlib", "PIL", "tqdm")


def new_figure(width: float, height: float, paper: Paper = LIGHT, **layout):
    """A figure of ``width x height`` inches on ``paper``, independent of any display and of pyplot's state."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(settings(paper)):
        figure = Figure(figsize=(width, height), dpi=DPI, layout=layout.pop("layout", "constrained"), **layout)
        FigureCanvasAgg(figure)
    return figure


def settings(paper: Paper = LIGHT) -> dict:
    """Matplotlib settings; use them with ``matplotlib.rc_context`` around everything that draws."""
    return {
        "figure.facecolor": paper.sheet, "savefig.facecolor": paper.sheet, "axes.facecolor": paper.sheet,
        "text.color": paper.ink, "axes.labelcolor": paper.ink, "axes.edgecolor": paper.muted,
        "axes.titlecolor": paper.ink, "xtick.color": paper.muted, "ytick.color": paper.muted,
        "xtick.labelcolor": paper.ink, "ytick.labelcolor": paper.ink, "grid.color": paper.grid,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.linewidth": 0.7, "lines.linewidth": 2.0, "font.family": "DejaVu Sans", "font.size": 10,
        "axes.titlesize": 11, "axes.labelsize": 10, "legend.frameon": False, "legend.fontsize": 9,
        "axes.titlelocation": "left", "axes.titlepad": 8, "mathtext.fontset": "dejavusans",
        "text.parse_math": False, "text.usetex": False,  # labels hold prompts, and a dollar is a dollar
    }  # fmt: skip


def picture_axes(axes, paper: Paper = LIGHT) -> None:
    """Axes that hold a picture: a thin frame, no ticks, no grid."""
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.7)
        spine.set_color(paper.muted)


def save(figure, path: Path) -> Path:
    """Write ``figure`` as PNG and return where."""
    return write(path, lambda part: figure.savefig(part, dpi=DPI))
