"""The checks of ``fastrope doctor --gpu``, at a small shape on the CPU: each takes what is right and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastrope as fr
from fastrope.bench import first_checks, match
from fastrope.bench.cases import CASES, CHECKED
from fastrope.bench.first_checks import Call, Job, check
from fastrope.bench.problem import Problem
from fastrope.bench.workloads import WORKLOADS

CPU = torch.device("cpu")
TINY = replace(WORKLOADS["tiny"], tokens=fr.TokenLayout(8, (5, 5), references=[(5, 5)]))
OTHERS = [
    Job("joint", first_checks.joins(TINY, "grag")),
    Job("graph", first_checks.replays(TINY, "grag")),
    Job("match", first_checks.matches(match.WORKLOADS["smoke"])),
]
JOBS = {job.name: job for job in [*first_checks.kinds(TINY, torch.float32), *OTHERS]}


class Cuda:
    """What decides which jobs there are."""

    type = "cuda"


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(match, "captured", lambda run: run)


def spoil(monkeypatch, change) -> None:
    """Every call of the library returns something else."""

    def changed(name, of):
        call = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *args, **options: change(call(*args, **options)))

    changed("attention", fr)
    changed("joint_attention", fr)
    matchers = match.matchers

    def matching(case, device):
        runs = matchers(case, device)
        return {"eager": runs["eager"], "triton": lambda: change(runs["triton"]())}

    monkeypatch.setattr(match, "matchers", matching)


@pytest.mark.parametrize("name", JOBS)
def test_a_right_call_passes(name):
    with torch.no_grad():
        passed, said = check(JOBS[name], CPU)
    assert passed, said


@pytest.mark.parametrize("name", ["values triton", "passes lse", "bias auto", "joint", "graph", "match"])
def test_a_wrong_call_fails(name, monkeypatch):
    spoil(monkeypatch, wrong)
    with torch.no_grad():
        passed, _ = check(JOBS[name], CPU)
    assert not passed


def wrong(result):
    """The last of its tensors; of a match, the tokens."""
    if isinstance(result, torch.Tensor):
        return result * 1.05
    if hasattr(result, "tokens"):
        return result._replace(tokens=result.tokens + 1)
    out, lse = result
    return out, lse + 0.1


def test_a_graph_that_gives_other_bits_than_the_call_fails(monkeypatch):
    """However small the difference."""

    def captured(run):
        return lambda: run().nextafter(torch.tensor(torch.inf, dtype=torch.bfloat16))

    monkeypatch.setattr(match, "captured", captured)
    with torch.no_grad():
        passed, said = check(JOBS["graph"], CPU)
    assert not passed
    assert said.endswith("NOT WHAT THE CALL ITSELF GIVES")


def test_a_call_that_gives_two_results_fails():
    results = iter(range(2))
    job = Job("a", lambda device: Call(lambda: (torch.ones(1), torch.tensor(next(results))), lambda *_: (True, "fine")))
    assert check(job, CPU) == (False, "fine; NOT THE SAME TWICE")


@pytest.mark.parametrize("case", CHECKED)
def test_cases_differ_from_one_another_and_from_plain(case):
    """None is a modulation that comes to nothing."""
    others = [CASES["plain"], *(other for name, other in CHECKED.items() if name != case)]
    mine, *found = (
        fr.attention(*problem.inputs(), plan=problem.plan, backend="sdpa")
        for problem in (Problem.make(TINY, each, CPU, torch.float32) for each in (CHECKED[case], *others))
    )
    assert all((mine - other).abs().max() > 0.01 for other in found)


def test_cases_of_several_passes_take_them():
    plans = {case: Problem.make(TINY, CHECKED[case], CPU, torch.float32).plan for case in CHECKED}
    taken = {case: len(plan.lowered.passes) > 1 for case, plan in plans.items()}
    assert taken == {case: case.startswith("passes") for case in CHECKED}


def test_a_card_is_asked_for_every_kind(monkeypatch):
    monkeypatch.setattr(first_checks.devices, "architecture", lambda device: "sm_90")
    names = [job.name for job in first_checks.jobs(Cuda())]
    assert len(set(names)) == len(names)
    assert {*CASES, *CHECKED} - {"shared"} <= {name.removesuffix(" triton") for name in names}
    assert {"match llamagen", "all-per-query graph", "passes lse", "all grouped", "all joint"} <= set(names)
    assert all(job.switches == {} or "=0" in job.name for job in first_checks.jobs(Cuda()))
