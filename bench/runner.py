"""Check every contestant, time those that pass, write a row for each."""

from __future__ import annotations

import datetime
import gc
import importlib.util
import json
import shutil
import subprocess
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from . import timing
from .cases import Case
from .peers import Contestant, Peer
from .problem import Problem, Unsupported
from .workloads import Workload

MATMUL = "matmul"  # the ceiling, timed among the contestants
MATMUL_SIZE = {"cuda": 8192, "cpu": 256}


@dataclass
class Outcome:
    """Rows written, and what was wrong or failed."""

    rows: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run(
    workloads: Sequence[Workload],
    cases: Sequence[Case],
    peers: Sequence[Peer],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    out: Path,
    environment: dict,
) -> Outcome:
    """Benchmark every peer on every case of every workload.

    Args:
        repeats: timed rounds.
        out: JSON lines to append to, written as they come: an interrupted run keeps what it measured.
        environment: fields every row carries, see :func:`environment`.
    """
    outcome = Outcome()
    out.parent.mkdir(parents=True, exist_ok=True)
    size = MATMUL_SIZE["cuda" if device.type == "cuda" else "cpu"]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with torch.no_grad():
        for workload in workloads:
            for case in cases:
                print(f"\n{workload.name} / {case.name}", flush=True)
                rows = _measure(workload, case, peers, dtype, repeats, (a, b), outcome)
                with out.open("a", encoding="utf-8") as file:
                    for row in rows:
                        file.write(json.dumps({**row, **environment}) + "\n")
                        outcome.rows.append({**row, **environment})
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    return outcome


def _measure(workload, case, peers, dtype, repeats, factors, outcome: Outcome) -> list[dict]:
    """Rows of one problem."""
    a, b = factors
    problem = Problem.make(workload, case, a.device, dtype)
    contestants, facts = {}, {}
    for peer in peers:
        try:
            contestant = peer.build(problem)
            facts[peer.name] = _verdict(contestant, a.device)
            contestants[peer.name] = contestant
        except Unsupported as reason:
            print(f"  {peer.name:<26}unsupported: {reason}", flush=True)
        except torch.OutOfMemoryError:
            print(f"  {peer.name:<26}unsupported: out of memory", flush=True)
        except Exception as error:  # one broken contestant must not cost the others their rows
            traceback.print_exc()
            where = f"{workload.name} / {case.name} / {peer.name}"
            outcome.problems.append(
                f"{where}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            print(f"  {peer.name:<26}not timed: {error}", flush=True)
    if not contestants:
        return []
    runs = {MATMUL: lambda: a @ b, **{name: c.run for name, c in contestants.items()}}
    times = timing.interleaved(runs, a.device, repeats)
    ceiling = 2 * a.shape[0] ** 3 / times[MATMUL].median / 1e9
    rows = []
    for name in contestants:
        t = times[name]
        tflops = workload.flops / t.median / 1e9
        rows.append({
            "workload": workload.name, "case": case.name, "impl": name,
            "ms_median": t.median, "ms_p20": t.p20, "ms_p80": t.p80, "rounds": t.rounds,
            "tflops": tflops, "peak_pct": 100 * tflops / ceiling, "matmul_tflops": ceiling, **facts[name],
            "dtype": str(dtype).removeprefix("torch."),
        })  # fmt: skip
        print(f"  {name:<26}{t.median:9.3f} ms [{t.p20:.3f}, {t.p80:.3f}]  {tflops:7.1f} TFLOP/s", flush=True)
    return rows


class WrongResult(Exception):
    """A contestant is outside the tolerance rule; it is not timed."""


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


# ---- where it ran ---------------------------------------------------------------------------------------------------


def environment(device: torch.device, rev: str | None = None) -> dict:
    """What every row says of machine, software and source."""
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rev": rev or _revision(),
    }


def _revision() -> str | None:
    """The commit of the clone this file lies in, ``-dirty`` with changes that are not committed."""
    git = "git", "-C", str(Path(__file__).resolve().parent)
    commit = _output(*git, "rev-parse", "--short=12", "HEAD")
    return commit and commit + ("-dirty" if _output(*git, "status", "--porcelain", "--untracked-files=no") else "")


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().partition("\n")[0] or None if done.returncode == 0 else None
