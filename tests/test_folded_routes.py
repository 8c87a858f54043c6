"""When a call folds into the keys, and how it gets there."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from folding import DTYPES, GROUPED, MODULATIONS, a_call, both, run
from numerics import (
    Call,
    lay_out,
    skip_unless_runnable,
)  # fmt: skip
from watch import Watch

import fastrope as fr
from fastrope import ops
from fastrope.backends import folded

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _runnable():
    skip_unless_runnable("triton")


@pytest.fixture
def taken(monkeypatch):
    """Backend ``sdpa`` folds wherever it can, as on a GPU. What :func:`folded.run` gave, in order."""
    outs, run = [], folded.run
    monkeypatch.setattr(folded, "takes", lambda q, lowered: folded.folds(lowered) and q.dtype in DTYPES)
    monkeypatch.setattr(folded, "run", lambda *call: outs.append(run(*call)) or outs[-1])
    return outs


def test_it_stands_in_for_sdpa(taken):
    call = a_call(torch.float16, modulations=both)
    out = call.run("sdpa", return_lse=False)
    assert len(taken) == 1
    assert torch.equal(out, taken[0])
    assert out.is_contiguous()


@pytest.mark.parametrize("change", ["lse", "gain", "float64", "grad", "tangent"])
def test_what_it_does_not_do_stays_with_sdpa(change, taken):
    call = a_call(modulations=both)
    if change == "gain":
        call = replace(call, modulations=[*call.modulations, fr.LogitGain(torch.linspace(0.5, 1.5, 37))])
    if change == "float64":
        call = call.to(torch.float64)
    if change == "grad":
        leaf = call.k.clone().requires_grad_()
        (found,) = torch.autograd.grad(replace(call, k=leaf).run("sdpa", False).square().sum(), leaf)
        (expected,) = torch.autograd.grad(replace(call, k=leaf).run("eager", False).square().sum(), leaf)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    elif change == "tangent":
        with contextlib.suppress(NotImplementedError):  # of torch's kernel on a CPU
            torch.func.jvp(lambda q: replace(call, q=q).run("sdpa", False), (call.q,), (call.q,))
    else:
        call.run("sdpa", return_lse=change == "lse")
    assert not taken


def test_explain_says_so(taken):
    call = a_call(torch.float16, modulations=both)

    def lines(call, **changes):
        found = fr.explain(call.q, call.k, call.v, **call.tokens(), backend="sdpa", **changes)
        return [line for line in str(found).splitlines() if line.startswith(("backend", "prologue", "passes"))]

    assert lines(call) == ["backend: sdpa (asked for)", "prologue: kernels over q, k"]
    assert lines(call, return_lse=True) == ["backend: sdpa (asked for)"]
    scattered = a_call(modulations=MODULATIONS["scattered"])
    assert lines(scattered)[1:] == ["prologue: kernels over q, k, v"]
    applied = replace(call, rope=call.rope.as_applied())
    assert lines(applied)[1:] == ["prologue: kernels over k"]
    assert lines(replace(applied, modulations=())) == ["backend: sdpa (asked for)"]
    spread = replace(applied, modulations=(), v=lay_out(call.v, "transposed"))
    assert lines(spread)[1:] == ["prologue: kernels over v"]
    masked = replace(applied, modulations=(), key_mask=torch.arange(37)[None] < 30)
    assert lines(masked)[1:] == ["prologue: kernels over k, v"]
    assert not taken


def arguments(call: Call) -> tuple:
    plan = call.planned()
    return call.q, call.k, call.v, list(plan.tensors), plan.spec, 0.25, False, "sdpa"


@pytest.mark.parametrize("case", GROUPED)
def test_the_op_keeps_its_contract(case, taken):
    call = a_call(tokens=37, modulations=MODULATIONS[case], heads=1, batch=1 if case != "together" else 2)
    torch.library.opcheck(ops.planned_attention, arguments(call), test_utils=("test_schema", "test_faketensor"))
    assert taken


def test_its_gradient_is_that_of_sdpa(taken):
    call = a_call(modulations=both)
    leaf = call.k.clone().requires_grad_()
    out, _ = ops.planned_attention(*arguments(replace(call, k=leaf)))
    (found,) = torch.autograd.grad(out.sum(), leaf)
    (expected,) = torch.autograd.grad(replace(call, k=leaf, scale=0.25).run("eager", False).sum(), leaf)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_it_compiles_into_one_graph(taken):
    call = a_call(modulations=both)
    plan = call.planned()
    compiled = torch.compile(lambda q: fr.attention(q * 2, call.k, call.v, plan=plan, backend="sdpa") + 1,
                             fullgraph=True, backend="aot_eager")  # fmt: skip
    out = compiled(call.q)
    assert len(taken) == 1
    assert torch.equal(out, fr.attention(call.q * 2, call.k, call.v, plan=plan, backend="sdpa") + 1)


@pytest.mark.parametrize("case", GROUPED)
def test_a_planned_call_reads_nothing_on_the_host(case):
    call = a_call(torch.float16, modulations=MODULATIONS[case])
    plan = call.planned()
    with Watch() as watch:
        run(call, plan)
    assert watch.read == []
