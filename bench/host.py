#!/usr/bin/env python3
"""Host time of a call, divided by the host time of launching the same kernels and doing nothing else.

Run ``python -m fastrope.bench.host`` on a GPU. Without one, ``python tests/launches/lane.py --host`` measures the same
over a driver that launches nothing.

"Launches alone" are triton's own launches, ``kernel[grid](**arguments)``, of all our kernels that the call launches,
and torch's attention where the call ends in it. Their arguments are prepared before. Times are CPU times of the thread.
Both take turns in several rounds, and the fastest round counts, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

import fastrope as fr
from fastrope.backends import folded
from fastrope.planning import polynomial

from .cases import CASES
from .problem import Problem
from .workloads import WORKLOADS

BAR = 1.5
CALLS = {  # by the name in the table: the case, and whether scales are near enough for tiles of a polynomial
    "plain": ("plain", False), "grag": ("grag", False), "loose-levels": ("loose-levels", False),
    "loose-per-query": ("loose-per-query", True), "all": ("all", False), "all-per-query": ("all-per-query", True),
    "all-per-query, axis blocks": ("all-per-query", False),
}  # fmt: skip
ROUNDS, REPEATS = 15, 20


@dataclass(frozen=True)
class Row:
    """One case on one backend: the number of launches, and microseconds of a call, of triton's launches of the same
    kernels alone, and of the launchers of their binaries alone."""

    case: str
    backend: str
    launches: int
    call: float
    alone: float
    binaries: float

    @property
    def ratio(self) -> float:
        """Time of the call, divided by that of its launches alone."""
        return self.call / self.alone


@contextmanager
def recorded() -> Iterator[list[Callable[[], object]]]:
    """The launches made inside, as functions that repeat them, all through triton."""
    from triton.runtime import JITFunction

    from fastrope.kernels import launch

    run, functional, directly, found = JITFunction.run, folded.F, launch.Prepared.directly, []

    def spy(self, *args, grid, warmup, **named):
        found.append(lambda: run(self, *args, grid=grid, warmup=warmup, **named))
        return found[-1]()

    class Functional:
        def __getattr__(self, name):
            return getattr(functional, name)

        @staticmethod
        def scaled_dot_product_attention(*args, **named):
            found.append(lambda: functional.scaled_dot_product_attention(*args, **named))
            return found[-1]()

    JITFunction.run, folded.F = spy, Functional()
    launch.Prepared.directly = lambda self, binary, stream, tensors: self.through_triton(tensors)
    try:
        yield found
    finally:
        JITFunction.run, folded.F, launch.Prepared.directly = run, functional, directly


def binary_of(again: Callable[[], object]) -> Callable[[], object]:
    """A recorded launch as a call of the launcher of its binary."""
    from triton.runtime import driver

    cells = dict(zip(again.__code__.co_freevars, (c.cell_contents for c in again.__closure__), strict=True))
    if "self" not in cells:
        return again
    binary, grid = again(), (*cells["grid"], 1, 1)[:3]
    arguments = [cells["named"][name] for name in cells["self"].arg_names]
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    head = *grid, stream, binary.function, binary.packed_metadata, None, None, None
    return lambda: binary.run(*head, *arguments)


def rows(device: torch.device, between: Callable[[], object] = lambda: None) -> Iterator[Row]:
    """A row for each case and backend, at shapes so small that kernels take almost no time."""
    tokens = fr.TokenLayout(8, (8, 8), references=[(8, 8)])
    workload = replace(WORKLOADS["kontext"], tokens=tokens, heads=2)
    for name, (case, near) in CALLS.items():
        least, polynomial.LEAST_FILLED = polynomial.LEAST_FILLED, 0.0 if near else polynomial.LEAST_FILLED
        problem = Problem.make(workload, CASES[case], device, torch.bfloat16)
        plan = problem.plan
        polynomial.LEAST_FILLED = least
        for backend in ("triton", "auto"):

            def call(problem=problem, plan=plan, backend=backend):
                return fr.attention(problem.q, problem.k, problem.v, plan=plan, backend=backend, debug=False)

            call()
            with recorded() as launches:
                call()
            again, binaries = list(launches), [binary_of(each) for each in launches]
            found = _times([call, lambda all_=again: [f() for f in all_], lambda all_=binaries: [f() for f in all_]],
                           between)  # fmt: skip
            yield Row(name, backend, len(launches), *found)


def _times(runs: list[Callable[[], object]], between: Callable[[], object]) -> list[float]:
    """Microseconds of each run."""
    best = [float("inf")] * len(runs)
    for _ in range(ROUNDS):
        for i, run in enumerate(runs):
            start = time.thread_time()
            for _ in range(REPEATS):
                run()
            best[i] = min(best[i], (time.thread_time() - start) / REPEATS * 1e6)
            between()
    return best


def table(found: list[Row]) -> list[str]:
    """The lines of the table in ``docs/backends.md``."""
    lines = ["| case | backend | launches | call, us | launches alone, us | ratio |", "|---|---|---:|---:|---:|---:|"]
    for row in found:
        lines.append(f"| {row.case} | {row.backend} | {row.launches} | {row.call:.0f} | {row.alone:.0f} | "
                     f"{row.ratio:.2f} |")  # fmt: skip
    return lines


def report(device: torch.device, between: Callable[[], object] = lambda: None) -> bool:
    """Print the table; returns whether every ratio is at most ``BAR``."""
    with torch.no_grad():
        found = list(rows(device, between))
    print("\n".join(table(found)))
    worst = max(found, key=lambda row: row.ratio)
    print(f"\nlargest ratio {worst.ratio:.2f} ({worst.case}, {worst.backend}), at most {BAR} is allowed; binaries' "
          "launchers alone: " + ", ".join(f"{row.binaries:.0f}" for row in found))  # fmt: skip
    return worst.ratio <= BAR


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    raise SystemExit(not report(torch.device("cuda"), torch.cuda.synchronize))  # its queue must not fill up
