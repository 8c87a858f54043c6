"""``fastrope doctor``: what is installed, what would run and why, and whether it computes the right thing."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, debug
from .api import attention
from .device import capability, driver_version, kernel_obstacle
from .dispatch import decide
from .extras import MissingExtra
from .modulations import BandWeight, BiasDelta, LogitGain, QueryScale
from .planning import Plan, plan
from .rope import RoPE

PACKAGES = ("torch", "numpy", "triton", "diffusers", "transformers")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BINDINGS = ("diffusers", "transformers")  # extras of the same names bring what they need
GRID = 6  # the sample call attends over a target and a reference of 6 x 6 tokens
HEAD_DIM = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0, or 1 when the self-check failed.
    """
    parser = argparse.ArgumentParser(prog="fastrope doctor", description="What would run here and why.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--gpu", action="store_true",
        help="hold every kernel to the reference on this card and time it: a page, in about three minutes",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("fastrope-gpu"), help="folder of that page (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="with --gpu: tiny shapes on the CPU, to see it work")
    parser.add_argument(
        "--write", action="store_true", help="with --gpu: store which routes are fastest on this card; auto takes them"
    )
    parser.add_argument("--force", action="store_true", help="with --gpu: replace the results of an earlier run")
    options = parser.parse_args(argv)
    for name in ("write", "dry_run", "force"):
        if getattr(options, name) and not options.gpu:
            parser.error(f"--{name.replace('_', '-')}: expected --gpu beside it")
    if options.gpu:
        return _on_the_card(parser, options)
    found = report()
    print(json.dumps(found, indent=2) if options.json else render(found))
    return 0 if all(check["passed"] for check in found["self_check"]) else 1


def _on_the_card(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from .bench import first_run  # the benchmark is no part of the library

    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("--gpu: expected a CUDA device, found none; --dry-run shows what it would do")
    if options.dry_run and options.write:
        parser.error("--write: expected times of a card, --dry-run takes none")
    device = torch.device("cpu" if options.dry_run else "cuda")
    try:
        return 0 if first_run.run(options.out, device, options.force, options.write) else 1
    except ValueError as error:
        parser.error(str(error))


def report() -> dict:
    """Everything ``doctor`` knows, as plain JSON types."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "fastrope": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": driver_version(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("FASTROPE_") or name == "TRITON_INTERPRET"
        },
        "devices": _devices(),
        "backends": [_backends(device, dtype) for dtype in DTYPES],
        "bindings": {name: _importable(name) for name in BINDINGS},
        "self_check": _self_check(device),
    }


def render(found: dict) -> str:
    """The report as text."""
    lines = [f"fastrope {found['fastrope']}, Python {found['python']}, {found['platform']}", "", "packages"]
    lines += [f"  {name:<14}{version or 'not installed'}" for name, version in found["packages"].items()]
    toolkit = f"CUDA {found['cuda']}" if found["cuda"] else f"HIP {found['hip']}" if found["hip"] else "CPU only"
    lines += [f"  {'torch build':<14}{toolkit}", f"  {'driver':<14}{found['driver'] or 'none found'}"]
    lines += [f"  {name}={value}" for name, value in found["environment"].items()]
    lines += ["", "devices"]
    for d in found["devices"]:
        memory = f", {d['memory_gib']} GiB" if d["memory_gib"] is not None else ""
        lines.append(f"  {d['device']:<14}{d['name']}, {d['arch']}{memory}")
    for row in found["backends"]:
        lines += ["", f"{row['dtype']} on {row['device']}: auto takes {row['auto']} ({row['reason']})"]
        for name, obstacle in row["obstacles"].items():
            lines.append(f"  {name:<14}{'can run' if obstacle is None else f'cannot run: {obstacle}'}")
    lines += ["", "bindings"]
    lines += [f"  {name:<14}{problem or 'ready'}" for name, problem in found["bindings"].items()]
    lines += ["", "self-check, a small modulated call against the reference in float64"]
    for check in found["self_check"]:
        what = check["problem"] or f"error {check['error']:.2e}, allowed {check['allowed']:.2e}"
        name = f"{check['backend']} {check['dtype']}"
        lines.append(f"  {name:<14}  {'passed' if check['passed'] else 'FAILED'}: {what}")
    return "\n".join(lines)


def sample_call(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Plan]:
    """Small random q, k, v ``(1, 72, 2, 64)`` and a plan with one modulation of each kind."""
    generator = torch.Generator().manual_seed(0)  # on the CPU, so that every device sees the same numbers
    tokens = 2 * GRID**2
    q, k, v = (
        torch.randn((1, tokens, 2, HEAD_DIM), generator=generator, device="cpu").to(device, dtype) for _ in range(3)
    )
    index = torch.arange(tokens, device="cpu")
    place = index % GRID**2
    positions = torch.stack((index // GRID**2, place // GRID, place % GRID), dim=1)
    reference = slice(GRID**2, None)
    ramp = torch.linspace(0.5, 1.0, HEAD_DIM // 2, device="cpu")
    r = torch.ones(tokens, device="cpu")
    r[: GRID**2 // 2] = 0.7
    modulations = [
        QueryScale(r.to(device), keys=reference, axes=(1, 2)),
        BandWeight(ramp.to(device), keys=reference),
        BiasDelta(bias=1.05, delta=1.1, keys=reference),
        LogitGain((2 - r).to(device), keys=reference),
    ]
    rope = RoPE.axial(positions.to(device), axes_dim=(16, 24, 24))
    return q, k, v, plan(rope=rope, modulations=modulations)


def _backends(device: torch.device, dtype: torch.dtype) -> dict:
    q, k, v, prepared = sample_call(device, dtype)
    choice = decide(prepared.lowered, q, k, v, "auto")
    return {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "auto": choice.backend,
        "reason": choice.reason,
        "rejected": dict(choice.rejected),
        "obstacles": {"triton": kernel_obstacle(q), "sdpa": None, "eager": None},
    }


def _self_check(device: torch.device) -> list[dict]:
    """``sdpa``, and the kernels where they can run, on every dtype."""
    checks = []
    for dtype in DTYPES:
        q, k, v, prepared = sample_call(device, dtype)
        runs = ["sdpa"] if kernel_obstacle(q) else ["sdpa", "triton"]
        checks += [_check(q, k, v, prepared, backend) for backend in runs]
    return checks


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prepared: Plan, backend: str) -> dict:
    found = {"backend": backend, "dtype": str(q.dtype).removeprefix("torch."), "error": None, "allowed": None}
    try:
        out = attention(q, k, v, plan=prepared, backend=backend, debug=False)
        found["error"], found["allowed"] = debug.deviation(q, k, v, prepared.resolved, HEAD_DIM**-0.5, out)
    except Exception as error:
        return {**found, "passed": False, "problem": f"{type(error).__name__}: {error}"}
    return {**found, "passed": found["error"] <= found["allowed"], "problem": None}


def _versions() -> dict[str, str | None]:
    """Of every package, by the name it is imported with: triton is ``triton-windows`` on Windows."""
    brought = metadata.packages_distributions()
    found = {name: metadata.version(brought[name][0]) if name in brought else None for name in PACKAGES}
    return {**found, "torch": str(torch.__version__)}  # with the build, which its metadata may lack


def _devices() -> list[dict]:
    arch = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    devices = [{"device": "cpu", "name": f"{os.cpu_count()} cores", "arch": arch, "memory_gib": _host_memory()}]
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        arch = capability(torch.device("cuda", index))
        memory = round(p.total_memory / 2**30, 1)
        devices.append({"device": f"cuda:{index}", "name": p.name, "arch": arch, "memory_gib": memory})
    return devices


def _host_memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not every platform has sysconf or these names
        return None


def _importable(binding: str) -> str | None:
    """Why a binding cannot be imported, None if it can."""
    try:
        importlib.import_module(f"fastrope.bindings.{binding}")
    except Exception as error:
        return str(error) if isinstance(error, MissingExtra) else f"{type(error).__name__}: {error}"
    return None
