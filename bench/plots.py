"""Pictures of rows: one for each device, dtype, suite and workload. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastrope.outputs import check_files, write

from .environment import slug
from .report import conditions
from .rows import latest

SUITES = ("attention", "block", None)  # whose rows compare many contestants on one scale
COLOURS = ("#1f77b4", "#d95f02", "#4daf4a", "#984ea3", "#e7298a", "#66a61e", "#e6ab02", "#666666")


def draw(rows: Sequence[dict], folder: Path, force: bool = False) -> list[Path]:
    """Write the pictures; returns where they are.

    Raises:
        ValueError: some are there already, unless ``force``.
    """
    groups: dict[tuple, list[dict]] = {}
    for (gpu, dtype, suite, workload, _, _), row in latest(list(rows)).items():
        if suite in SUITES:
            groups.setdefault((gpu, dtype, suite or "attention", workload), []).append(row)
    paths = {place: folder / f"{slug(place[0])}-{place[2]}-{place[3]}-{place[1]}.png" for place in groups}
    check_files("--plots", (), paths.values(), force)
    return [_picture(place, group, paths[place]) for place, group in groups.items()]


def _picture(place: tuple[str, str, str, str], rows: list[dict], path: Path) -> Path:
    """Bars of milliseconds by case and contestant on a logarithmic scale, the spread as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gpu, dtype, suite, workload = place
    cases, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "impl"))
    colours = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}
    ordered = sorted(rows, key=lambda row: (cases.index(row["case"]), row["ms_median"]))
    places, labels, at = [], [], 0.0
    for n, row in enumerate(ordered):
        at += 1.0 + (0.8 if n and ordered[n - 1]["case"] != row["case"] else 0.0)
        places.append(at)
        labels.append(f"{row['case']}  {row['impl']}")
    figure = Figure(figsize=(10, 1.6 + 0.24 * at), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    medians = [row["ms_median"] for row in ordered]
    errors = [[abs(row["ms_median"] - row[key]) for row in ordered] for key in ("ms_p20", "ms_p80")]
    axes.barh(places, medians, xerr=errors, color=[colours[row["impl"]] for row in ordered], ecolor="black")
    for y, value in zip(places, medians, strict=True):
        axes.annotate(f" {value:.3g}", (value, y), va="center", fontsize=7)
    axes.set_yticks(places, labels, fontsize=7)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, median; lines from the 20th to the 80th percentile")
    axes.set_title(f"{suite}: {workload}, {dtype}, {gpu}", fontsize=10)
    figure.supxlabel(conditions(rows), fontsize=6, wrap=True)
    return write(path, lambda part: figure.savefig(part, dpi=130))
