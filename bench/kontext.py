#!/usr/bin/env python3
"""A denoising step of FLUX.1 Kontext under the editing methods against the stock one: a row of JSON each.

``python bench/kontext.py`` on a GPU calls a full-size transformer with random weights at 1024 px and writes
``bench/results/<gpu>/kontext.jsonl``; on a CPU it is a smoke test of a tiny one that leaves its rows in a temporary
folder. Needs diffusers. A contestant whose output is not that of the sdpa backend is not timed.

* ``stock``: the transformer as it is; ``neutral``: bound, with nothing to modulate.
* ``GRAG``: delta 1.1. ``LooseRoPE``: a random saliency on a quarter of the target, first step. ``both``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import fastrope as fr
from fastrope.bench import RESULTS, report, runner, shared, timing

NAMES = ("stock", "neutral", "GRAG", "LooseRoPE", "both")


def methods(name: str, grid: tuple[int, int]) -> list:
    """What a contestant binds."""
    rows, columns = grid
    saliency = torch.rand(grid, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[rows // 4 : rows // 4 + max(rows // 2, 1), columns // 4 : columns // 4 + max(columns // 2, 1)] = True
    grag, loose = fr.GRAG(delta=1.1), fr.LooseRoPE(saliency=saliency, mask=mask)
    return {"neutral": [fr.GRAG(delta=1.0)], "GRAG": [grag], "LooseRoPE": [loose], "both": [grag, loose]}[name]


def call(workload: shared.Workload, device, dtype) -> dict:
    """Arguments of the transformer: target and one reference of the same size."""
    arguments = workload.call(1, device, dtype)
    reference = workload.call(1, device, dtype, seed=1)["hidden_states"]
    layout = fr.TokenLayout(workload.text, workload.grid, [workload.grid])
    ids = layout.positions("flux", device).to(dtype)
    arguments["hidden_states"] = torch.cat([arguments["hidden_states"], reference], dim=1)
    arguments["img_ids"] = ids[workload.text :]
    return arguments


def measure(workload: shared.Workload, device: torch.device, dtype: torch.dtype, repeats: int):
    """Rows of all contestants, and what was wrong."""
    model, arguments = workload.build(device, dtype), call(workload, device, dtype)
    rows, problems, stock = [], [], None

    def step() -> torch.Tensor:
        with torch.no_grad():
            return model(**arguments)[0]

    def bound(name: str, backend: str):
        if name == "stock":
            return contextlib.nullcontext()
        handle = fr.apply(model, *methods(name, workload.grid), backend=backend)
        handle.set_step(0, 28)
        return handle

    for name in NAMES:
        with bound(name, "sdpa"):
            expected = step().double().cpu()
        with bound(name, "auto"):
            out = step().double().cpu()
            gap = float((out - expected).abs().max() / expected.abs().max())
            if not gap <= shared.TOLERANCE:
                problems.append(
                    f"{workload.name} / {name}: another output than sdpa's, by {gap:.2g} of the largest value"
                )
                continue
            t = timing.interleaved({name: step}, device, repeats)[name]
            stock = t.median if stock is None else stock
            kernel, launches = timing.kernels(step, device)
            rows.append({
                "workload": workload.name, "case": name, "impl": "diffusers" if name == "stock" else "fastrope",
                "ms_median": t.median, "ms_p20": t.p20, "ms_p80": t.p80, "rounds": t.rounds,
                "x_stock": t.median / stock, "peak_mem_mib": timing.peak_memory_mib(step, device), "gap": gap,
                "kernel": kernel, "launches": launches, "dtype": str(dtype).removeprefix("torch."), "batch": 1,
                "text": workload.text, "grid": workload.grid, "blocks": workload.blocks, "heads": workload.heads,
                "dim": sum(workload.axes),
            })  # fmt: skip
        print(f"{name:<12}{t.median:10.2f} ms [{t.p20:.2f}, {t.p80:.2f}]  {t.median / stock:.2f} x stock", flush=True)
    return rows, problems


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0, or 1 when a contestant was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to append to")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed rounds (default 20)")
    parser.add_argument("--rev", help="revision to record where there is no git history")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = runner.environment(device, options.rev)
    small = device.type == "cpu"
    folder = Path(tempfile.mkdtemp(prefix="fastrope-bench-")) if small else RESULTS / report.slug(environment["gpu"])
    out = options.out or folder / "kontext.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    workload, dtype = (shared.SMALL, torch.float32) if small else (shared.FULL, torch.bfloat16)
    rows, problems = measure(workload, device, dtype, options.repeats)
    with out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **environment}) + "\n" for row in rows)
    print(f"rows in {out}")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
