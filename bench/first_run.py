"""``fastrope doctor --gpu``: kernels held to the reference on this card, then timed, in about three minutes.

Every step is a process of its own with a time limit, and leaves what it found in files as it goes. So a card that hangs
or loses its context costs one step, and checks go on behind the call that did it. The end is a page to paste into an
issue, and rows as ``fastrope bench`` writes them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastrope import card, child, rules
from fastrope import device as devices
from fastrope.kernels.config import TMA_ARCHS
from fastrope.outputs import check_files, check_folder

from . import first_page, routes
from .first_checks import SWITCHES, Job, check, jobs
from .first_page import read_rows

PATIENCE = {"cuda": 1, "cpu": 10}  # times the limits: interpreted kernels are slow
LIMITS = {"parity": 70, "kernels": 40, "attention": 30, "block": 30}  # seconds of each step
HANGS = 25.0  # seconds without a row of the checks: the call hangs. The first one also compiles
TIME_IS_UP = "its time was up"
LOST = 3  # exit code of a process whose device is lost
ERRORS = "errors.txt"  # what steps wrote there


# ---- steps, each in a process of its own -----------------------------------------------------------------------------


def parity(out: Path, device: torch.device, first: int) -> int:
    """Check the jobs from number ``first`` on; one row each."""
    given = {name: os.environ.get(name) for name in SWITCHES}
    with out.open("a", encoding="utf-8") as file, torch.no_grad():
        for number, job in enumerate(jobs(device)[first:], start=first):
            row = {"job": number, "name": job.name, "passed": None, "said": "did not return", "helps": None}
            file.write(json.dumps({"job": number, "name": job.name}) + "\n")  # so that a hang has a name
            file.flush()
            for switch in (None, *_switches(job, device)):
                _switch({**given, **job.switches, **({switch: "0"} if switch else {})})
                try:
                    passed, said = check(job, device)
                except Exception as error:  # one broken call must not hide the others
                    passed, said = False, _told(error)
                _switch(given)
                if switch is None:
                    row |= {"passed": passed, "said": said}
                elif passed:
                    row["helps"] = f"{switch}=0"
                if passed or devices.lost(said):
                    break
            file.write(json.dumps(row) + "\n")
            file.flush()
            if devices.lost(row["said"]):
                return LOST
    return 0


def _switches(job: Job, device: torch.device) -> tuple[str, ...]:
    """Those that change what runs."""
    if job.switches:
        return ()
    return SWITCHES if devices.architecture(device) in TMA_ARCHS or device.type == "cpu" else SWITCHES[1:]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _switch(values: dict[str, str | None]) -> None:
    """Set environment variables; None unsets."""
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def kernels(out: Path, device: torch.device) -> int:
    """Every route of every family of calls, and microseconds of its kernels; one row each."""
    with out.open("a", encoding="utf-8") as file, torch.no_grad():
        for call in routes.calls(device.type):
            try:
                rows = routes.measure(call, device)
            except Exception as error:  # one broken call must not hide the others
                rows = [{"case": call.name, "error": _told(error)}]
            for row in rows:
                file.write(json.dumps(row) + "\n")
            file.flush()
            if devices.lost(rows[0].get("error", "")):
                return LOST
    return 0


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(folder: Path, device: torch.device, force: bool = False, write: bool = False, say: Callable = print) -> bool:
    """All steps, then the page ``gpu.md`` in ``folder``. Returns whether every check passed.

    Args:
        write: store which routes were fastest, for ``auto``; not where a check failed or did not run.

    Raises:
        ValueError: ``folder`` cannot be written to, or holds results already, unless ``force``.
    """
    check_folder("--out", folder)
    folder.mkdir(parents=True, exist_ok=True)
    start, problems = time.monotonic(), []
    mine = [folder / f"{name}.jsonl" for name in ("parity", "kernels", "attention", "block")] + [folder / ERRORS]
    check_files("--out", (), [*mine, folder / "gpu.md"], force)
    for path in mine:
        path.unlink(missing_ok=True)

    def told(what: str, code: int | str) -> None:
        if code:
            problems.append(f"{what} ended early: {code if isinstance(code, str) else _last_error(folder)}")

    wanted = len(jobs(device))
    say(f"checks: {wanted} calls against the reference (at most {LIMITS['parity']} s)")
    told("the checks", _parity(folder, device, wanted))
    say(f"microseconds per route and kernel (at most {LIMITS['kernels']} s)")
    told("the profile", _step(["kernels"], folder, device, LIMITS["kernels"] * PATIENCE[device.type]))
    small = device.type == "cpu"
    for suite, peers in (
        ("attention", ("fastrope-triton", "fastrope-auto", "cudnn", "flash")),
        ("block", ("fastrope-auto", "diffusers", "cudnn-alone")),
    ):
        say(f"rows of {suite} (at most {LIMITS[suite]} s)")
        arguments = ["--suite", suite, "--workload", "tiny" if small else "kontext", "--peer", *peers]
        arguments += ["--case", "plain"] if small else ["--case", "plain", "grag", "all"]
        arguments += ["--repeats", "1" if small else "20", "--device", device.type, "--out", str(folder)]
        lines = ["from fastrope.cli import main", f"main({['bench', *arguments]!r})"]
        told(suite, _process(lines, LIMITS[suite] * PATIENCE[device.type], device, folder))
    page, passed = first_page.render(folder, device, wanted, problems, time.monotonic() - start)
    if write:
        page += f"\n{_store(folder, device, passed)}\n"
        say(page.splitlines()[-1])
    (folder / "gpu.md").write_text(page, encoding="utf-8")
    say(f"{page.splitlines()[2]}\nthe page, to paste into an issue: {folder / 'gpu.md'}")
    return passed


def _parity(folder: Path, device: torch.device, wanted: int) -> int | str:
    """The checks, in as many processes as it takes to come past calls that hang or lose the device."""
    path, first, code = folder / "parity.jsonl", 0, 0
    deadline = time.monotonic() + LIMITS["parity"] * PATIENCE[device.type]
    while first < wanted and (left := deadline - time.monotonic()) > 0:
        code = _step(["parity", "--first", str(first)], folder, device, left, path)
        rows = read_rows(path)
        if code == 0 or not rows or rows[-1]["job"] < first:
            return code
        if code == TIME_IS_UP and "passed" not in rows[-1]:  # which says nothing of the call that was running
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1] | {"cut": True}) + "\n")
            return code
        first = rows[-1]["job"] + 1
    return 0 if code == LOST and first >= wanted else code


def _store(folder: Path, device: torch.device, passed: bool) -> str:
    """Write the rules that were measured; says what came of it."""
    found = routes.fastest(read_rows(folder / "kernels.jsonl"))
    if not (passed and found):
        return f"No rules written: {'a check failed or did not run' if not passed else 'no route was timed'}."
    try:
        rules.store(found, device)
    except (OSError, RuntimeError) as error:
        return f"No rules written: {error}."
    return f"Rules written to {card.path(rules.FILE)}: {', '.join(f'{r.family} by {r.route}' for r in found)}."


def _step(
    arguments: Sequence[str], folder: Path, device: torch.device, limit: float, grows: Path | None = None
) -> int | str:
    arguments = [*arguments, "--out", str(folder), "--device", device.type]
    lines = ["from fastrope.bench.first_run import main", f"main({list(arguments)!r})"]
    return _process(lines, limit, device, folder, grows)


def _process(
    lines: Sequence[str], limit: float, device: torch.device, folder: Path, grows: Path | None = None
) -> int | str:
    """Run Python; its exit code, or why there is none: it takes longer than ``limit``, or the file ``grows`` does not
    for ``HANGS`` seconds. What it writes to its standard error is kept."""
    code = f"{lines[0]}; raise SystemExit({lines[1]})"
    environment = dict(os.environ, PYTHONUNBUFFERED="1", FASTROPE_VERIFY="0")  # kernels are checked here, not hidden
    if device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    with (folder / ERRORS).open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(child.command(code), env=environment, stdout=subprocess.DEVNULL, stderr=errors)
    begin = since = time.monotonic()
    size = -1
    while process.poll() is None:
        now, found = time.monotonic(), grows.stat().st_size if grows is not None and grows.exists() else size
        if found != size:
            size, since = found, now
        up = now - begin > max(limit, 1)
        if up or (grows is not None and now - since > HANGS * PATIENCE[device.type]):
            process.kill()
            process.wait()
            return TIME_IS_UP if up else "it hung"
        time.sleep(0.05)
    return process.returncode


def _last_error(folder: Path) -> str:
    lines = (folder / ERRORS).read_text(encoding="utf-8").split("\n") if (folder / ERRORS).exists() else []
    return next((line for line in reversed(lines) if line.strip()), "nothing was said")[:300]


# ---- one step -----------------------------------------------------------------------------------------------------


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
