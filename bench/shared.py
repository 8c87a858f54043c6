"""The suite of denoising steps with a shared reference, against a plain one: time and peak memory.

On a GPU a full-size FLUX.1 with random weights at 1024 px. A contestant whose output is not the batched one's is not
timed.

* ``plain``: the transformer as it is; ``plain, batch 2`` has two targets.
* ``batched``: the reference is a second row of the batch.
* ``kept``: its keys and values come from a cache on the device; ``kept, host``: on the host.
* ``kept, new weights``: every call has band weights of its own, as every step of a schedule has.
* ``kept, filling``: the cache is empty before every call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

import fastrope as fr

from . import flux_model, timing
from .flux_model import Workload
from .frame import Selection, Session, Task

SUITE, ROUNDS, CASE = "shared", 20, "untwisting, paper"
TOLERANCE = 0.05  # of the largest output: half precision, other kernels and batch sizes
CASES = (CASE,)
PEERS = ("plain", "plain, batch 2", "batched", "kept", "kept, host", "kept, new weights", "kept, filling")


def tasks(selection: Selection) -> list[Task]:
    """One for each workload: the model is built once, and every output is held against the batched one's."""
    wanted = selection.cases_of(CASES) and selection.peers_of(PEERS)
    workloads = selection.of(flux_model.WORKLOADS) if wanted else []
    return [Task(SUITE, w.name, None, partial(measure, workload=w)) for w in workloads]


@dataclass
class Contestant:
    """A step under a name; ``cache`` is what it keeps, ``batch`` its targets."""

    run: Callable[[], torch.Tensor]
    batch: int = 1
    cache: fr.ReferenceCache | None = None


@contextlib.contextmanager
def contestants(workload: Workload, model, device, dtype, name: str) -> Iterator[Contestant]:
    """One contestant, bound to the model while the context is open."""
    call = workload.call(2 if name == "plain, batch 2" else 1, device, dtype)
    own = workload.call(1, device, dtype, seed=1)
    given = {key: own[key] for key in ("encoder_hidden_states", "pooled_projections")}
    source = fr.Reference(lambda step, sigma: own["hidden_states"], given)
    method = fr.UntwistingRoPE()

    def step() -> torch.Tensor:
        return model(**call)[0]

    if name.startswith("plain"):
        yield Contestant(step, len(call["hidden_states"]))
        return
    place = "cpu" if name == "kept, host" else None
    cache = None if name == "batched" else fr.ReferenceCache(source, device=place)
    with fr.apply(model, method, reference=source if cache is None else cache) as handle:
        handle.set_step(10, 28)
        count = 0

        def turned() -> torch.Tensor:
            nonlocal count
            count += 1
            handle.update(replace(method, s_lf=(1.0, 1.4 + 1e-6 * count)))
            return step()

        def filled() -> torch.Tensor:
            cache.clear()
            return step()

        yield Contestant({"kept, new weights": turned, "kept, filling": filled}.get(name, step), cache=cache)


def measure(session: Session, workload: Workload) -> None:
    """Rows of all contestants, written as they come."""
    device = session.device
    model, outputs, plain = workload.build(device, session.dtype), {}, None
    for name in PEERS:
        with contestants(workload, model, device, session.dtype, name) as contestant:
            outputs[name] = contestant.run().double().cpu()
            wrong = check(name, outputs)
            if wrong:
                session.problem(f"{SUITE} / {workload.name} / {name}", wrong)
                continue
            t = timing.interleaved({name: contestant.run}, device, session.rounds(ROUNDS))[name]
            plain = t.median if name == "plain" else plain
            kernel, launches = timing.kernels(contestant.run, device)
            cache = contestant.cache
            session.emit(SUITE, [{
                "workload": workload.name, "case": CASE, "impl": name, **t.fields, "x_plain": t.median / plain,
                "peak_mem_mib": timing.peak_memory_mib(contestant.run, device),
                "cache_mib": None if cache is None else cache.nbytes / 2**20, "kernel": kernel, "launches": launches,
                "batch": contestant.batch, **workload.facts,
            }])  # fmt: skip
        print(f"  {name:<20}{t.median:10.2f} ms [{t.p20:.2f}, {t.p80:.2f}]  {t.median / plain:.2f} x plain", flush=True)


def check(name: str, outputs: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with a contestant's output; None if nothing is."""
    out, plain, batched = outputs[name], outputs["plain"], outputs.get("batched")
    if not bool(out.isfinite().all()):
        return "values that are not finite"
    if name.startswith("plain"):
        return None
    largest = float(batched.abs().max())
    if name == "batched":
        return None if not torch.equal(out, plain) else "the plain step's output"
    gap = float((out - batched).abs().max()) / largest
    return None if gap <= TOLERANCE else f"another output than the batched step's (by {gap:.2g} of the largest value)"
