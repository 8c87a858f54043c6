"""The routes that ``auto`` chooses from, timed in turns on a card, and the rules that follow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastrope import rules
from fastrope.dispatch import by_route, execute

from . import timing
from .cases import CASES
from .problem import Problem
from .workloads import WORKLOADS

ROUNDS, PROFILED = 10, 5
KERNELS_TOLD = 8
LEAST_GAIN = 0.02  # of the time: with less, a shipped rule stays


@dataclass(frozen=True)
class Call:
    """What stands for a family of calls."""

    name: str
    workload: str
    case: str
    applied: bool = False


def calls(device: str) -> list[Call]:
    """At least one of every family that has routes to choose from in 16 bits; on a CPU two, for a dry run."""
    if device == "cpu":
        return [Call(case, "tiny", case) for case in ("plain", "all")]
    found = [Call(case, "kontext", case) for case in CASES if CASES[case].suits(WORKLOADS["kontext"])]
    return [*found, Call("plain, rotated before", "kontext", "plain", applied=True),
            *(Call(f"{case}, masked", "qwen-edit", case) for case in ("plain", "grag"))]  # fmt: skip


def measure(call: Call, device: torch.device) -> list[dict]:
    """A row for every route of the call's family."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    problem = Problem.make(WORKLOADS[call.workload], CASES[call.case], device, dtype)
    problem = problem.applied if call.applied else problem
    lowered, inputs = problem.plan.lowered, problem.inputs()
    family = rules.family_of(lowered, dtype)

    def run(route: str):
        decision = by_route(route, lowered, *inputs)
        return lambda: execute(decision, lowered, *inputs, problem.scale)

    runs = {route: run(route) for route in family.routes}
    times = timing.interleaved(runs, device, ROUNDS if device.type == "cuda" else 1)
    taken = rules.rule_for(lowered, dtype, False, device).route
    return [
        {"case": call.name, "family": family.name, "route": route, "auto": route == taken, "ms": found.median,
         "host_ms": found.host, "kernels": timing.by_kernel(runs[route], device, PROFILED)[:KERNELS_TOLD]}
        for route, found in times.items()
    ]  # fmt: skip


def fastest(rows: Iterable[dict]) -> list[rules.Rule]:
    """The rule of every family that was measured: its shipped route, or one that is faster over all its calls."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if "error" not in row:
            found.setdefault(row["family"], {}).setdefault(row["route"], []).append(row["ms"])
    made = []
    for shipped in rules.RULES:
        times = {
            route: math.exp(sum(map(math.log, ms)) / len(ms)) for route, ms in found.get(shipped.family, {}).items()
        }
        if len(times) < 2:
            continue
        best = min(times, key=lambda route: times[route] * (1 if route == shipped.route else 1 + LEAST_GAIN))
        said = ", ".join(f"{route} {ms:.3g} ms" for route, ms in sorted(times.items(), key=lambda each: each[1]))
        made.append(rules.Rule(shipped.family, best, f"the fastest of {said}", "slower here", rules.HERE))
    return made
