"""Calls in compiled code: one graph, no recompilation for new values, errors in our words."""

from __future__ import annotations

import pytest
import torch
from numerics import (
    DEVICE,
    axial,
    compare,
    draw,
    generator,
    grid,
    tensors,
)
from op_calls import SCALE, a_call, leaves
from torch._dynamo.testing import CompileCounterWithBackend

import fastrope as fr


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Planned(torch.nn.Module):
    """Attention with a plan that was built outside."""

    def __init__(self, plan: fr.Plan, backend: str = "auto", return_lse: bool = True):
        super().__init__()
        self.plan, self.backend, self.return_lse = plan, backend, return_lse

    def forward(self, q, k, v):
        return fr.attention(q, k, v, plan=self.plan, scale=SCALE, backend=self.backend, return_lse=self.return_lse)


def agree(found: tuple, expected: tuple) -> None:
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y, rtol=0, atol=8 * torch.finfo(torch.float32).eps)


def test_a_plan_compiles_into_one_graph():
    call = a_call()
    module = Planned(call.planned())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out, lse = compiled(call.q, call.k, call.v)
    compare(call, out, lse, "compiled")
    agree((out, lse), module(call.q, call.k, call.v))


def test_a_plan_compiles_with_inductor():
    call = a_call(kind="few")

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Planned(call.planned(), return_lse=False)

        def forward(self, q, k, v):  # pointwise work on both sides, so that strides meet generated code
            return self.inner(q * 1.5, k + 0.25, v).relu()

    block = Block()
    found = torch.compile(block, fullgraph=True)(call.q, call.k, call.v)
    agree((found,), (block(call.q, call.k, call.v),))


def test_plain_attention_compiles_without_a_plan():
    q, k, v = tensors(generator(2), queries=6, keys=9, heads=2, dim=16)
    compiled = torch.compile(fr.attention, fullgraph=True, backend="aot_eager")
    agree((compiled(q, k, v),), (fr.attention(q, k, v),))


def test_what_is_no_plan_is_refused_in_compiled_code():
    q, k, v = tensors(generator(2), queries=6, heads=2, dim=16)
    compiled = torch.compile(lambda *x: fr.attention(*x, plan="none"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"plan: expected a Plan of fastrope\.plan\(\), received str"):
        compiled(q, k, v)


@pytest.mark.parametrize("what", ["rope", "modulations", "key_mask"])
def test_what_a_plan_is_made_of_is_refused_in_compiled_code(what):
    """A plan reads values; the message says where to make it."""
    q, k, v = tensors(generator(2), queries=6, heads=2, dim=16)
    given = {
        "rope": axial(grid(6), 16), "modulations": [fr.BiasDelta(1.0, 0.8, slice(2, 5))],
        "key_mask": torch.ones(1, 6, dtype=torch.bool, device=DEVICE),
    }[what]  # fmt: skip
    compiled = torch.compile(lambda *x: fr.attention(*x, **{what: given}), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"make it outside, with fastrope\.plan"):
        compiled(q, k, v)


def test_new_values_in_a_plan_do_not_recompile():
    """Tensors of a plan changed in place, and other q, k, v: one graph. What a plan's spec says is static."""
    counter = CompileCounterWithBackend("aot_eager")
    call = a_call()
    plan = call.planned()
    compiled = torch.compile(Planned(plan), fullgraph=True, backend=counter)
    results = []
    for n in range(3):
        plan.lowered.bands.weights.mul_(1 + n)
        q, k, v = tensors(generator(n), batch=2, queries=12, heads=4, key_heads=2, dim=16)
        results.append(compiled(q, k, v))
        agree(results[-1], Planned(plan)(q, k, v))
    assert counter.frame_count == 1


def test_masks_of_any_lengths_share_graphs():
    """How many keys a row keeps is a length like any other: one graph, and one more for lengths that vary."""
    counter = CompileCounterWithBackend("aot_eager")
    q, k, v = tensors(generator(0), batch=2, queries=40, heads=2, dim=16)
    rope = axial(grid(40), 16)
    compiled = torch.compile(lambda *x, plan: fr.attention(*x, plan=plan), fullgraph=True, backend=counter)
    for n in range(5, 16):
        plan = fr.plan(rope=rope, key_mask=torch.arange(40)[None] < torch.tensor([[40 - n], [n]]))
        torch.testing.assert_close(compiled(q, k, v, plan=plan), fr.attention(q, k, v, plan=plan))
    assert counter.frame_count <= 3


def test_gradients_through_compile():
    call = a_call()
    module = Planned(call.planned(), "sdpa")
    found = []
    for each in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        inputs = leaves(call)
        out, lse = each(*inputs)
        found.append(torch.autograd.grad(out.square().sum() + lse.masked_fill(lse.isinf(), 0).sum(), inputs))
    for expected, gradient in zip(*found, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_errors_while_tracing_are_ours():
    inputs = list(tensors(generator(0), batch=2, queries=12, heads=4, key_heads=2, dim=16))
    module = Planned(fr.plan(rope=axial(grid(12), 16)))
    for at, wrong, words in (
        (1, draw(generator(1), 2, 12, 3, 16), "k: expected a number of heads that divides H = 4, received 3"),
        (2, inputs[2].half(), "v: expected the dtype of q"),
        (0, draw(generator(1), 2, 7, 4, 16), "expected 1?[27] tokens"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=words):
            torch.compile(module, fullgraph=True, backend="aot_eager")(
                *(wrong if n == at else x for n, x in enumerate(inputs))
            )


def test_triton_with_gradients_is_refused_while_tracing():
    call = a_call()
    compiled = torch.compile(Planned(call.planned(), "triton"), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="forward only"):
        compiled(*leaves(call))


def test_the_reference_does_not_run_a_compiled_plan():
    """An explicit backend runs or raises; it is never replaced in silence."""
    call = a_call()
    compiled = torch.compile(Planned(call.planned(), "eager"), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r'backend="eager" cannot run a compiled plan'):
        compiled(call.q, call.k, call.v)
