"""Calls for torch's attention on a device: folded into the keys, or split by queries that nothing sets apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu.device_calls import (
    DTYPES,
    HALF,
    a_folding_call,
    a_splitting_call,
    attend_checked,
    kontext,
)
from numerics import (
    DEVICE,
    LAYOUTS,
    Call,
    assert_close,
    axial,
    generator,
    grid,
    tensors,
)

import fastrope as fr
from fastrope.backends import folded, fused
from fastrope.dispatch import decide

pytestmark = pytest.mark.gpu


def check_folded(call: Call) -> None:
    assert decide(call.planned().lowered, call.q, call.k, call.v, "sdpa").folded
    out = call.run("sdpa", return_lse=False)
    assert out.is_contiguous()
    assert_close(out, call.exact()[0], call.low()[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "grag", "bands"])
def test_flux_kontext_folded(case, dtype):
    problem = kontext(case, dtype)
    assert decide(problem.plan.lowered, problem.q, problem.k, problem.v, "auto").folded
    attend_checked(problem, f"{case} {dtype}", "auto")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ["loose-levels", "crop-gain", "loose-per-query", "all", "all-per-query"])
def test_flux_kontext_split(case, dtype):
    """Queries outside of the crop through torch's attention."""
    problem = kontext(case, dtype)
    assert decide(problem.plan.lowered, problem.q, problem.k, problem.v, "auto").split
    attend_checked(problem, f"{case} {dtype}", "auto")


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [20, 64, 80, 96, 128, 256])
def test_head_dims_folded(dim, dtype, modulated):
    check_folded(a_folding_call(modulated, dtype=dtype, dim=dim))


@pytest.mark.parametrize("tokens", [1, 17, 113, 239, 1023])
def test_lengths_folded(tokens):
    check_folded(a_folding_call(tokens=tokens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("modulated", [False, True])
def test_strides_folded(modulated, layout, dtype):
    call = a_folding_call(modulated, dtype=dtype, layout=layout)
    check_folded(call)
    check_folded(Call(call.q, call.k, call.v, call.rope.as_applied(), None, call.modulations))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_folded_output_is_not_copied(dtype):
    """torch's kernels lay it out as the queries, which are packed for that."""
    q, k, v = tensors(generator(0), queries=300, heads=4, dim=128, dtype=dtype)
    plan = fr.plan(rope=axial(grid(300), 128))
    assert folded.run(q, k, v, plan.lowered, 0.1, folded.prepares(q, k, v, plan.lowered)).is_contiguous()


def test_streams_fold_into_the_keys():
    call = a_folding_call(dtype=torch.float16)
    norm = fr.Norm(torch.linspace(0.5, 1.5, 64, device=DEVICE), 1e-6)
    plan, parts = call.planned(), (slice(0, 40), slice(40, None))
    streams = [fr.Stream(call.q[:, s], call.k[:, s], call.v[:, s], norm, norm) for s in parts]
    wide = [fr.Stream(*(x.double() for x in s[:3]), norm, norm) for s in streams]
    exact = fr.joint_attention(wide, plan=plan, backend="eager")
    assert_close(fr.joint_attention(streams, plan=plan), exact, fr.joint_attention(streams, plan=plan, backend="eager"))


def check_split(call: Call, kind: str) -> None:
    plan = call.planned()
    assert decide(plan.lowered, call.q, call.k, call.v, "auto").split
    assert fused.Launch.of(call.q, call.k, call.v, plan.lowered).polynomial == (kind == "polynomial")
    out = call.run("auto", return_lse=False)
    assert out.is_contiguous()
    assert_close(out, call.exact()[0], call.low()[0])


@pytest.mark.parametrize("kind", ["levels", "polynomial"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [20, 64, 80, 96, 128])
def test_head_dims_split(dim, dtype, kind):
    check_split(a_splitting_call(kind, dtype=dtype, dim=dim), kind)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["levels", "polynomial"])
def test_strides_split(kind, layout):
    call = a_splitting_call(kind, layout=layout)
    check_split(call, kind)
    check_split(replace(call, rope=call.rope.as_applied()), kind)
