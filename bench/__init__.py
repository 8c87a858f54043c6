"""``fastrope bench``: contestants checked against the reference, then timed, one row of JSON each.

``workloads`` say which tensors, ``cases`` which modulations, ``peers`` who computes them; each is a registry that a new
entry extends. ``runner`` checks and measures with the clocks of ``timing``; ``report`` turns rows into tables and knows
nothing else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path("bench/results")
SUITE = "attention"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or report rows of earlier runs.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0; 1 when a contestant was wrong or failed; 2 when the benchmark cannot run here.
    """
    import torch

    from . import report, runner
    from .cases import CASES
    from .peers import PEERS
    from .workloads import WORKLOADS

    options = _parser(WORKLOADS, CASES, PEERS).parse_args(argv)
    if options.report is not None:
        paths = options.report or sorted(RESULTS.glob("*/*.jsonl"))
        if not paths:
            print(f"fastrope bench: no rows under {RESULTS}", file=sys.stderr)
            return 2
        print(report.render([row for path in paths for row in report.read(path)]))
        return 0
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    small = device.type == "cpu"
    suited = [w for w in WORKLOADS.values() if w.small == small]
    workloads = [WORKLOADS[name] for name in options.workload or ()] or suited[: 1 if options.quick else None]
    cases = [CASES[name] for name in options.case or CASES]
    peers = [PEERS[name] for name in options.peer or PEERS]
    repeats = options.repeats or (10 if options.quick or small else 50)
    environment = runner.environment(device, options.rev)
    out = options.out
    if out is None:  # timings of a CPU say nothing of the kernels and stay out of the results
        folder = (
            Path(tempfile.mkdtemp(prefix="fastrope-bench-")) if small else RESULTS / report.slug(environment["gpu"])
        )
        out = folder / f"{SUITE}.jsonl"
    outcome = runner.run(workloads, cases, peers, device, dtype, repeats, out, environment)
    print(f"\n{report.render(outcome.rows)}\n{len(outcome.rows)} rows in {out}")
    for problem in outcome.problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if outcome.problems else 0


def _parser(workloads, cases, peers) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrope bench",
        description="Check every contestant against the reference in float64, then time those that pass. On a CPU a "
        "smoke test of a tiny shape.",
    )
    for name, registry in (("workload", workloads), ("case", cases), ("peer", peers)):
        known = ", ".join(registry)
        parser.add_argument(
            f"--{name}", nargs="+", action="extend", choices=registry, metavar="NAME", help=f"some of: {known}"
        )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"JSON lines to append to ({RESULTS}/<gpu>/{SUITE}.jsonl)"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="timed rounds (default 50)")
    parser.add_argument("--quick", action="store_true", help="the first workload, 10 rounds")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16, float32 on a CPU"
    )
    parser.add_argument("--rev", help="revision to record where there is no git history")
    parser.add_argument(
        "--report", nargs="*", type=Path, metavar="ROWS", help="print tables of earlier rows instead (default: all)"
    )
    return parser
