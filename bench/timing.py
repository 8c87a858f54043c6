"""Clocks: interleaved rounds, peak memory, and which kernel ran."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastrope.device import synchronise

Run = Callable[[], object]

FLUSH_MIB = 256  # several times the L2 of any GPU: a contestant must not find its inputs there
SPACERS = 16  # flushes before a run keep a fast device busy for a millisecond, in which the host queues the run
BUDGET_MS = 4000.0  # of one contestant: slow ones take part in the first rounds only
LEAST_ROUNDS = 3
WARMUPS = 3
SLOW_MS = 500.0  # needs no warm-up beyond its first run


@dataclass(frozen=True)
class Times:
    """Milliseconds over the rounds: of the device, and the median of what the host takes to queue a run."""

    median: float
    p20: float
    p80: float
    rounds: int
    host: float

    @classmethod
    def of(cls, samples: list[tuple[float, float]]) -> Times:
        """Median and spread of ``(device, host)``."""
        device, host = torch.tensor(samples, dtype=torch.float64).unbind(dim=1)
        quantiles = device.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
        return cls(*quantiles.tolist(), len(samples), float(host.quantile(0.5)))

    @property
    def fields(self) -> dict:
        """As a row says it."""
        return {
            "ms_median": self.median, "ms_p20": self.p20, "ms_p80": self.p80, "rounds": self.rounds,
            "host_ms": self.host,
        }  # fmt: skip


def warm_up(run: Run, device: torch.device) -> float:
    """Run until compiled and clocked up. Returns the time of the last run, milliseconds of wall clock."""
    for _ in range(WARMUPS):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        elapsed = (time.perf_counter() - start) * 1e3
        if elapsed > SLOW_MS:
            break
    return elapsed


def interleaved(runs: dict[str, Run], device: torch.device, repeats: int) -> dict[str, Times]:
    """Time all ``runs`` in turns, so that a drifting clock is everybody's.

    A round is queued without waiting, so host work overlaps the device's. Who starts moves on by one every round.
    """
    rounds = {name: _rounds(warm_up(run, device), repeats) for name, run in runs.items()}
    flush = torch.empty(FLUSH_MIB * 2**18, dtype=torch.int32, device=device) if device.type == "cuda" else None
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names = list(runs)
    for n in range(max(rounds.values())):
        first = n % len(names)
        active = [name for name in names[first:] + names[:first] if n < rounds[name]]
        for name, elapsed in _round({name: runs[name] for name in active}, device, flush).items():
            samples[name].append(elapsed)
    return {name: Times.of(values) for name, values in samples.items()}


def _rounds(estimate_ms: float, repeats: int) -> int:
    return min(repeats, max(LEAST_ROUNDS, int(BUDGET_MS / max(estimate_ms, 1e-3))))


def _round(runs: dict[str, Run], device: torch.device, flush: torch.Tensor | None) -> dict[str, tuple[float, float]]:
    """Milliseconds ``(device, host)`` of one run each."""
    host = {}
    if flush is None:
        for name, run in runs.items():
            host[name] = _queue(run)
        return {name: (elapsed, elapsed) for name, elapsed in host.items()}
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in runs}
    for name, run in runs.items():
        for _ in range(SPACERS):
            flush.zero_()
        events[name][0].record()
        host[name] = _queue(run)
        events[name][1].record()
    synchronise(device)
    return {name: (start.elapsed_time(stop), host[name]) for name, (start, stop) in events.items()}


def _queue(run: Run) -> float:
    """Milliseconds until a run returns, which on a GPU is before it ends."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def peak_memory_mib(run: Run, device: torch.device) -> float | None:
    """Memory one run takes beyond what is allocated before it, its output included; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = run()
    synchronise(device)
    del out
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def by_kernel(run: Run, device: torch.device, calls: int = 1) -> list[tuple[str, float, float]]:
    """``(name, microseconds, launches)`` of a run, the longest first; empty on a CPU."""
    if device.type != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    synchronise(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        synchronise(device)
    found = [(e.key, e.self_device_time_total / calls, e.count / calls) for e in profiler.key_averages()]
    return sorted((each for each in found if each[1] > 0), key=lambda each: -each[1])


def kernels(run: Run, device: torch.device) -> tuple[str | None, int | None]:
    """The kernel that takes longest, and the number of launches; None on a CPU."""
    if device.type != "cuda":
        return None, None
    found = by_kernel(run, device)
    return (found[0][0] if found else None), round(sum(launches for _, _, launches in found))
