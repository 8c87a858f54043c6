"""One training loop for every model of the lab: constant rate with averaged weights, so that it may stop at any time.

A step's data depend on the seed and the step's number alone, and a checkpoint holds everything else: a run that was cut
off and resumed gives the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import csv
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import require

WARMUP = 200  # steps
REPORT = 50  # steps between two rows of the loss curve
SAVE = 120.0  # seconds between two checkpoints


@dataclass(frozen=True)
class Job:
    """What to train.

    Args:
        name: of the checkpoint, the loss curve and the weights.
        build: the model with fresh weights.
        losses: from (model, generator, device), the losses of one step, each differentiated before the next is made.
        samples: pictures per step.
        blocks: the repeated blocks of a model, which ``--compile`` compiles.
        rate: learning rate after the warm-up.
        decay: of the averaged weights, per step.
    """

    name: str
    build: Callable[[], nn.Module]
    losses: Callable[[nn.Module, torch.Generator, torch.device], Iterator[torch.Tensor]]
    samples: int
    blocks: Callable[[nn.Module], list[nn.Module]] = lambda model: []
    rate: float = 2e-3
    decay: float = 0.9993


class Run:
    """A job in progress: model, averaged weights, optimiser and the number of steps behind it."""

    def __init__(self, job: Job, device: torch.device | str = "cpu", seed: int = 0):
        self.job, self.device, self.seed = job, torch.device(device), seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = job.build().to(self.device)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=job.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.step, self.samples, self.seconds = 0, 0, 0.0

    def advance(self, factor: float = 1.0) -> float:
        """Take one step at ``factor`` times the rate; returns the loss."""
        seed, total = self.seed * 10**9 + self.step, 0.0
        with torch.random.fork_rng():  # dropout draws from the global generator
            torch.manual_seed(seed)
            for loss in self.job.losses(self.model, torch.Generator().manual_seed(seed), self.device):
                loss.backward()
                total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.param_groups[0]["lr"] = self.job.rate * min(1.0, (self.step + 1) / WARMUP) * factor
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        self.samples += self.job.samples
        decay = min(self.job.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 1 - decay)
        return total

    def averaged(self) -> dict[str, torch.Tensor]:
        """The state dict of the model with the averaged weights."""
        names = [name for name, _ in self.model.named_parameters()]
        return {**self.model.state_dict(), **dict(zip(names, self.average, strict=True))}

    def save(self, path: Path) -> None:
        """Write a checkpoint, replacing the file in one move."""
        state = {
            "model": self.model.state_dict(), "average": self.average, "optimiser": self.optimiser.state_dict(),
            "seed": self.seed, "step": self.step, "samples": self.samples, "seconds": self.seconds,
        }  # fmt: skip
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it is of another seed.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        require(state["seed"] == self.seed, "seed", f"that of {path}, {state['seed']}", self.seed)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average = state["average"]
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]


def train(
    job: Job,
    folder: Path,
    *,
    minutes: float,
    anneal: int = 0,
    device: str = "cpu",
    seed: int = 0,
    compile: bool = False,
) -> Run:
    """Train for some minutes from where the checkpoint in ``folder`` stands, or from the start.

    Args:
        folder: gets ``NAME.pt`` (the checkpoint) and ``NAME.csv`` (step, samples, seconds, mean loss).
        anneal: steps in which the rate falls to zero; the run ends there, and goes to ``NAME-annealed.pt``, so that
            the constant run can still go on.
        compile: compile the blocks: minutes at first, then 1.5 times as fast on a CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run, path, curve = Run(job, device, seed), folder / f"{job.name}.pt", folder / f"{job.name}.csv"
    if path.exists():
        run.resume(path)
    for block in job.blocks(run.model) if compile else []:
        block.compile(dynamic=False)
    first, started, saved, losses = run.step, time.monotonic(), time.monotonic(), []
    before, suffix = run.seconds, "-annealed" if anneal else ""
    target = path.with_stem(path.stem + suffix)
    while time.monotonic() - started < 60 * minutes and not (anneal and run.step == first + anneal):
        losses.append(run.advance(1 - (run.step - first) / anneal if anneal else 1.0))
        run.seconds = before + time.monotonic() - started
        if run.step % REPORT == 0:
            _report(run, curve.with_stem(curve.stem + suffix), losses)
            losses = []
        if time.monotonic() - saved > SAVE:
            run.save(target)
            saved = time.monotonic()
    run.save(target)
    return run


@contextlib.contextmanager
def fast(device: torch.device):
    """Products in bfloat16, and attention without a fused kernel: at these sizes its derivative is far faster on a
    CPU than that of torch's fused attention."""
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, torch.bfloat16):
        yield


def _report(run: Run, curve: Path, losses: list[float]) -> None:
    row = {
        "step": run.step, "samples": run.samples, "seconds": round(run.seconds),
        "loss": round(sum(losses) / len(losses), 5),
    }  # fmt: skip
    new = not curve.exists()
    with curve.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(run.job.name, *(f"{name} {value}" for name, value in row.items()), flush=True)
