"""Rows as a run would write them, for tests of what is made of rows."""

from __future__ import annotations

from fastrope.bench.rows import KEYS


def a_row(**changes) -> dict:
    """A row of the contestant "one" in the plain case of FLUX.1 Kontext, and what is changed of it."""
    row = dict.fromkeys(KEYS)
    row |= {
        "suite": "attention", "workload": "kontext", "case": "plain", "impl": "one", "ms_median": 2.0, "ms_p20": 1.9,
        "ms_p80": 2.1, "tflops": 465.5, "peak_pct": 59.0, "peak_mem_mib": 51.0, "max_err": 1e-3, "mean_err": 1e-4,
        "gpu": "Accelerator 9", "date": "2026-01-02T00:00:00+00:00", "kernel": "k|1", "dtype": "bfloat16",
        "rev": "abc", "rotation": "inside", "ours": False,
    }  # fmt: skip
    return {**row, **changes}


def timed(case: str, impl: str, ms: float, **changes) -> dict:
    """A row of an H200 whose spread is one part in a hundred around ``ms``."""
    spread = {"ms_median": ms, "ms_p20": 0.99 * ms, "ms_p80": 1.01 * ms}
    return a_row(case=case, impl=impl, gpu="NVIDIA H200", **{**spread, **changes})
