"""Rows of measurements: JSON lines, the only thing that reports know."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path("bench/results")
KEYS = (
    "workload", "case", "impl", "ms_median", "ms_p20", "ms_p80", "tflops", "peak_pct", "peak_mem_mib", "max_err",
    "mean_err", "kernel", "gpu", "torch", "triton", "driver", "date", "rev",
)  # fmt: skip


def read(path: Path) -> list[dict]:
    """Rows of a JSON-lines file.

    Raises:
        ValueError: a line that is no row, naming it.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: expected a row of JSON, received {line[:40]!r}") from error
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise ValueError(f"{path}:{number}: expected a row with {', '.join(missing)}")
        rows.append(row)
    return rows


def latest(rows: list[dict]) -> dict[tuple, dict]:
    """The last row of each contestant, by device, dtype, suite, workload, case and implementation."""
    names = "gpu", "dtype", "suite", "workload", "case", "impl"
    return {tuple(row.get(name) for name in names): row for row in sorted(rows, key=lambda row: row["date"])}
