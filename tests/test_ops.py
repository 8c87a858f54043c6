"""The torch.library ops: contracts, gradients, compilation, and what a planned call may not do on its way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from numerics import (
    Call,
    assert_close,
    axial,
    compare,
    draw,
    generator,
    grid,
    skip_unless_runnable,
    tensors,
)
from op_calls import SCALE, a_call, leaves

import fastrope as fr
from fastrope import ops


def arguments(call: Call, return_lse: bool) -> tuple:
    plan = call.planned()
    return call.q, call.k, call.v, list(plan.tensors), plan.spec, SCALE, return_lse, "sdpa"


# ---- contracts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["levels", "distinct"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(kind, return_lse):
    call = a_call(kind=kind)
    grads = replace(call, q=call.q.requires_grad_(), k=call.k.requires_grad_(), v=call.v.requires_grad_())
    for each in (a_call(kind=kind, dtype=torch.float16), grads):
        torch.library.opcheck(ops.planned_attention, arguments(each, return_lse))


def test_opcheck_of_plain_attention():
    q, k, v = tensors(generator(1), queries=5, keys=9, heads=2, dim=16)
    for call in (Call(q, k, v), Call(q, k, v, axial(grid(5), 16), axial(grid(9, frame=1), 16, applied=True))):
        torch.library.opcheck(ops.planned_attention, arguments(call, False))


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fake_outputs_look_like_real_ones(dtype, return_lse):
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = a_call(dtype)
    call = replace(call, q=call.q.transpose(1, 2).contiguous().transpose(1, 2))
    real = ops.planned_attention(*arguments(call, return_lse))
    mode = FakeTensorMode()

    def fake(x):
        return mode.from_tensor(x) if isinstance(x, torch.Tensor) else [fake(y) for y in x] if type(x) is list else x

    real_arguments = arguments(call, return_lse)
    with mode:
        pretended = ops.planned_attention(*(fake(x) for x in real_arguments))
    for a, b in zip(real, pretended, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    assert real[1].numel() == (call.q[..., 0].numel() if return_lse else 0)


@pytest.mark.parametrize("kind", ["levels", "distinct"])
def test_the_op_gives_what_attention_gives(kind):
    call = a_call(kind=kind)
    compare(call, *ops.planned_attention(*arguments(call, True)), name="op")


def test_what_looks_at_a_call_sees_one_op():
    """Fake tensors, and a trace of real ones; elsewhere kernels are launched without an op in between."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    skip_unless_runnable("triton")
    q, k, v = tensors(generator(2), queries=5, heads=1, dim=16)
    call = Call(q, k, v, axial(grid(5), 16))
    plan = call.planned()

    def attend(q):
        return fr.attention(q, call.k, call.v, plan=plan, backend="triton")

    graph = make_fx(attend)(call.q)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("planned_attention" in name for name in names) == 1
    assert torch.equal(graph(call.q), attend(call.q))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = mode.from_tensor(call.q)
        assert fr.attention(fake, call.k, call.v, plan=plan, backend="triton").shape == call.q.shape
    assert not ops.observed(call.q, torch.nn.Parameter(call.k))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_jit_trace_holds_the_op():
    """A tracer sees no launch: without an op the trace would be of buffers that nobody fills."""
    skip_unless_runnable("triton")
    q, k, v = tensors(generator(2), queries=5, heads=1, dim=16)
    plan = fr.plan(rope=axial(grid(5), 16))

    def attend(q):
        return fr.attention(q, k, v, plan=plan, backend="triton")

    traced = torch.jit.trace(attend, (q,), check_trace=False)
    assert "fastrope::planned_attention" in str(traced.graph)
    other = q.flip(1).contiguous()
    assert torch.equal(traced(other), attend(other))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "random", "row"])
@pytest.mark.parametrize("kind", ["levels", "distinct", "biases"])
def test_gradcheck_of_sdpa(kind, mask):
    call = a_call(torch.float64, kind, mask, tokens=5)

    def function(q, k, v):
        out, lse = replace(call, q=q, k=k, v=v).run("sdpa")
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(function, leaves(call), fast_mode=True)


def test_gradcheck_of_the_op():
    call = a_call(torch.float64, tokens=5)
    rest = arguments(call, True)[3:]
    assert torch.autograd.gradcheck(lambda *x: ops.planned_attention(*x, *rest), leaves(call), fast_mode=True)


@pytest.mark.parametrize("kind", ["levels", "distinct", "biases"])
def test_gradients_of_sdpa_are_those_of_the_reference(kind):
    call = a_call(torch.float64, kind, tokens=20)
    weight = draw(generator(3), *call.q.shape, dtype=torch.float64)
    found = []
    for backend in ("eager", "sdpa"):
        inputs = leaves(call)
        out = replace(call, **dict(zip("qkv", inputs, strict=True))).run(backend, return_lse=False)
        found.append(torch.autograd.grad((out * weight).sum(), inputs))
    for expected, gradient in zip(*found, strict=True):
        assert_close(gradient, expected, expected)


def test_one_input_may_require_a_gradient():
    call = a_call()
    v = call.v.clone().requires_grad_()
    replace(call, v=v).run("auto", return_lse=False).sum().backward()
    assert v.grad.shape == v.shape
