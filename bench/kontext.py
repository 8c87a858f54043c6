"""The suite of denoising steps of FLUX.1 Kontext under the editing methods, against the stock one.

On a GPU a full-size transformer with random weights at 1024 px. A contestant whose output is not that of the sdpa
backend is not timed.

* ``stock``: the transformer as it is; ``neutral``: bound, with nothing to modulate.
* ``GRAG``: delta 1.1. ``LooseRoPE``: a random saliency on a quarter of the target, first step. ``both``.
"""

from __future__ import annotations

import contextlib
from functools import partial

import torch

import fastrope as fr

from . import flux_model, timing
from .flux_model import Workload
from .frame import Selection, Session, Task

SUITE, ROUNDS = "kontext", 20
TOLERANCE = 0.05  # of the largest output: half precision, other kernels
CASES = ("stock", "neutral", "GRAG", "LooseRoPE", "both")


def tasks(selection: Selection) -> list[Task]:
    """One for each workload: the model is built once."""
    names = selection.cases_of(CASES)
    workloads = selection.of(flux_model.WORKLOADS) if names else []
    return [Task(SUITE, w.name, None, partial(measure, workload=w, names=names)) for w in workloads]


def methods(name: str, grid: tuple[int, int]) -> list:
    """What a contestant binds."""
    rows, columns = grid
    saliency = torch.rand(grid, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[rows // 4 : rows // 4 + max(rows // 2, 1), columns // 4 : columns // 4 + max(columns // 2, 1)] = True
    grag, loose = fr.GRAG(delta=1.1), fr.LooseRoPE(saliency=saliency, mask=mask)
    return {"neutral": [fr.GRAG(delta=1.0)], "GRAG": [grag], "LooseRoPE": [loose], "both": [grag, loose]}[name]


def call(workload: Workload, device, dtype) -> dict:
    """Arguments of the transformer: target and one reference of the same size."""
    arguments = workload.call(1, device, dtype)
    reference = workload.call(1, device, dtype, seed=1)["hidden_states"]
    layout = fr.TokenLayout(workload.text, workload.grid, [workload.grid])
    ids = layout.positions("flux", device).to(dtype)
    arguments["hidden_states"] = torch.cat([arguments["hidden_states"], reference], dim=1)
    arguments["img_ids"] = ids[workload.text :]
    return arguments


def measure(session: Session, workload: Workload, names: list[str]) -> None:
    """Rows of all contestants, written as they come."""
    device = session.device
    model, arguments = workload.build(device, session.dtype), call(workload, device, session.dtype)
    stock = None

    def step() -> torch.Tensor:
        return model(**arguments)[0]

    def bound(name: str, backend: str):
        if name == "stock":
            return contextlib.nullcontext()
        handle = fr.apply(model, *methods(name, workload.grid), backend=backend)
        handle.set_step(0, 28)
        return handle

    for name in names:
        with bound(name, "sdpa"):
            expected = step().double().cpu()
        with bound(name, "auto"):
            out = step().double().cpu()
            gap = float((out - expected).abs().max() / expected.abs().max())
            if not gap <= TOLERANCE:
                wrong = f"another output than sdpa's, by {gap:.2g} of the largest value"
                session.problem(f"{SUITE} / {workload.name} / {name}", wrong)
                continue
            t = timing.interleaved({name: step}, device, session.rounds(ROUNDS))[name]
            stock = t.median if name == "stock" else stock
            kernel, launches = timing.kernels(step, device)
            over = None if stock is None else t.median / stock
            session.emit(SUITE, [{
                "workload": workload.name, "case": name, "impl": "diffusers" if name == "stock" else "fastrope",
                **t.fields, "x_stock": over,
                "peak_mem_mib": timing.peak_memory_mib(step, device), "gap": gap, "kernel": kernel,
                "launches": launches, "batch": 1, **workload.facts,
            }])  # fmt: skip
        print(f"  {name:<20}{t.median:10.2f} ms [{t.p20:.2f}, {t.p80:.2f}]  {over or 1:.2f} x stock", flush=True)
