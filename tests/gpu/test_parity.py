"""The fused kernels on a device, at real shapes, against the reference."""

from __future__ import annotations

import pytest
import torch
from gpu.device_calls import (
    DTYPES,
    HALF,
    KINDS,
    a_biased_call,
    a_call,
    attend_checked,
    kontext,
)
from numerics import (
    DEVICE,
    LAYOUTS,
    Call,
    check,
    compare,
)

from fastrope.backends import fused
from fastrope.bench.cases import chosen
from fastrope.bench.workloads import WORKLOADS
from fastrope.planning import polynomial

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("applied", [False, True], ids=["raw", "applied"])  # varies fastest: the problem is remembered
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case.name for case in chosen(WORKLOADS["kontext"], None)])
def test_flux_kontext(applied, case, dtype):
    """1 x 8704 x 24 x 128; the reference computes a sample of the queries."""
    problem = kontext(case, dtype)
    problem = problem.applied if applied else problem
    attend_checked(problem, f"{case} {dtype}", "triton")


@pytest.mark.parametrize("mask", [None, "random"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 96, 128])
def test_head_dims_of_a_polynomial(dim, dtype, mask, monkeypatch):
    monkeypatch.setattr(polynomial, "LEAST_FILLED", 0.0)
    call = a_call("distinct", dtype, dim, mask=mask)
    assert fused.Launch.of(call.q, call.k, call.v, call.planned().lowered).polynomial
    check(call, "triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_dims(dim, dtype, kind):
    check(a_call(kind, dtype, dim), "triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, "random"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_biases_and_values(dim, dtype, mask, kind):
    call = a_biased_call(kind=kind, dtype=dtype, dim=dim, mask=mask)
    check(call, "triton")
    check(call, "auto")


@pytest.mark.parametrize("tokens", [1, 17, 113, 239, 1023])
def test_lengths(tokens):
    check(a_call(tokens=tokens), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("applied", [False, True], ids=["raw", "applied"])
def test_strides_with_nan_between_and_behind(applied, layout, dtype):
    call = a_call(dtype=dtype, layout=layout, mask=None)
    positions = call.rope
    check(Call(call.q, call.k, call.v, positions.as_applied(applied), None, call.modulations), "triton")
    check(Call(call.q, call.k, call.v, positions.as_applied(applied)), "triton")


@pytest.mark.parametrize("kind", KINDS)
def test_masked_keys_may_hold_nan(kind):
    call = a_call(kind, mask="row")
    k, v = (torch.where(call.key_mask[:, :, None, None], x, torch.nan) for x in (call.k, call.v))
    out, lse = Call(call.q, k, v, call.rope, None, call.modulations, call.key_mask).run("triton")
    compare(call, out, lse)


@pytest.mark.parametrize("stride", [2**20, 2**26], ids=["between tiles", "within a tile"])
def test_offsets_beyond_int32(stride):
    """Rows of one head that lie more than 2**31 elements apart."""
    tokens = 2**32 // stride
    if torch.cuda.mem_get_info()[0] < 3 * 2**33:
        pytest.skip("needs 24 GiB of device memory")
    small = a_call(tokens=tokens, batch=1, mask=None)
    heads, dim = small.q.shape[2:]
    buffer = torch.empty(tokens * stride, dtype=torch.bfloat16, device=DEVICE)

    def spread(x: torch.Tensor, offset: int) -> torch.Tensor:
        shape = (1, tokens, x.shape[2], dim)
        view = buffer.as_strided(shape, (tokens * stride, stride, dim, 1), offset * heads * dim)
        return view.copy_(x)

    q, k, v = (spread(x, n) for n, x in enumerate((small.q, small.k, small.v)))
    for rope, modulations in ((small.rope, small.modulations), (small.rope.as_applied(), ())):
        compact = Call(small.q, small.k, small.v, rope, None, modulations)
        compare(compact, *Call(q, k, v, rope, None, modulations).run("triton"), name="spread")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(kind):
    call = a_call(kind)
    first, second = call.run("triton", return_lse=False), call.run("triton", return_lse=False)
    assert torch.equal(first, second)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_current_device_may_be_another():
    call = a_call()
    with torch.cuda.device(1):
        check(call, "triton")
        assert torch.cuda.current_device() == 1
