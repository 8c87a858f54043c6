"""``fastrope doctor --gpu``: every kernel held to the reference on this card, then timed, in about three minutes.

Every step is a process of its own with a time limit, and leaves what it found in files as it goes. So a card that hangs
or loses its context costs one step, and checks go on behind the call that did it. The end is a page to paste into an
issue, and rows as ``fastrope bench`` writes them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import fastrope as fr
from fastrope.outputs import check_files, check_folder

from . import block, plots, report, timing
from .cases import CASES
from .environment import environment
from .problem import Problem
from .rows import read
from .workloads import WORKLOADS, Workload

LIMITS = {"parity": 80, "kernels": 45, "attention": 35, "block": 35}  # seconds of each step
SWITCHES = ("FASTROPE_TMA", "FASTROPE_POLYNOMIAL")  # tried one after the other where a check fails
HANGS = 25.0  # seconds without a row of the checks; the first call also compiles
LOST = 3  # exit code of a process whose device is lost
POISON = {"cuda": 2**26, "cpu": 2**10}  # floats of NaN in the memory that outputs are taken from
KERNELS_TOLD = 8


@dataclass(frozen=True)
class Job:
    """One call that is held to the reference."""

    name: str
    workload: Workload
    case: str
    backend: str = "triton"
    dtype: torch.dtype = torch.bfloat16
    applied: bool = False
    joint: bool = False
    switches: dict[str, str] = field(default_factory=dict)


def jobs(device: str) -> list[Job]:
    """Every kernel at the shapes and dtypes it is for; on a CPU a few, interpreted, for a dry run."""
    edges = ("all", "all-per-query")
    if device == "cpu":
        tiny = WORKLOADS["tiny"]
        return [Job(f"{case} {backend}", tiny, case, backend, torch.float32) for case in ("plain", *edges)
                for backend in ("triton", "auto")]  # fmt: skip
    big, masked = WORKLOADS["kontext"], WORKLOADS["qwen-edit"]
    small = replace(big, tokens=fr.TokenLayout(77, (24, 24), references=[(24, 24)]))
    found = [Job(f"{case} {backend}", big, case, backend) for backend in ("triton", "auto") for case in CASES
             if CASES[case].suits(big)]  # fmt: skip
    found += [Job(f"{case} applied", big, case, applied=True) for case in ("plain", *edges)]
    found += [Job(f"{case} masked {backend}", masked, case, backend) for case in ("plain", "all")
              for backend in ("triton", "auto")]  # fmt: skip
    found += [Job(f"{case} joint", big, case, joint=True) for case in ("plain", "all")]
    for switch in SWITCHES:
        found += [Job(f"{case} {switch}=0", small, case, switches={switch: "0"}) for case in edges]
    for dim, axes in ((64, (8, 28, 28)), (96, (16, 40, 40)), (256, (64, 96, 96))):
        found += [
            Job(f"{case} head dim {dim}", replace(small, dim=dim, axes_dim=axes, heads=8), case) for case in edges
        ]
    for dtype in (torch.float16, torch.float32):
        found += [Job(f"{case} {str(dtype)[6:]}", small, case, dtype=dtype) for case in edges]
    return found


def check(job: Job, device: torch.device) -> tuple[bool, str]:
    """Whether a job's output is within the tolerance rule and the same twice, over poisoned memory; and by how much."""
    kind = block.BlockProblem.of if job.joint else Problem.make
    problem = kind(job.workload, CASES[job.case], device, job.dtype)
    problem = problem.applied if job.applied else problem

    def run() -> torch.Tensor:
        if device.type == "cuda":  # so that outputs come from what is poisoned, not from results of before
            torch.cuda.empty_cache()
        held = [torch.full((size,), torch.nan, device=device) for size in (POISON[device.type], *[2**15] * 64)]
        del held
        if job.joint:
            return fr.joint_attention(problem.streams, plan=problem.plan)
        return fr.attention(problem.q, problem.k, problem.v, plan=problem.plan, backend=job.backend, debug=False)

    first, second = run(), run()
    errors = problem.check(first)
    same = torch.equal(first, second)
    largest, mean = errors.max_out / errors.max_allowed, errors.mean_out / errors.mean_allowed
    said = f"{largest:.2f} of the largest error allowed, {mean:.2f} of the mean"
    return errors.passed and same, said if same else f"{said}; NOT THE SAME TWICE"


# ---- steps, each in a process of its own -----------------------------------------------------------------------------


def parity(out: Path, device: torch.device, first: int) -> int:
    """Check the jobs from number ``first`` on; one row each."""
    given = {name: os.environ.get(name) for name in SWITCHES}
    with out.open("a", encoding="utf-8") as file, torch.no_grad():
        for number, job in enumerate(jobs(device.type)[first:], start=first):
            row = {"job": number, "name": job.name, "passed": None, "said": "did not return", "helps": None}
            file.write(json.dumps({"job": number, "name": job.name}) + "\n")  # so that a hang has a name
            file.flush()
            for switch in (None, *SWITCHES):
                _switch({**given, **job.switches, **({switch: "0"} if switch else {})})
                try:
                    passed, said = check(job, device)
                except Exception as error:  # one broken call must not hide the others
                    passed, said = False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                _switch(given)
                if switch is None:
                    row |= {"passed": passed, "said": said}
                elif passed:
                    row["helps"] = f"{switch}=0"
                if passed or _lost(said) or job.switches:
                    break
            file.write(json.dumps(row) + "\n")
            file.flush()
            if _lost(row["said"]):
                return LOST
    return 0


def _switch(values: dict[str, str | None]) -> None:
    """Set environment variables; None unsets."""
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _lost(said: str) -> bool:
    """Whether an error of torch's or triton's leaves a device on which nothing runs any more."""
    return ("CUDA error" in said or "[CUDA]" in said) and "out of memory" not in said


def kernels(out: Path, device: torch.device) -> int:
    """Microseconds of every kernel of every case; one row each."""
    workload = WORKLOADS["kontext" if device.type == "cuda" else "tiny"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with out.open("a", encoding="utf-8") as file, torch.no_grad():
        cases = ("plain", "all") if device.type == "cpu" else CASES
        for case in (case for case in cases if CASES[case].suits(workload)):
            problem = Problem.make(workload, CASES[case], device, dtype)
            for backend in ("triton", "auto"):

                def run(problem=problem, backend=backend):
                    return fr.attention(
                        problem.q, problem.k, problem.v, plan=problem.plan, backend=backend, debug=False,
                    )  # fmt: skip

                found = timing.interleaved({"call": run}, device, 10 if device.type == "cuda" else 1)["call"]
                row = {"case": case, "backend": backend, "ms": found.median, "host_ms": found.host,
                       "kernels": timing.by_kernel(run, device, 5)[:KERNELS_TOLD]}  # fmt: skip
                file.write(json.dumps(row) + "\n")
                file.flush()
    return 0


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(folder: Path, device: torch.device, force: bool = False, say: Callable = print) -> bool:
    """All steps, then the page ``gpu.md`` in ``folder``. Returns whether every check passed.

    Raises:
        ValueError: ``folder`` cannot be written to, or holds results already, unless ``force``.
    """
    check_folder("--out", folder)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    mine = [folder / f"{name}.jsonl" for name in ("parity", "kernels", "attention", "block")]
    check_files("--out", (), [*mine, folder / "gpu.md"], force)
    for path in mine:
        path.unlink(missing_ok=True)
    say(f"checks: {len(jobs(device.type))} calls against the reference")
    deadline, first, problems = time.monotonic() + LIMITS["parity"], 0, []
    while first < len(jobs(device.type)) and time.monotonic() < deadline:
        step = ["parity", "--first", str(first)]
        code = _step(step, folder, device, min(deadline - time.monotonic(), HANGS), folder / "parity.jsonl")
        begun = [row["job"] for row in _rows(folder / "parity.jsonl")]
        if code == 0 or not begun or begun[-1] < first:
            break
        first = begun[-1] + 1
    if code not in (0, LOST):
        problems.append(f"the checks ended early: {code}")
    say("microseconds per kernel")
    code = _step(["kernels"], folder, device, LIMITS["kernels"])
    problems += [f"the profile ended early: {code}"] if code else []
    small = device.type == "cpu"
    workload = "tiny" if small else "kontext"
    for suite, peers in (
        ("attention", ("fastrope-triton", "fastrope-auto", "cudnn", "flash")),
        ("block", ("fastrope-auto", "diffusers", "cudnn-alone")),
    ):
        say(f"rows of {suite}")
        arguments = ["--suite", suite, "--workload", workload, "--peer", *peers, "--case", "plain"]
        arguments += [] if small else ["grag", "all"]
        arguments += ["--repeats", "1" if small else "20", "--device", device.type, "--out", str(folder)]
        code = _process(["from fastrope.cli import main", f"main({['bench', *arguments]!r})"], LIMITS[suite], device)
        problems += [f"{suite} ended early: {code}"] if code else []
    page, passed = _page(folder, device, problems, time.monotonic() - start)
    (folder / "gpu.md").write_text(page, encoding="utf-8")
    say(f"{page.splitlines()[2]}\nthe page: {folder / 'gpu.md'}")
    return passed


def _step(
    arguments: Sequence[str], folder: Path, device: torch.device, limit: float, grows: Path | None = None
) -> int | str:
    arguments = [*arguments, "--out", str(folder), "--device", device.type]
    return _process(["from fastrope.bench.first_run import main", f"main({list(arguments)!r})"], limit, device, grows)


def _process(lines: Sequence[str], limit: float, device: torch.device, grows: Path | None = None) -> int | str:
    """Run Python; its exit code, or why there is none. ``limit`` begins anew whenever the file ``grows`` does."""
    code = f"{lines[0]}; raise SystemExit({lines[1]})"
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    size, since = -1, time.monotonic()
    while process.poll() is None:
        now = grows.stat().st_size if grows is not None and grows.exists() else size
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > max(limit, 1):
            process.kill()
            process.wait()
            return f"stopped after {limit:.0f} s"
        time.sleep(0.05)
    return process.returncode


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


# ---- the page --------------------------------------------------------------------------------------------------------


def _page(folder: Path, device: torch.device, problems: list[str], seconds: float) -> tuple[str, bool]:
    facts = environment(device)
    latest = {row["job"]: row for row in _rows(folder / "parity.jsonl")}  # of a job that did not return, its beginning
    bad = [row for row in latest.values() if not row.get("passed")]
    wanted = len(jobs(device.type))
    passed = not bad and len(latest) == wanted
    lines = [f"# fastrope {fr.__version__} on {facts['gpu']}", "", _verdict(bad, len(latest), wanted), ""]
    lines += [f"torch {facts['torch']}, triton {facts['triton']}, driver {facts['driver']}, {facts['date']}, revision "
              f"{facts['rev']}, {seconds:.0f} s"]  # fmt: skip
    lines += [f"* {problem}" for problem in problems]
    lines += [f"* check {row['name']}: {row.get('said', 'did not return')}" for row in bad]
    lines += ["", *_kernel_table(folder / "kernels.jsonl")]
    for suite in ("attention", "block"):
        rows = read(folder / f"{suite}.jsonl") if (folder / f"{suite}.jsonl").exists() else []
        if rows:
            lines += ["", report.render(rows)]
            lines += [f"![{suite}]({path.name})" for path in _pictures(rows, folder)]
    return "\n".join(lines) + "\n", passed


def _verdict(bad: Sequence[dict], ran: int, wanted: int) -> str:
    if ran < wanted and not bad:
        return f"{ran} of {wanted} checks ran and passed; the others did not run."
    if not bad:
        return f"All {wanted} checks passed."
    helps = {row.get("helps") for row in bad}
    advice = f"set {helps.pop()}" if len(helps) == 1 and None not in helps else 'use backend="sdpa"'
    return f"{len(bad)} of {ran} checks FAILED: {advice}, and report this page."


def _kernel_table(path: Path) -> Iterator[str]:
    rows = _rows(path)
    if rows:
        yield from ("| call | ms | host ms | kernels, microseconds |", "|---|---:|---:|---|")
    for row in rows:
        told = ", ".join(f"{name[:60].removesuffix('_kernel')} {us:.0f}" + (f" ({n:g} launches)" if n != 1 else "")
                         for name, us, n in row["kernels"])  # fmt: skip
        yield f"| {row['case']}, {row['backend']} | {row['ms']:.3f} | {row['host_ms']:.2f} | {told} |"


def _pictures(rows: Sequence[dict], folder: Path) -> list[Path]:
    try:
        return plots.draw(rows, folder, force=True)
    except ImportError:  # no matplotlib, no picture
        return []


def main(argv: Sequence[str]) -> int:
    """One step, for :func:`run`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=("parity", "kernels"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args(argv)
    device, out = torch.device(options.device), options.out / f"{options.step}.jsonl"
    return parity(out, device, options.first) if options.step == "parity" else kernels(out, device)
