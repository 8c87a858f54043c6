"""The torch.library ops: contracts, gradients, compilation, and what a planned call may not do on its way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from numerics import (
    DEVICE,
    Call,
    assert_close,
    axial,
    compare,
    draw,
    every_modulation,
    generator,
    grid,
    key_masks,
    many_signatures,
    scales,
    skip_unless_runnable,
    tensors,
    uniform,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fastrope as fr
from fastrope import device as devices
from fastrope import ops
from fastrope.backends import sdpa

SCALE = 0.25


def a_call(dtype=torch.float32, kind="levels", mask="random", tokens=12, batch=2, dim=16) -> Call:
    g = generator(0)
    q, k, v = tensors(g, batch=batch, queries=tokens, heads=4, key_heads=2, dim=dim, dtype=dtype)
    modulations = every_modulation(g, tokens, tokens, dim, kind)
    rope = axial(grid(tokens, 2), dim)
    return Call(q, k, v, rope, modulations=modulations, key_mask=key_masks(g, mask, batch, tokens), scale=SCALE)


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
    call = a_call()
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


# ---- gradients -------------------------------------------------------------------------------------------------------


def leaves(call: Call) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in (call.q, call.k, call.v)]


@pytest.mark.parametrize("mask", [None, "random", "row"])
@pytest.mark.parametrize("kind", ["levels", "distinct"])
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


@pytest.mark.parametrize("kind", ["levels", "distinct"])
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


# ---- compilation -----------------------------------------------------------------------------------------------------


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


# ---- what a planned call may not do ----------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes every op that reads a value on the host, and the largest tensor that comes to be."""

    SYNCHRONISES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.read, self.largest, self.where = [], 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        boolean = name in ("index", "index_put_") and any(
            getattr(x, "dtype", None) == torch.bool for x in args[1] if x is not None
        )
        if name.startswith(self.SYNCHRONISES) or boolean:
            self.read.append(name)
        if name == "_to_copy" and any(t.device != found.device for t in args[:1]):
            self.read.append(name)
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                size = x.untyped_storage().nbytes()
                if size > self.largest:
                    self.largest, self.where = size, f"{name} {tuple(x.shape)} {x.dtype}"
        return found


@pytest.mark.parametrize("kind", ["levels", "distinct", "mixed"])
@pytest.mark.parametrize("mask", [None, "row"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_planned_call_reads_nothing_on_the_host(kind, mask, batched):
    g = generator(4)
    q, k, v = tensors(g, batch=2, queries=200, heads=2, dim=16)
    modulations = every_modulation(g, 200, 200, 16, kind, batch=2 if batched else None)
    plan = fr.plan(rope=axial(grid(200), 16), modulations=modulations, key_mask=key_masks(g, mask, 2, 200))
    with Watch() as watch:
        fr.attention(q, k, v, plan=plan, backend="sdpa", return_lse=True)
    assert watch.read == []


def test_the_watch_sees_reads():
    with Watch() as watch:
        x = torch.arange(4)
        x.sum().item()
        x[x > 1]
        x.nonzero()
    assert len(watch.read) >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["levels", "few"])
def test_sdpa_allocates_no_logits(kind, dtype):
    """2048 x 2048: the logits of one head alone are 64 times the keys. Query variants and copies stay small."""
    tokens, dim = 2048, 16
    g = generator(5)
    q, k, v = tensors(g, queries=tokens, heads=2, dim=dim, dtype=dtype)
    r = scales(g, kind, tokens)
    modulations = [
        fr.QueryScale(r, keys=slice(1024, None), axes=(1, 2)),
        fr.BandWeight(uniform(g, dim // 2), keys=slice(512, 1500)),
        fr.BiasDelta(1.1, 0.8, keys=slice(1024, 1600)),
        fr.LogitGain(uniform(g, tokens), keys=slice(1300, None)),
    ]
    plan = fr.plan(rope=axial(grid(tokens), dim), modulations=modulations)
    with Watch() as watch:
        fr.attention(q, k, v, plan=plan, backend="sdpa")
    keys_wide = k.numel() * 4
    variants = (
        5  # plain, scaled, scaled with gain; in half precision a gain takes two columns, and so does a plain gain
    )
    assert watch.largest <= 2 * variants * keys_wide, watch.where
    assert watch.largest < tokens * tokens * k.element_size(), watch.where


def test_sdpa_stacks_few_key_copies_for_per_query_scales():
    tokens, dim = 1024, 16
    g = generator(6)
    q, k, v = tensors(g, queries=tokens, heads=1, dim=dim)
    r = torch.ones(tokens, device=DEVICE)
    r[:40] = uniform(g, 40)  # more than there may be buckets
    plan = fr.plan(rope=axial(grid(tokens), dim), modulations=[fr.QueryScale(r)])
    assert plan.lowered.scales.counts[0][0] == 40
    with Watch() as watch:
        fr.attention(q, k, v, plan=plan, backend="sdpa")
    assert watch.largest <= 16 * k.numel() * 4, watch.where


@pytest.mark.parametrize(("backend", "kind"), [("sdpa", "levels"), ("sdpa", None), ("triton", None)])
def test_memory_does_not_grow_with_the_key_signatures(backend, kind):
    """A group for every other key: what is held at once stays a small multiple of the keys, and no table is N x N."""
    tokens, dim = 100 if backend == "triton" and devices.interpreted() else 256, 16
    skip_unless_runnable(backend)
    g = generator(8)
    q, k, v = tensors(g, queries=tokens, heads=1, dim=dim)
    plan = fr.plan(rope=axial(grid(tokens), dim), modulations=many_signatures(g, tokens, tokens, dim, kind))
    assert len(plan.lowered.passes) > 5
    with Watch() as watch:
        fr.attention(q, k, v, plan=plan, backend=backend)
    assert watch.largest <= 12 * k.numel() * 4, watch.where
    assert max(t.numel() for t in plan.tensors) <= 12 * k.numel()


@pytest.mark.parametrize("masked", [False, True])
def test_a_log_sum_exp_differentiates_block_by_block(masked, monkeypatch):
    monkeypatch.setattr(sdpa, "BLOCK_ROWS", 4)
    g = generator(9)
    q, k = (draw(g, 2, 2, n, 8, dtype=torch.float64).requires_grad_() for n in (10, 7))
    mask = key_masks(g, "random", 2, 7)[:, None, None] if masked else None

    def lse(q, k):
        return sdpa._LogSumExp.apply(q, k, mask, 0.3)

    s = (q @ k.transpose(-1, -2)) * 0.3
    torch.testing.assert_close(lse(q, k), s.masked_fill(~mask, -torch.inf).logsumexp(-1) if masked else s.logsumexp(-1))
    assert torch.autograd.gradcheck(lse, (q, k), check_forward_ad=True)


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_log_sum_exp_is_made_in_blocks(return_lse):
    tokens, heads = 2048, 2
    q, k, v = tensors(generator(7), queries=tokens, heads=heads, dim=16)
    with Watch() as watch:
        fr.attention(q, k, v, backend="sdpa", return_lse=return_lse)
    assert watch.largest <= (heads * 256 * tokens * 4 if return_lse else 2 * k.numel() * 4), watch.where
