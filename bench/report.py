"""Tables from rows and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

KEYS = (
    "workload", "case", "impl", "ms_median", "ms_p20", "ms_p80", "tflops", "peak_pct", "peak_mem_mib", "max_err",
    "mean_err", "kernel", "gpu", "torch", "triton", "driver", "date", "rev",
)  # fmt: skip
PLAIN = "plain"


def read(path: Path) -> list[dict]:
    """Rows of a JSON-lines file.

    Raises:
        ValueError: a line that is no row, naming it.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise ValueError(f"{path}:{number}: expected a row with {', '.join(missing)}")
        rows.append(row)
    return rows


def slug(gpu: str) -> str:
    """The folder of a device's rows: "NVIDIA H200" -> "nvidia-h200"."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())


def render(rows: Sequence[dict]) -> str:
    """Markdown: one table per device, dtype and workload, the latest row of each contestant, conditions below."""
    tables: dict[tuple, dict[tuple, dict]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        table = tables.setdefault((row["gpu"], row.get("dtype"), row["workload"]), {})
        table[row["case"], row["impl"]] = row
    return "\n".join(_table(*place, list(table.values())) for place, table in tables.items())


def _table(gpu: str, dtype: str | None, workload: str, rows: list[dict]) -> str:
    plain = {row["impl"]: row["ms_median"] for row in rows if row["case"] == PLAIN}
    lines = [
        f"### {workload}, {dtype}, {gpu}", "",
        "| case | contestant | ms | spread | over its plain | TFLOP/s | of matmul | MiB | max error | kernel |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for row in sorted(rows, key=lambda row: (cases.index(row["case"]), row["ms_median"])):
        over = f"{row['ms_median'] / plain[row['impl']]:.2f}" if row["impl"] in plain else ""
        memory = "" if row["peak_mem_mib"] is None else f"{row['peak_mem_mib']:.0f}"
        lines.append(
            f"| {row['case']} | {row['impl']} | {row['ms_median']:.3f} | {row['ms_p20']:.3f} - {row['ms_p80']:.3f} "
            f"| {over} | {row['tflops']:.1f} | {row['peak_pct']:.0f} % | {memory} | {row['max_err']:.1e} "
            f"| {_short(row['kernel'])} |"
        )
    return "\n".join([*lines, "", _conditions(rows), ""])


def _short(kernel: str | None, length: int = 48) -> str:
    return "" if kernel is None else kernel[:length].replace("|", "/")


def _conditions(rows: Iterable[dict]) -> str:
    """What the rows were measured with: every value that occurs."""

    def values(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row[key] is not None)) or "unknown"

    rows = list(rows)
    days = sorted({row["date"][:10] for row in rows})
    return (
        f"Median of interleaved rounds with the 20th and 80th percentile; TFLOP/s count the two products of plain "
        f"attention in every case; memory is what a call takes beyond its inputs. torch {values('torch')}, triton "
        f"{values('triton')}, driver {values('driver')}, {' to '.join(dict.fromkeys((days[0], days[-1])))}, revision "
        f"{values('rev')}."
    )
