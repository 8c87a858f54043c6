"""Another revision of the library under this benchmark, in turns with this one.

Each turn is a process per revision, in an order that turns around: this, other, other, this. Both run the benchmark's
code of this revision, so that they are asked the same; a revision whose library lacks what it needs fails, and says so.

Limits: contestants of two revisions are never timed in the same rounds, only in neighbouring processes, so a clock that
drifts within seconds is not cancelled (the contestants that are not ours tell: their ratio should be 1). What counts as
beyond the spread is that the spreads of all turns do not meet.
"""

from __future__ import annotations

import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .environment import output, revision
from .links import BENCH, CLONE, site
from .report import markdown
from .rows import read

CHILD = """
import sys, fastrope
if sys.argv[1] and not fastrope.__file__.startswith(sys.argv[1]):
    sys.exit(f"expected fastrope under {sys.argv[1]}, found {fastrope.__file__}")
from fastrope.cli import main
sys.exit(main(["bench", *sys.argv[2:]]))
"""


def unpack(rev: str, folder: Path) -> tuple[Path, str]:
    """Sources of a revision, or those of a folder that holds another checkout: where they are, what to call them.

    Raises:
        ValueError: neither a folder with a ``fastrope`` nor a revision of this clone.
    """
    given = Path(rev)
    if (given / "fastrope" / "__init__.py").is_file():
        given = given.resolve()
        clone = output("git", "-C", str(given), "rev-parse", "--show-toplevel") == str(given)  # not within another
        return given, (revision(folder=given) if clone else None) or given.name
    commit = revision(rev)
    if commit is None:
        raise ValueError(f"--against: expected a revision of this clone or a folder with a fastrope, received {rev!r}")
    # In a folder of a clone git archives that folder alone.
    root = output("git", "-C", str(BENCH), "rev-parse", "--show-toplevel")
    archive = subprocess.run(["git", "-C", root, "archive", commit], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder, commit


def run(
    rev: str, arguments: Sequence[str], turns: int, out: Path, budget: float | None = None
) -> tuple[list[dict], list[str]]:
    """Rows of both revisions and what went wrong.

    Args:
        arguments: of ``fastrope bench``, less those that say what is compared and where rows go.
        turns: processes of each revision.
        budget: seconds, for all of them.
    """
    start, seen, problems = time.monotonic(), _count(out), []
    with tempfile.TemporaryDirectory(prefix="fastrope-bench-") as scratch:
        sources, name = unpack(rev, Path(scratch) / "sources")
        own = revision() or "this"
        if own == name:
            raise ValueError(f"--against: expected another revision than this one, received {rev!r} = {name}")
        here = None if CLONE is None else site(CLONE, Path(scratch) / "this")
        sites = {own: here, name: site(sources, Path(scratch) / "other")}
        order = [side for n in range(turns) for side in (list(sites) if n % 2 == 0 else list(sites)[::-1])]
        for n, side in enumerate(order):
            extra = []
            if budget is not None:
                left = budget - (time.monotonic() - start)
                extra = ["--budget", str(max(left / (len(order) - n), 0.0))]
            print(f"\n== {side} ({n + 1} of {len(order)})", flush=True)
            place = sites[side]
            command = [sys.executable, "-c", CHILD, str(place or ""), *arguments, *extra]
            environment = {**os.environ, **({"PYTHONPATH": str(place)} if place else {})}
            done = subprocess.run(
                [*command, "--out", str(out.resolve()), "--rev", side], env=environment, cwd=place or scratch
            )
            if done.returncode:
                problems.append(f"{side}: exit code {done.returncode}")
    rows = [row for path in sorted(out.glob("*.jsonl")) for row in read(path)[seen.get(path, 0) :]]
    return rows, problems


def _count(folder: Path) -> dict[Path, int]:
    """Rows that are there already."""
    return {path: len(read(path)) for path in folder.glob("*.jsonl")}


def render(rows: Sequence[dict]) -> str:
    """Markdown: the revisions side by side, in the order in which they first ran."""
    revs = list(dict.fromkeys(row["rev"] for row in rows))
    if len(revs) != 2:
        return f"expected rows of two revisions, found {', '.join(map(str, revs)) or 'none'}"
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("gpu", "dtype", "suite", "workload", "case", "impl"))
        groups.setdefault(key, {}).setdefault(row["rev"], []).append(row)
    lines = [_line(key, *(sides[rev] for rev in revs)) for key, sides in groups.items() if len(sides) == 2]
    names = ["suite", "workload", "case", "impl", *revs, "ratio", "beyond the spread"]
    columns = [(name, "---", lambda r, n=n: r[n]) for n, name in enumerate(names)]
    head = f"### {revs[0]} over {revs[1]}: ms, lowest 20th and highest 80th percentile of the turns, ratio"
    return "\n".join([head, "", *markdown(columns, lines), ""])


def _line(key: tuple, *sides: list[dict]) -> tuple[str, ...]:
    medians = [statistics.median(row["ms_median"] for row in side) for side in sides]
    spreads = [(min(row["ms_p20"] for row in side), max(row["ms_p80"] for row in side)) for side in sides]
    apart = spreads[0][0] > spreads[1][1] or spreads[1][0] > spreads[0][1]
    ratio = medians[0] / medians[1]
    cells = [f"{m:.3f} ({a:.3f} - {b:.3f})" for m, (a, b) in zip(medians, spreads, strict=True)]
    verdict = ("slower" if ratio > 1 else "faster") if apart else ""
    return (*(str(part) for part in key[2:]), *cells, f"{ratio:.3f}", verdict)
