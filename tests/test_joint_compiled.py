"""Joint attention in compiled code, and its op."""

from __future__ import annotations

import pytest
import torch
from joining import DIM, IMAGE, TEXT, a_plan, group, streams
from numerics import (
    DEVICE,
    skip_unless_runnable,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastrope as fr
from fastrope import joint


def arguments(parts, plan: fr.Plan, backend: str) -> tuple:
    norms = [s.norm_q for s in parts] + [s.norm_k for s in parts]
    lists = [[getattr(s, name) for s in parts] for name in ("q", "k", "v")]
    weights, eps = zip(*norms, strict=True)
    return *lists, list(weights), list(eps), list(plan.tensors), plan.spec, 0.25, backend


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_opcheck(backend):
    skip_unless_runnable(backend)
    given = arguments(
        streams(lengths=(3, 4), weights=(None, torch.float32)), a_plan(7, modulations=group(length=7)), backend
    )
    torch.library.opcheck(joint.streamed_attention, given, test_utils=("test_schema", "test_faketensor"))


def test_streams_compile_into_one_graph():
    """One opaque op, also where the kernels run; norms, weights and a plan's numbers are inputs of the graph."""
    skip_unless_runnable("triton")

    def attend(q, k, v, weight, plan, backend):
        first = fr.Stream(q[:, :TEXT], k[:, :TEXT], v[:, :TEXT], fr.Norm(weight, 1e-6), fr.Norm(None, 1e-6))
        last = fr.Stream(q[:, TEXT:], k[:, TEXT:], v[:, TEXT:], fr.Norm(weight + 1, 1e-6), fr.Norm(weight, 1e-5))
        return fr.joint_attention([first, last], plan=plan, backend=backend) * 2

    q, k, v = (torch.cat(x, dim=1) for x in list(zip(*streams(), strict=True))[:3])
    weight = torch.linspace(0.5, 1.5, DIM, device=DEVICE)
    plan, other = (a_plan(modulations=group(delta)) for delta in (0.8, 0.9))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for n, (held, backend) in enumerate(((plan, "auto"), (other, "auto"), (plan, "triton"))):
        given = q, k, v, weight, held, backend
        torch.testing.assert_close(compiled(*given), attend(*given))
        assert counter.frame_count == (1, 1, 2)[n]
    leaf = k.clone().requires_grad_()
    grads = [torch.autograd.grad(f(q, leaf, v, weight, plan, "auto").sum(), leaf)[0] for f in (compiled, attend)]
    torch.testing.assert_close(*grads)
    with pytest.raises(Exception, match="eager"):
        compiled(q, k, v, weight, plan, "eager")


@pytest.mark.parametrize("attend", [fr.joint_attention, joint.fused_joint_attention])
def test_fake_tensors_pass_through(attend):
    skip_unless_runnable("triton")
    plan = a_plan()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        parts = [s._replace(q=mode.from_tensor(s.q), k=mode.from_tensor(s.k), v=mode.from_tensor(s.v))
                 for s in streams(layouts=("contiguous",) * 2)]  # fmt: skip
        out = attend(parts, plan=plan, backend="triton")
    assert type(out).__name__ == "FakeTensor"
    assert out.shape == (2, TEXT + IMAGE, 2, DIM)


@pytest.mark.parametrize("empty", [0, 1])
def test_a_host_may_hand_over_a_stream_without_tokens(empty):
    skip_unless_runnable("triton")
    parts = streams(lengths=(TEXT, 0) if empty else (0, TEXT))
    plan = a_plan(TEXT)
    out = joint.fused_joint_attention(parts, plan=plan, backend="triton")
    assert torch.equal(out, fr.joint_attention(parts, plan=plan, backend="triton"))


def test_transforms_pass_through_where_no_kernel_runs():
    """``vmap`` and ``make_fx`` see what ``sdpa`` is made of; the op has rules for neither."""
    parts, plan = streams(), a_plan(modulations=group())

    def attend(q):
        return fr.joint_attention([parts[0]._replace(q=q), parts[1]], plan=plan, backend="sdpa")

    expected = attend(parts[0].q)
    torch.testing.assert_close(torch.vmap(attend)(parts[0].q[None])[0], expected)
    graph = make_fx(attend)(parts[0].q)
    assert not any("fastrope" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(parts[0].q), expected)
