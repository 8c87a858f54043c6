"""The figures of docs/backends.md: a part between two markers, written from rows and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastrope.outputs import write_text

from . import gates
from .cases import CASES
from .names import AUTO, STOCK, STOCK_COMPILED
from .report import Cell, conditions, markdown, number, over_plain, spread

START = "<!-- bench: written by `fastrope bench --report --page docs/backends.md` from bench/results -->"
END = "<!-- end of bench -->"
NOTHING = (
    "**No figure of speed or memory on a GPU has been measured yet**, so there is none here: `bench/results/` holds no "
    "row."
)
WORKLOAD, DTYPE = "kontext", gates.DTYPE
REVISION: tuple[str, str, Cell] = ("revision", "---", lambda row: row["rev"][:7])


def part(rows: Sequence[dict]) -> str:
    """What stands between the markers."""
    devices = dict.fromkeys(row["gpu"] for row in rows if row["gpu"] != "cpu")
    tables = [table for gpu in devices for table in (_calls(gpu, rows), _blocks(gpu, rows)) if table]
    return "\n".join([*tables, gates.render(rows).rstrip()]) if tables else NOTHING


def _of(gpu: str, suite: str, rows: Sequence[dict]) -> list[dict]:
    """The rows of the page's workload, the oldest first."""
    wanted = gpu, DTYPE, suite, WORKLOAD
    found = [row for row in rows if (row["gpu"], row.get("dtype"), row.get("suite"), row["workload"]) == wanted]
    return sorted(found, key=lambda row: row["date"])


def _calls(gpu: str, rows: Sequence[dict]) -> str:
    """``auto`` on FLUX.1 Kontext, and the fastest of the others, each case of the latest run that has it."""
    cases: dict[str, dict[str, dict]] = {}
    for row in _of(gpu, "attention", rows):
        run = cases.setdefault(row["case"], {})
        if run and next(iter(run.values()))["date"] != row["date"]:
            run.clear()
        run[row["impl"]] = row
    lines, used = [], []
    for run in (cases[case] for case in CASES if case in cases):
        ours = run.get(AUTO)
        if ours is None:
            continue
        same = [r for r in run.values() if not r.get("ours") and r.get("rotation") == ours.get("rotation")]
        best = min(same, key=lambda r: r["ms_median"], default=None)
        lines.append({**ours, "best": best})
        used += [ours] + ([best] if best else [])
    if not lines:
        return ""

    def of_best(form) -> object:
        return lambda r: "" if r["best"] is None else form(r, r["best"])

    over = {id(r): over_plain(r, None) for r in lines}
    columns = [
        ("case", "---", lambda r: r["case"]),
        ("ms", "---:", lambda r: number(r, "ms_median", ".3f")),
        ("spread", "---:", spread),
        ("over own plain", "---:", lambda r: "" if over[id(r)] is None else f"{over[id(r)]:.2f} x"),
        ("TFLOP/s", "---:", lambda r: number(r, "tflops", ".0f")),
        ("MiB", "---:", lambda r: number(r, "peak_mem_mib", ".0f")),
        ("fastest other", "---", of_best(lambda r, b: b["impl"])),
        ("its ms", "---:", of_best(lambda r, b: f"{b['ms_median']:.3f}")),
        ("over ours", "---:", of_best(lambda r, b: f"{b['ms_median'] / r['ms_median']:.2f} x")),
        REVISION,
    ]
    head = f"`auto` on {gpu}, {DTYPE}: one attention call of FLUX.1 Kontext at 1024 px, 1 x 8704 x 24 x 128, rotation"
    return "\n".join([f"{head} included.", "", *markdown(columns, lines), "", conditions(used), ""])


def _blocks(gpu: str, rows: Sequence[dict]) -> str:
    """The attention of a block: ``auto`` in each case of the latest run, and what diffusers has."""
    found = [row for row in _of(gpu, "block", rows) if row["impl"] in (AUTO, STOCK, STOCK_COMPILED)]
    found = [row for row in found if row["date"] == found[-1]["date"]]
    if not found:
        return ""
    columns: list[tuple[str, str, Cell]] = [
        ("case", "---", lambda r: r["case"]),
        ("whose", "---", lambda r: r["impl"]),
        ("ms", "---:", lambda r: number(r, "ms_median", ".3f")),
        ("spread", "---:", spread),
        ("MiB", "---:", lambda r: number(r, "peak_mem_mib", ".0f")),
        REVISION,
    ]
    head = (
        f"The attention of a block of FLUX.1 Kontext on {gpu}, {DTYPE}: QK norm, joining of text and image, rotation "
        "and attention, without the projections. diffusers' own processor knows the plain case alone."
    )
    return "\n".join([head, "", *markdown(columns, found), ""])


def write(path: Path, rows: Sequence[dict]) -> None:
    """Replace what stands between the markers.

    Raises:
        ValueError: a file without them.
    """
    text = path.read_text(encoding="utf-8")
    before, found, rest = text.partition(START)
    _, ends, after = rest.partition(END)
    if not (found and ends):
        raise ValueError(f"{path}: expected the lines {START} and {END}")
    write_text(path, f"{before}{START}\n\n{part(rows)}\n\n{END}{after}")
