"""Modulations folded into the keys by the kernels, before torch's attention: against the reference in float64, by the
one tolerance rule."""

from __future__ import annotations

import contextlib
import types
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from numerics import (
    LAYOUTS,
    Call,
    Tally,
    assert_close,
    axial,
    calls,
    disjoint_sets,
    generator,
    grid,
    key_set,
    lay_out,
    scales,
    scatter,
    skip_unless_runnable,
    tensors,
    uniform,
)  # fmt: skip
from test_ops import Watch

import fastrope as fr
from fastrope import device as devices
from fastrope import ops
from fastrope.backends import folded
from fastrope.rope import rotate

pytest.importorskip("triton")
from fastrope import kernels

DTYPES = (torch.float32, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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


def run(call: Call, plan: fr.Plan | None = None) -> torch.Tensor:
    plan = call.planned() if plan is None else plan
    assert folded.folds(plan.lowered)
    scale = call.q.shape[3] ** -0.5 if call.scale is None else call.scale
    return folded.run(call.q, call.k, call.v, plan.lowered, scale)


def check(call: Call, tally: Tally | None = None) -> torch.Tensor:
    out = run(call)
    assert out.shape == call.q.shape
    assert out.dtype == call.q.dtype
    errors = assert_close(out, call.exact()[0], call.low()[0], name=call.label)
    if tally is not None:
        tally.add(errors, call.q.dtype)
    return out


def weight(g, dim: int = 16, keys=slice(None)) -> fr.BandWeight:
    return fr.BandWeight(uniform(g, dim // 2, low=0.25, high=1.5), keys=keys)


def a_call(dtype=torch.float32, tokens: int = 37, batch: int = 2, dim: int = 16, modulations=None, **options) -> Call:
    """A call of ``modulations(generator)``, rotated."""
    g = generator(1)
    q, k, v = tensors(g, batch=batch, queries=tokens, dim=dim, dtype=dtype, **options)
    return Call(q, k, v, axial(grid(tokens, min(4, tokens)), dim), modulations=modulations(g) if modulations else ())


def both(g) -> list:
    """Weights inside, outside and across a group, some of them over the same keys."""
    return [weight(g, keys=slice(3, 30)), fr.BiasDelta(1.3, 0.6, slice(10, 25)), weight(g, keys=slice(20, None))]


MODULATIONS = {
    "a weight": lambda g: [weight(g, keys=slice(9, 30))],
    "weights of all keys": lambda g: [weight(g), weight(g)],
    "weights over the same keys": lambda g: [weight(g, keys=slice(20)), weight(g, keys=slice(10, 30))],
    "a group": lambda g: [fr.BiasDelta(1.3, 0.6, slice(10, None))],
    "a group of each row": lambda g: [fr.BiasDelta(0.5 + uniform(g, 2), 0.5 + uniform(g, 2), slice(5, 20))],
    "delta 0": lambda g: [fr.BiasDelta(0.7, torch.tensor([0.0, 1.2]), slice(5, 20))],
    "lambda 0": lambda g: [fr.BiasDelta(torch.tensor([0.0, 1.2]), 0.7, slice(5, 20))],
    "lambda and delta 0": lambda g: [fr.BiasDelta(0.0, 0.0, slice(5, 20))],
    "two groups": lambda g: [fr.BiasDelta(1.2, 0.8, slice(3, 12)), fr.BiasDelta(0.6, 1.4, slice(20, 33))],
    "a group in parts": lambda g: [fr.BiasDelta(1.3, 0.6, torch.tensor([1, 2, 3, 17, 18, 30]))],
    "scattered": lambda g: [weight(g, keys=key_set(g, "mask", 37)), *(
        fr.BiasDelta(1.2, 0.6, keys) for keys in disjoint_sets(g, 2, 37))],
    "together": both,
}  # fmt: skip
SORTED = ("scattered",)
GROUPED = ("a group", "scattered", "together")


# ---- against the reference -------------------------------------------------------------------------------------------


def foldable(call: Call) -> Call:
    modulations = [m for m in call.modulations if isinstance(m, (fr.BandWeight, fr.BiasDelta))]
    return replace(call, modulations=modulations, key_mask=None)


@dtypes
def test_any_composition(dtype):
    tally = Tally()
    options = {"tokens": (1, 2, 17, 33, 66), "dims": (16, 20, 80), "heads": ((1, 1), (2, 1), (1, 3), (2, 2))}

    @settings(max_examples=40)
    @given(calls(dtype, **options).map(foldable))
    def run(call):
        check(call, tally)

    run()
    tally.check(f"folded {dtype}")


@dtypes
@pytest.mark.parametrize("applied", [False, True], ids=["raw", "applied"])
@pytest.mark.parametrize("case", MODULATIONS)
def test_modulations(case, applied, dtype):
    call = a_call(dtype, modulations=MODULATIONS[case])
    call = replace(call, rope=call.rope.as_applied(applied), label=case)
    assert (call.planned().lowered.keys.order is not None) == (case in SORTED)
    check(call)


@dtypes
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("dim", [16, 20, 64, 96, 128])
@pytest.mark.parametrize("modulations", [None, both], ids=["plain", "together"])
def test_head_dims_and_pairings(modulations, dim, pairing, dtype):
    g = generator(dim)
    q, k, v = tensors(g, queries=37, heads=2, dim=dim, dtype=dtype)
    given = [] if modulations is None else [weight(g, dim, slice(3, 30)), fr.BiasDelta(1.3, 0.6, slice(20, 35))]
    check(Call(q, k, v, axial(grid(37, 4), dim, pairing), modulations=given, label=pairing))


@pytest.mark.parametrize("length", [1, 2, 113, 239])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(length, dtype):
    check(a_call(dtype, length, modulations=lambda g: [weight(g), fr.BiasDelta(1.2, 0.7, slice(length // 2, None))]))


@dtypes
@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (70, 1), (33, 50)])
@pytest.mark.parametrize("applied", [False, True], ids=["raw", "applied"])
def test_keys_of_other_tokens(applied, queries, keys, dtype):
    g = generator(5)
    q, k, v = tensors(g, queries=queries, keys=keys, heads=4, key_heads=2, dim=16, dtype=dtype)
    modulations = [weight(g, keys=slice(keys // 3, None)), fr.BiasDelta(1.2, 0.7, slice(keys // 2, None))]
    rope, key_rope = axial(grid(queries), 16), axial(grid(keys, frame=1), 16, applied=applied)
    check(Call(q, k, v, rope, key_rope, modulations))


@dtypes
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("modulations", [None, both], ids=["plain", "together"])
def test_grouped_heads(modulations, key_heads, dtype):
    check(a_call(dtype, heads=6, key_heads=key_heads, modulations=modulations))


@dtypes
def test_rows_with_angles_of_their_own(dtype):
    g = generator(3)
    q, k, v = tensors(g, batch=2, queries=41, dim=16, dtype=dtype)
    check(Call(q, k, v, axial(scatter(g, 41, batch=2), 16), modulations=both(g)))


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("applied", [None, False, True])
def test_layouts(applied, layout, dtype):
    """What lies around a strided tensor is NaN; what is not rotated is read where it lies, or packed."""
    call = a_call(dtype, dim=24, heads=2, layout=layout)
    rope = None if applied is None else axial(grid(37), 24, applied=applied)
    check(replace(call, rope=rope, label=layout))
    check(replace(call, rope=rope, modulations=[fr.BiasDelta(1.2, 0.6, slice(9, 30))], label=layout))


@dtypes
def test_buffers_may_start_as_nan(dtype, monkeypatch):
    def poisoned(*args, empty=torch.empty, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    call = a_call(dtype, modulations=both)
    expected = run(call)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(run(call), expected)


def test_weights_are_rounded_once_with_the_rotation(monkeypatch):
    call = a_call(torch.float16, modulations=lambda g: [weight(g)])
    seen, attend = [], folded.F.scaled_dot_product_attention
    monkeypatch.setattr(folded.F, "scaled_dot_product_attention", lambda q, k, v, scale: seen.append(k) or attend(
        q, k, v, scale=scale))  # fmt: skip
    run(call)
    w = call.modulations[0].weight.repeat_interleave(2)
    exact = (w * rotate(call.k.double(), call.rope.angles, call.rope.pairing)).transpose(1, 2)
    half = torch.finfo(torch.float16).eps / 2
    assert bool(((seen[0].double() - exact).abs() <= half * exact.abs() + 1e-6).all())


def test_the_callers_tensors_stay_as_they_are():
    call = a_call(modulations=MODULATIONS["a group"])
    call = replace(call, rope=call.rope.as_applied())
    before = [x.clone() for x in (call.q, call.k, call.v)]
    run(call)
    assert all(torch.equal(x, y) for x, y in zip(before, (call.q, call.k, call.v), strict=True))


def test_the_output_lies_as_it_is_handed_on():
    """A copy of it would cost as much as a pass of the prologue."""
    assert run(a_call(modulations=both)).is_contiguous()


# ---- plans -----------------------------------------------------------------------------------------------------------


@dtypes
def test_neutral_modulations_give_the_same_bits(dtype):
    call = a_call(dtype)
    neutral = [
        fr.QueryScale(torch.ones(37)), fr.BandWeight(torch.ones(8), slice(4, 9)), fr.BiasDelta(1.0, 1.0, slice(5, 20)),
        fr.LogitGain(torch.ones(37)),
    ]  # fmt: skip
    mask = torch.ones(2, 37, dtype=torch.bool)
    assert torch.equal(run(replace(call, modulations=neutral, key_mask=mask)), run(call))


@dtypes
@pytest.mark.parametrize("applied", [False, True], ids=["raw", "applied"])
@pytest.mark.parametrize("group", [[], [fr.BiasDelta(1.3, 0.6, slice(10, 25))]], ids=["alone", "beside a group"])
def test_other_weights_in_a_plan(group, applied, dtype):
    call = a_call(dtype)
    g = generator(8)
    first, second = weight(g, keys=slice(5, 30)), weight(g, keys=slice(5, 30))
    call = replace(call, rope=call.rope.as_applied(applied), modulations=[first, *group])
    plan, wanted = call.planned(), replace(call, modulations=[second, *group])
    found, before = plan.with_weight(second.weight), run(call, plan)
    assert found.spec == wanted.planned().spec
    assert torch.equal(run(call, found), run(wanted))
    assert torch.equal(run(call, plan), before)
    assert not torch.equal(run(call, found), before)


@dtypes
def test_other_numbers_in_the_groups_of_a_plan(dtype):
    first, second = (1.0, torch.tensor([0.5, 0.6])), (0.7, torch.tensor([0.0, 1.2]))

    def grouped(numbers) -> Call:
        return a_call(dtype, modulations=lambda g: [weight(g), fr.BiasDelta(*numbers, slice(9, 30))])

    call = grouped(first)
    found = run(call, call.planned().with_groups([second]))
    assert torch.equal(found, run(grouped(second)))
    assert not torch.equal(found, run(call))


def test_kernels_launch_on_the_device_of_the_tensors(monkeypatch):
    """Three packs and the means, all inside."""
    entered = []

    @contextlib.contextmanager
    def launching_on(device):
        entered.append(device)
        yield
        entered.append("left")

    monkeypatch.setattr(folded, "launching_on", launching_on)
    for name in ("pack_rows", "group_means"):
        launch = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *call, launch=launch: entered.append("ran") or launch(*call))
    run(a_call(modulations=MODULATIONS["scattered"]))
    assert entered == [torch.device("cpu"), *["ran"] * 4, "left"]


def test_what_folds():
    rope, gain = axial(grid(37), 16), torch.linspace(0.5, 1.5, 37)
    weighted, group = fr.BandWeight(torch.linspace(0.5, 1.5, 8), slice(9)), fr.BiasDelta(1.2, 0.7)
    mask = torch.arange(37)[None] < 30
    for modulations in ([], [weighted], [group], [weighted, group]):
        assert folded.folds(fr.plan(rope=rope, modulations=modulations).lowered)
        for more in ([fr.QueryScale(scales(generator(0), "levels", 37))], [fr.LogitGain(gain, slice(2))]):
            assert not folded.folds(fr.plan(rope=rope, modulations=[*modulations, *more]).lowered)
        assert not folded.folds(fr.plan(rope=rope, modulations=modulations, key_mask=mask).lowered)
    assert folded.folds(fr.plan().lowered)


def test_what_is_taken(monkeypatch):
    gain = fr.LogitGain(torch.full((9,), 0.5))
    plan, other = (fr.plan(modulations=m, num_keys=9).lowered for m in ([], [gain]))
    assert not folded.takes(torch.empty(1), plan)

    def like(dtype):
        return types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype)

    monkeypatch.setattr(devices, "kernel_obstacle", lambda q: "float64" if q.dtype == torch.float64 else None)
    assert [folded.takes(like(dtype), plan) for dtype in (torch.bfloat16, torch.float32, torch.float64)] == [1, 1, 0]
    assert not folded.takes(like(torch.bfloat16), other)


# ---- on the way there ------------------------------------------------------------------------------------------------


def test_it_stands_in_for_sdpa(taken):
    call = a_call(torch.float16, modulations=both)
    out = call.run("sdpa", return_lse=False)
    assert len(taken) == 1
    assert torch.equal(out, taken[0])
    assert out.is_contiguous()


@pytest.mark.parametrize("change", ["lse", "gain", "mask", "float64", "grad", "tangent"])
def test_what_it_does_not_do_stays_with_sdpa(change, taken):
    call = a_call(modulations=both)
    if change == "gain":
        call = replace(call, modulations=[*call.modulations, fr.LogitGain(torch.linspace(0.5, 1.5, 37))])
    if change == "mask":
        call = replace(call, key_mask=torch.arange(37)[None] < 30)
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
