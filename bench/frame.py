"""The frame of every suite: what a run is measured with, one place that writes rows, a budget, what is left out."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from .problem import Unsupported
from .rows import KEYS, read

MATMUL_SIZE = {"cuda": 8192, "cpu": 256}
FEW = 10  # rounds of a smoke test


@dataclass(frozen=True)
class Selection:
    """What of a suite is asked for; None: what suits the device. ``quick``: the first workload only."""

    workloads: Sequence[str] | None = None
    cases: Sequence[str] | None = None
    peers: Sequence[str] | None = None
    small: bool = False
    quick: bool = False

    def of(self, workloads: dict) -> list:
        """The workloads of a registry that are asked for."""
        if self.workloads is not None:
            return [workloads[name] for name in self.workloads if name in workloads]
        return [w for w in workloads.values() if w.small == self.small][: 1 if self.quick else None]

    def cases_of(self, names: Iterable[str]) -> list[str]:
        """The cases of ``names`` that are asked for, in the order in which they are."""
        known = list(names)
        return known if self.cases is None else [name for name in self.cases if name in known]

    def peers_of(self, names: Iterable[str]) -> list[str]:
        """The peers of ``names`` that are asked for."""
        return [name for name in names if self.peers is None or name in self.peers]


@dataclass(frozen=True, eq=False)
class Task:
    """A piece of a suite that is measured at one go. ``case`` None: all cases of the workload."""

    suite: str
    workload: str
    case: str | None
    measure: Callable[[Session], None]

    def __str__(self) -> str:
        return " / ".join(part for part in (self.suite, self.workload, self.case) if part is not None)

    def has(self, row: dict) -> bool:
        """Whether a row is one of this task's."""
        same = (row.get("suite"), row["workload"]) == (self.suite, self.workload)
        return same and self.case in (None, row["case"])


@dataclass
class Session:
    """One run: device, dtype, rounds (None: each suite's own), the fields all rows share, the folder they go to."""

    device: torch.device
    dtype: torch.dtype
    repeats: int | None
    environment: dict
    folder: Path
    quick: bool = False
    rows: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: list[Task] = field(default_factory=list)
    lost: bool = False

    @property
    def small(self) -> bool:
        """True without a GPU: a smoke test of small shapes."""
        return self.device.type == "cpu"

    def rounds(self, usual: int) -> int:
        """Timed rounds, where a suite's own number is ``usual``."""
        return self.repeats or (FEW if self.quick or self.small else usual)

    @cached_property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the matmul that is the ceiling of a run."""
        size = MATMUL_SIZE["cpu" if self.small else "cuda"]
        a, b = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        return a, b

    def path(self, suite: str) -> Path:
        """Where the rows of a suite go."""
        return self.folder / f"{suite}.jsonl"

    def emit(self, suite: str, rows: Iterable[dict]) -> None:
        """Write rows, with what every row says and null for what these do not; an interrupted run keeps them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        dtype = str(self.dtype).removeprefix("torch.")
        whole = [{**dict.fromkeys(KEYS), "suite": suite, "dtype": dtype, **r, **self.environment} for r in rows]
        with self.path(suite).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in whole)
        self.rows += whole

    def problem(self, where: str, error: object) -> None:
        """Note that a contestant was wrong or failed, which costs the others nothing."""
        if isinstance(error, Exception):
            if "CUDA error" in str(error):  # nothing runs on the device any more
                self.lost = True
            error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.problems.append(f"{where}: {error}")

    def run(self, tasks: Sequence[Task], budget: float | None = None, clock=time.monotonic) -> None:
        """Measure task after task.

        Args:
            budget: seconds. A task that the longest one of its suite so far says would end later is skipped, as is all
                that comes after the time; one that has begun is finished.
        """
        start, longest = clock(), {}
        for task in tasks:
            now = clock() - start
            if self.lost or (budget is not None and now + longest.get(task.suite, 0.0) >= budget):
                self.skipped.append(task)
                continue
            print(f"\n{task}", flush=True)
            try:
                with torch.no_grad():
                    task.measure(self)
            except Unsupported as reason:
                print(f"  unsupported: {reason}", flush=True)
            except Exception as error:  # one broken suite must not cost the others their rows
                traceback.print_exc()
                self.problem(str(task), error)
            longest[task.suite] = max(longest.get(task.suite, 0.0), clock() - start - now)
            self._tidy()

    def measured(self, tasks: Sequence[Task], folders: Iterable[Path]) -> list[Task]:
        """The tasks of which one of the folders holds rows of this revision, device and dtype."""
        same = {**{key: self.environment[key] for key in ("rev", "gpu")}, "dtype": str(self.dtype)[len("torch.") :]}
        paths = {folder / f"{task.suite}.jsonl" for folder in folders for task in tasks}
        rows = [row for path in paths if path.exists() for row in read(path)]
        rows = [row for row in rows if all(row.get(key) == value for key, value in same.items())]
        return [task for task in tasks if any(task.has(row) for row in rows)]

    def _tidy(self) -> None:
        cuda = self.device.type == "cuda" and not self.lost
        if cuda:  # earlier problems count towards the limit of recompilations, and live in the compiler's caches
            torch.compiler.reset()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
