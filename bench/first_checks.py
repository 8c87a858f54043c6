"""The checks of ``fastrope doctor --gpu``: calls of every kind, each held to the reference over poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastrope as fr
from fastrope import device as devices
from fastrope.kernels.config import unsupported
from fastrope.tolerance import Errors

from . import match
from .block import BlockProblem
from .cases import CASES, CHECKED
from .problem import Problem
from .workloads import WORKLOADS, Workload

SWITCHES = ("FASTROPE_TMA", "FASTROPE_POLYNOMIAL")  # tried one after the other where a check fails
POISON = {"cuda": 2**26, "cpu": 2**10}  # floats of NaN in the memory that outputs are taken from
EDGES = ("all", "all-per-query")
BACKENDS = ("triton", "auto")
FORMS = ("grouped", "strided", "padded")  # of a problem


class Call(NamedTuple):
    """What ``run`` returns, ``judge`` takes: whether it is right, and by how much."""

    run: Callable[[], tuple[Tensor, ...]]
    judge: Callable[..., tuple[bool, str]]


Make = Callable[[torch.device], Call]


@dataclass(frozen=True)
class Job:
    """A call to check, made when its turn comes, under switches of the environment."""

    name: str
    make: Make
    switches: Mapping[str, str] = field(default_factory=dict)


def check(job: Job, device: torch.device) -> tuple[bool, str]:
    """Whether what a job returns is right and the same twice, over poisoned memory; and by how much."""
    run, judge = job.make(device)

    def over_poison() -> tuple[Tensor, ...]:
        if device.type == "cuda":  # so that outputs come from what is poisoned, not from results of before
            torch.cuda.empty_cache()
        held = [torch.full((size,), torch.nan, device=device) for size in (POISON[device.type], *[2**15] * 64)]
        del held
        return run()

    first, second = over_poison(), over_poison()
    right, said = judge(*first)
    same = all(map(torch.equal, first, second))
    return right and same, said if same else f"{said}; NOT THE SAME TWICE"


# ---- which calls -----------------------------------------------------------------------------------------------------


def jobs(device: torch.device) -> list[Job]:
    """The cases of the benchmark at the shapes and dtypes they are for, then what it does not time at a small one; on a
    CPU a few, interpreted, for a dry run."""
    if device.type == "cpu":
        tiny = WORKLOADS["tiny"]
        return [Job(f"{case} {backend}", attends(tiny, case, backend, torch.float32))
                for case in ("plain", *EDGES) for backend in BACKENDS]  # fmt: skip
    big, masked = WORKLOADS["kontext"], WORKLOADS["qwen-edit"]
    small = replace(big, tokens=fr.TokenLayout(77, (24, 24), references=[(24, 24)]))
    found = [Job(f"{case} {backend}", attends(big, case, backend)) for case in CASES if CASES[case].suits(big)
             for backend in BACKENDS]  # fmt: skip
    found += [Job(f"{case} applied", attends(big, case, form="applied")) for case in ("plain", *EDGES)]
    found += [Job(f"{case} masked {backend}", attends(masked, case, backend)) for case in ("plain", "all")
              for backend in BACKENDS]  # fmt: skip
    found += [Job(f"{case} joint", joins(big, case)) for case in ("plain", "all")]
    for switch in SWITCHES:
        found += [Job(f"{case} {switch}=0", attends(small, case), {switch: "0"}) for case in EDGES]
    for dim, axes in ((64, (8, 28, 28)), (96, (16, 40, 40)), (256, (64, 96, 96))):
        if unsupported(devices.architecture(device), dim) is None:
            shape = replace(small, dim=dim, axes_dim=axes, heads=8)
            found += [Job(f"{case} head dim {dim}", attends(shape, case)) for case in EDGES]
    for dtype in (torch.float16, torch.float32):
        found += [Job(f"{case} {str(dtype)[6:]}", attends(small, case, dtype=dtype)) for case in EDGES]
    found += kinds(small)
    found += [Job(f"match {name}", matches(match.WORKLOADS[name])) for name in ("llamagen", "lumina-mgpt")]
    return found + [Job(f"{case} graph", replays(small, case)) for case in ("grag", "all-per-query")]


def kinds(workload: Workload, dtype: torch.dtype = torch.bfloat16) -> list[Job]:
    """Kinds of calls that no suite times: other modulations, several passes over the keys, log-sum-exps, other forms of
    q, k, v."""
    made = partial(attends, workload, dtype=dtype)
    found = [Job(f"{case} {backend}", made(case, backend)) for case in CHECKED for backend in BACKENDS]
    found += [Job(f"{case} lse", made(case, lse=True)) for case in ("plain", "passes", "passes-per-query")]
    return found + [Job(f"{case} {form}", made(case, form=form)) for form in FORMS for case in EDGES]


# ---- how they are made -----------------------------------------------------------------------------------------------


def attends(
    workload: Workload, case: str, backend: str = "triton", dtype: torch.dtype = torch.bfloat16,
    form: str | None = None, lse: bool = False,
) -> Make:  # fmt: skip
    """``fr.attention``.

    Args:
        form: another form of the problem, a property of :class:`fastrope.bench.problem.Problem`.
        lse: with its log-sum-exps.
    """

    def make(device: torch.device) -> Call:
        drawn = _problem(workload, case, device, dtype)
        problem = drawn if form is None else getattr(drawn, form)
        attend = partial(fr.attention, *problem.inputs(), plan=problem.plan, backend=backend, debug=False)

        def run() -> tuple[Tensor, ...]:
            return attend(return_lse=True) if lse else (attend(),)

        return Call(run, _within(problem))

    return make


def joins(workload: Workload, case: str) -> Make:
    """``fr.joint_attention``."""

    def make(device: torch.device) -> Call:
        problem = BlockProblem.of(workload, CASES[case], device, torch.bfloat16)
        return Call(lambda: (fr.joint_attention(problem.streams, plan=problem.plan),), _within(problem))

    return make


def replays(workload: Workload, case: str, dtype: torch.dtype = torch.bfloat16) -> Make:
    """A CUDA graph of ``fr.attention``, captured on other values. It must also give the bits of the call itself."""

    def make(device: torch.device) -> Call:
        problem = _problem(workload, case, device, dtype)
        inputs, within = workload.tensors(device, dtype, seed=1), _within(problem)
        attend = partial(fr.attention, *inputs, plan=problem.plan, debug=False)
        replay = match.captured(attend)
        for x, new in zip(inputs, problem.inputs(), strict=True):
            x.copy_(new)
        expected = attend()

        def judge(out: Tensor) -> tuple[bool, str]:
            right, said = within(out)
            equal = torch.equal(out, expected)
            return right and equal, said if equal else f"{said}; NOT WHAT THE CALL ITSELF GIVES"

        return Call(lambda: (replay().clone(),), judge)  # every replay writes the same memory

    return make


def matches(case: match.MatchCase) -> Make:
    """Anchor token matching, which must choose the tokens of the reference."""

    def make(device: torch.device) -> Call:
        runs = match.matchers(case, device)
        expected = runs["eager"]()

        def judge(*found: Tensor) -> tuple[bool, str]:
            wrong = [name for name, x, y in zip(expected._fields, found, expected, strict=True)
                     if name in ("tokens", "window", "accepted") and not torch.equal(x, y)]  # fmt: skip
            return not wrong, f"other {' and '.join(wrong)} than the reference's" if wrong else "the reference's tokens"

        return Call(runs["triton"], judge)

    return make


@lru_cache(maxsize=1)  # the next call is often another backend's on the same
def _problem(workload: Workload, case: str, device: torch.device, dtype: torch.dtype) -> Problem:
    return Problem.make(workload, (CASES | CHECKED)[case], device, dtype)


def _within(problem: Problem) -> Callable[..., tuple[bool, str]]:
    """Judges an output, and log-sum-exps if there are any, by the tolerance rule."""

    def judge(out: Tensor, lse: Tensor | None = None) -> tuple[bool, str]:
        found = {"": problem.check(out)} | ({} if lse is None else {"log-sum-exp: ": problem.check_lse(lse)})
        said = "; ".join(f"{what}{_share(errors)}" for what, errors in found.items())
        return all(errors.passed for errors in found.values()), said

    return judge


def _share(errors: Errors) -> str:
    largest, mean = errors.max_out / errors.max_allowed, errors.mean_out / errors.mean_allowed
    return f"{largest:.2f} of the largest error allowed, {mean:.2f} of the mean"
