"""Check every contestant, time those that pass in turns, write a row for each."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fastrope.tolerance import Errors

from . import timing
from .frame import Session, Task
from .problem import Unsupported

MATMUL = "matmul"  # the ceiling, timed among the contestants


class Checked(Protocol):
    """A problem that judges an output."""

    def check(self, out) -> Errors:
        """Errors of an output against the reference."""
        ...


class Contestant(Protocol):
    """``run()`` gives what ``problem`` checks."""

    run: Callable[[], object]
    problem: Checked


@dataclass(frozen=True, eq=False)
class Entry:
    """Somebody who enters: a case and a name, how to build the contestant, what else its row says.

    ``yardstick`` gets no row: the rows of ``impl`` tell its time as ``plain_ms``. One that is ``approximate`` by design
    and outside the tolerance rule is left out, which is no fault of the run.
    """

    case: str
    impl: str
    build: Callable[[], Contestant]
    facts: dict = field(default_factory=dict)
    yardstick: bool = False
    approximate: bool = False

    @property
    def name(self) -> str:
        """Unique among the entries of a task."""
        return f"{self.impl} ({self.case})" if self.yardstick else f"{self.case} / {self.impl}"


class WrongResult(Exception):
    """A contestant is outside the tolerance rule; it is not timed."""


def measure(session: Session, task: Task, entries: Sequence[Entry], flops: float, usual_rounds: int) -> None:
    """Rows of all entries, timed in the same rounds.

    Args:
        flops: what ``tflops`` counts, the same for every entry.
        usual_rounds: see :meth:`Session.rounds`.
    """
    contestants, facts = {}, {}
    for entry in entries:
        try:
            contestant = entry.build()
            facts[entry.name] = _verdict(contestant, session.device)
            contestants[entry.name] = contestant
        except Unsupported as reason:
            _say(entry, f"unsupported: {reason}")
        except torch.OutOfMemoryError:
            _say(entry, "unsupported: out of memory")
        except Exception as error:  # one broken contestant must not cost the others their rows
            _say(entry, f"not timed: {error}")
            if isinstance(error, WrongResult) and entry.approximate:
                continue
            if not isinstance(error, WrongResult):
                traceback.print_exc()
            session.problem(f"{task.suite} / {task.workload} / {entry.name}", error)
        if session.device.type == "cuda" and not session.lost:
            torch.cuda.empty_cache()  # one contestant's scratch is no limit to the next
    if not contestants or session.lost:
        return
    a, b = session.factors
    runs = {MATMUL: lambda: a @ b, **{name: c.run for name, c in contestants.items()}}
    times = timing.interleaved(runs, session.device, session.rounds(usual_rounds))
    ceiling = 2 * a.shape[0] ** 3 / times[MATMUL].median / 1e9
    timed = [entry for entry in entries if entry.name in contestants]
    plain = {entry.impl: times[entry.name].median for entry in timed if entry.yardstick}
    rows = []
    for entry in timed:
        t = times[entry.name]
        tflops = flops / t.median / 1e9
        _say(entry, f"{t.median:9.3f} ms [{t.p20:.3f}, {t.p80:.3f}]  {tflops:7.1f} TFLOP/s")
        if not entry.yardstick:
            rows.append({
                "workload": task.workload, "case": entry.case, "impl": entry.impl,
                **t.fields, "tflops": tflops, "peak_pct": 100 * tflops / ceiling, "matmul_tflops": ceiling,
                "plain_ms": plain.get(entry.impl), **facts[entry.name], **entry.facts,
            })  # fmt: skip
    session.emit(task.suite, rows)


def _say(entry: Entry, what: str) -> None:
    print(f"  {entry.name:<44}{what}", flush=True)


def _verdict(contestant: Contestant, device: torch.device) -> dict:
    """Errors, memory and kernel of a contestant that is right.

    Raises:
        WrongResult: it is not.
    """
    try:
        errors = contestant.problem.check(contestant.run())
    except ValueError as error:
        raise WrongResult(str(error)) from error
    if not errors.passed:
        raise WrongResult(f"wrong: {errors}")
    kernel, launches = timing.kernels(contestant.run, device)
    return {
        "max_err": errors.max_out, "mean_err": errors.mean_out,
        "max_allowed": errors.max_allowed, "mean_allowed": errors.mean_allowed,
        "peak_mem_mib": timing.peak_memory_mib(contestant.run, device), "kernel": kernel, "launches": launches,
    }  # fmt: skip
