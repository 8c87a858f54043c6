"""The page of ``fastrope doctor --gpu``: a verdict, facts, what failed, times, rows and pictures."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import fastrope as fr
from fastrope import card, kernels, rules
from fastrope import device as devices

from . import plots, report, routes
from .environment import environment
from .rows import read

ALL_OFF = f"{devices.WITHOUT_KERNELS} (torch's operations alone)"  # where no other switch helps


def read_rows(path: Path) -> list[dict]:
    """Rows that steps wrote, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def render(folder: Path, device: torch.device, wanted: int, problems: list[str], seconds: float) -> tuple[str, bool]:
    """The page, and whether all of the ``wanted`` checks passed.

    Args:
        folder: of what the steps wrote.
        problems: of the steps.
        seconds: that the run took.
    """
    facts = environment(device)
    # Of a check that did not return, its beginning; one that was cut off did not run.
    latest = {row["job"]: row for row in read_rows(folder / "parity.jsonl")}
    latest = {job: row for job, row in latest.items() if not row.get("cut")}
    bad = [row for row in latest.values() if not row.get("passed")]
    passed = not bad and len(latest) == wanted
    lines = [f"# fastrope {fr.__version__} on {facts['gpu']}", "", _verdict(bad, len(latest), wanted), ""]
    lines += [f"{_card(device)}torch {facts['torch']}, triton {facts['triton']}, driver {facts['driver']}, Python "
              f"{platform.python_version()} on {platform.system()}, {facts['date']}, revision {facts['rev']}, "
              f"kernels {card.digest(kernels)}, {seconds:.0f} s"]  # fmt: skip
    lines += [f"* {name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("FASTROPE_")]
    lines += [f"* {problem}" for problem in problems]
    lines += [f"* check {row['name']}: {row.get('said', 'did not return')}" for row in bad]
    timed = read_rows(folder / "kernels.jsonl")
    lines += ["", *_kernel_table(timed)]
    lines += [f"* `auto` would be faster with {rule.route} for {rule.family}: {rule.reason}; `fastrope doctor --gpu "
              "--write` stores that" for rule in routes.fastest(timed) if not _is_taken(rule, timed)]  # fmt: skip
    for suite in ("attention", "block"):
        rows = read(folder / f"{suite}.jsonl") if (folder / f"{suite}.jsonl").exists() else []
        if rows:
            lines += ["", report.render(rows)]
            lines += [f"![{suite}]({path.name})" for path in _pictures(rows, folder)]
    return "\n".join(lines) + "\n", passed


def _verdict(bad: Sequence[dict], ran: int, wanted: int) -> str:
    if ran < wanted and not bad:
        again = "Run it again: what is compiled stays compiled."
        return f"{ran} of {wanted} checks ran and passed; the others did not run. {again}"
    if not bad:
        return f"All {wanted} checks passed."
    helps = {row.get("helps") for row in bad}
    advice = f"set {helps.pop() if len(helps) == 1 and None not in helps else ALL_OFF}"
    return f"{len(bad)} of {ran} checks FAILED: {advice}, and report this page."


def _card(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{card.name_of(device)}, {memory:.0f} GiB, CUDA {torch.version.cuda or torch.version.hip}, "


def _kernel_table(rows: Sequence[dict]) -> Iterator[str]:
    if rows:
        yield from ("| call | route | ms | host ms | kernels, microseconds |", "|---|---|---:|---:|---|")
    for row in rows:
        if "error" in row:
            yield f"| {row['case']} | | | | {row['error']} |"
            continue
        told = ", ".join(f"{name[:60].removesuffix('_kernel')} {us:.0f}" + (f" ({n:g} launches)" if n != 1 else "")
                         for name, us, n in row["kernels"])  # fmt: skip
        route = f"{row['route']}, of `auto`" if row["auto"] else row["route"]
        yield f"| {row['case']} | {route} | {row['ms']:.3f} | {row['host_ms']:.2f} | {told} |"


def _is_taken(rule: rules.Rule, rows: Sequence[dict]) -> bool:
    return any(row["auto"] and (row["family"], row["route"]) == (rule.family, rule.route)
               for row in rows if "error" not in row)  # fmt: skip


def _pictures(rows: Sequence[dict], folder: Path) -> list[Path]:
    try:
        return plots.draw(rows, folder, force=True)
    except ImportError:  # no matplotlib, no picture
        return []
