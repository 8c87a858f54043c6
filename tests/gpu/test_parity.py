"""The fused kernels on a device: real shapes, memory, graphs, compilations, synchronisation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from numerics import (
    DEVICE,
    LAYOUTS,
    Call,
    assert_close,
    axial,
    check,
    compare,
    every_modulation,
    generator,
    grid,
    key_masks,
    lay_out,
    tensors,
)

import fastrope as fr
from fastrope.backends import folded, fused
from fastrope.bench.cases import CASES, chosen
from fastrope.bench.problem import Problem
from fastrope.bench.workloads import WORKLOADS
from fastrope.dispatch import decide
from fastrope.planning import polynomial

pytestmark = pytest.mark.gpu

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
KINDS = ("levels", "distinct")  # five scales, and a scale of its own for every query


def a_call(
    kind="levels", dtype=torch.bfloat16, dim=64, tokens=300, batch=2, mask="random", layout="contiguous", **options
) -> Call:
    """A call with every modulation at once, grouped heads and a mask."""
    g = generator(0)
    q, k, v = tensors(
        g, batch=batch, queries=tokens, heads=4, key_heads=2, dim=dim, dtype=dtype, layout=layout, **options
    )
    target = (tokens + 1) // 2
    positions = torch.cat([grid(target, min(7, tokens // 4)), grid(tokens - target, frame=1)])
    modulations = every_modulation(g, tokens, tokens, dim, kind)
    return Call(q, k, v, axial(positions, dim), None, modulations, key_masks(g, mask, batch, tokens), label=kind)


@pytest.fixture(autouse=True)
def _poison():
    """Leave NaN in the memory that outputs are allocated from: an element that no kernel writes shows."""
    torch.full((2**28,), torch.nan, device=DEVICE)


# ---- parity ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def kontext(case: str, dtype: torch.dtype) -> Problem:
    return Problem.make(WORKLOADS["kontext"], CASES[case], torch.device(DEVICE), dtype)


def attend_checked(problem: Problem, name: str, backend: str) -> None:
    """Run a problem and hold a sample of its queries against the reference."""
    errors = problem.check(fr.attention(problem.q, problem.k, problem.v, plan=problem.plan, backend=backend))
    print(f"{name}: {errors}")
    assert errors.passed, str(errors)


@pytest.mark.parametrize("applied", [False, True], ids=["raw", "applied"])  # varies fastest: the problem is remembered
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case.name for case in chosen(WORKLOADS["kontext"], None)])
def test_flux_kontext(applied, case, dtype):
    """1 x 8704 x 24 x 128; the reference computes a sample of the queries."""
    problem = kontext(case, dtype)
    problem = problem.applied if applied else problem
    attend_checked(problem, f"{case} {dtype}", "triton")


# ---- folded into the keys, for torch's attention ---------------------------------------------------------------------


def a_folding_call(modulated=True, **options) -> Call:
    """Two weights and a group that overlap, or rotation alone."""
    call = a_call(mask=None, **options)
    kept = [m for m in call.modulations if isinstance(m, (fr.BandWeight, fr.BiasDelta))]
    return Call(call.q, call.k, call.v, call.rope, None, kept if modulated else ())


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


@pytest.mark.parametrize("mask", [None, "random"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 96, 128])
def test_head_dims_of_a_polynomial(dim, dtype, mask, monkeypatch):
    monkeypatch.setattr(polynomial, "LEAST_FILLED", 0.0)
    call = a_call("distinct", dtype, dim, mask=mask)
    assert fused.Launch.of(call.q, call.k, call.v, call.planned().lowered).polynomial
    check(call, "triton")


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
    assert folded.run(q, k, v, plan.lowered, 0.1).is_contiguous()


def test_streams_fold_into_the_keys():
    call = a_folding_call(dtype=torch.float16)
    norm = fr.Norm(torch.linspace(0.5, 1.5, 64, device=DEVICE), 1e-6)
    plan, parts = call.planned(), (slice(0, 40), slice(40, None))
    streams = [fr.Stream(call.q[:, s], call.k[:, s], call.v[:, s], norm, norm) for s in parts]
    wide = [fr.Stream(*(x.double() for x in s[:3]), norm, norm) for s in streams]
    exact = fr.joint_attention(wide, plan=plan, backend="eager")
    assert_close(fr.joint_attention(streams, plan=plan), exact, fr.joint_attention(streams, plan=plan, backend="eager"))


# ---- queries that nothing sets apart, for torch's attention ----------------------------------------------------------


def a_splitting_call(kind="levels", **options) -> Call:
    """Every third query set apart: by one scale, or in tiles of a polynomial; beside weights, a group and a gain."""
    call = a_folding_call(**options)
    tokens = call.q.shape[1]
    apart = torch.arange(tokens, device=DEVICE) % 3 == 0
    values = torch.linspace(0.8, 0.81 if kind == "polynomial" else 0.8, tokens, device=DEVICE)
    scale = fr.QueryScale(torch.where(apart, values, 1.0), keys=slice(tokens // 3, None), axes=(1, 2))
    gain = fr.LogitGain(torch.where(apart, 1.3, 1.0), keys=slice(tokens // 2, None))
    return replace(call, modulations=[scale, gain, *call.modulations])


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


# ---- the fused loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_dims(dim, dtype, kind):
    check(a_call(kind, dtype, dim), "triton")


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


# ---- graphs and compilers --------------------------------------------------------------------------------------------


def planned(call: Call, backend="triton", **changes):
    """A function of q, k, v, and the plan it holds."""
    plan = call.planned()
    return lambda q, k, v: fr.attention(q, k, v, plan=plan, scale=call.scale, backend=backend, **changes)


def refill(*inputs: torch.Tensor) -> None:
    """New values in place."""
    for x in inputs:
        x.copy_(torch.randn(x.shape, device=x.device).to(x.dtype))


ROUTES = {**{kind: (lambda kind=kind: a_call(kind), "triton") for kind in KINDS}, "folded": (a_folding_call, "sdpa")}
ROUTES |= {kind: (lambda kind=kind: a_splitting_call(kind), "auto") for kind in ("split", "polynomial")}


@pytest.mark.parametrize("route", ROUTES)
def test_a_captured_graph_replays_on_new_values(route):
    make, backend = ROUTES[route]
    call = make()
    q, k, v = inputs = [x.clone() for x in (call.q, call.k, call.v)]
    attend = planned(call, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend(q, k, v)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v)
    for _ in range(3):
        refill(*inputs)
        graph.replay()
        assert torch.equal(out, attend(q, k, v))


@pytest.mark.parametrize("route", ROUTES)
def test_compiled_into_cuda_graphs_without_recompiling(route):
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    counters.clear()
    make, backend = ROUTES[route]
    call = make()
    q, k, v = inputs = [x.clone() for x in (call.q, call.k, call.v)]
    attend = planned(call, backend)
    compiled = torch.compile(lambda q, k, v: attend(q * 2, k, v) + 1, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(q, k, v).clone(), attend(q * 2, k, v) + 1)
            refill(*inputs)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("route", ["folded", "split", "polynomial"])
def test_other_paths_do_not_synchronise(route):
    make, backend = ROUTES[route]
    call = make()
    attend = planned(call, backend)
    attend(call.q, call.k, call.v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(call.q, call.k, call.v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, "random"])
def test_the_hot_path_does_not_synchronise(kind, mask):
    call = a_call(kind, mask=mask)
    attend = planned(call, return_lse=True)
    attend(call.q, call.k, call.v)
    call.run("triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(call.q, call.k, call.v)
        call.run("triton")  # the same objects again: the plan is remembered
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- what a call costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_memory_stays_a_small_multiple_of_the_keys(case):
    """Packed keys per level, queries per view, and the output: never N x N, which is 68 times the keys."""
    problem = kontext(case, torch.bfloat16)
    q, k, v, plan = problem.q, problem.k, problem.v, problem.plan
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fr.attention(q, k, v, plan=plan, backend="triton")
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / (k.numel() * k.element_size())
    print(f"{case}: {extra:.2f} times the keys")
    assert extra <= 16


def compilations(monkeypatch) -> Counter:
    """Counts the kernels triton compiles from now on, by name."""
    knobs = pytest.importorskip("triton.knobs")
    found: Counter = Counter()

    def count(*, fn, **_) -> None:
        found[fn.name] += 1

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", count)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_share_kernels(monkeypatch, kind):
    """Triton distinguishes sizes that 16 divides from others, and 1; beyond that a length compiles nothing."""
    monkeypatch.setattr(polynomial, "LEAST_FILLED", 0.0)  # the same kernels at every length
    a_call(kind, dim=32, tokens=384, mask=None).run("triton")  # whatever is compiled by now is of this kind
    found = compilations(monkeypatch)
    for tokens in (768, 960, 1152, 1536, 2304):
        a_call(kind, dim=32, tokens=tokens, mask=None).run("triton")
    assert not found, found
    for tokens in (301, 403, 505, 707, 909, 1111, 1313):
        a_call(kind, dim=32, tokens=tokens, mask=None).run("triton")
    print(dict(found))
    assert max(found.values(), default=0) <= 4, found


def test_layouts_share_kernels(monkeypatch):
    """Strides are arguments like any other."""
    a_call(dim=32, tokens=384, mask=None).run("triton")
    found = compilations(monkeypatch)
    call = a_call(dim=32, tokens=384, mask=None)
    for layout in ("heads_first", "fused", "padded"):
        q, k, v = (lay_out(x, layout) for x in (call.q, call.k, call.v))
        Call(q, k, v, call.rope, None, call.modulations).run("triton")
    print(dict(found))
    assert max(found.values(), default=0) <= 2, found
