"""Queries that nothing sets apart by torch's attention, the others by the fused loop, interpreted or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    DEVICE,
    LAYOUTS,
    Call,
    assert_close,
    axial,
    disjoint_sets,
    generator,
    grid,
    key_masks,
    lay_out,
    scatter,
    skip_unless_runnable,
    tensors,
    uniform,
)  # fmt: skip
from watch import Watch

import fastrope as fr
from fastrope import dispatch, joint, ops
from fastrope.backends import folded, fused, split_rows
from fastrope.kernels.abi import QUERY_TILE
from fastrope.planning import polynomial

pytest.importorskip("triton")
HALF = torch.float16
TOKENS = 74


@pytest.fixture(autouse=True)
def _runnable():
    skip_unless_runnable("triton")


def picture(
    kind="levels", dim=16, batch=1, heads=2, key_heads=1, seed=0, others=(), applied=False, pairing="interleaved"
):
    """``[text | target | reference]``: a quarter of the target is set apart, by scales or gains of ``kind``."""
    g = generator(seed)
    positions = torch.cat([grid(40, 6), grid(34, frame=1)])
    q, k, v = tensors(g, batch=batch, queries=TOKENS, heads=heads, key_heads=key_heads, dim=dim, dtype=HALF)
    where = torch.arange(TOKENS, device=DEVICE)
    apart = (where >= 10) & (where < 30) & (where % 2 == 0)
    reference = slice(40, None)
    values = {
        "levels": torch.where(where % 3 == 0, 0.65, 0.8), "own": uniform(g, TOKENS, low=0.5),
        "gain": uniform(g, TOKENS, low=0.5, high=1.4),
    }[kind]  # fmt: skip
    value = torch.where(apart, values, 1.0)
    if batch > 1:
        value = torch.stack([value, torch.where(apart & (where < 20), value, 1.0)])
    first = fr.LogitGain(value, keys=slice(50, 60)) if kind == "gain" else fr.QueryScale(value, reference, (1, 2))
    kinds = {
        "weight": fr.BandWeight(uniform(g, dim // 2, low=0.3, high=1.4), keys=reference),
        "group": fr.BiasDelta(0.7, 1.3, keys=slice(44, 66)),
        "gains": fr.LogitGain(torch.where(where % 11 == 0, 1.3, 1.0), keys=slice(2, 50)),
        "scattered": fr.BiasDelta(1.2, 0.8, keys=disjoint_sets(g, 1, TOKENS)[0]),
    }
    rope = axial(positions, dim, pairing, applied)
    return Call(q, k, v, rope, modulations=[first, *(kinds[name] for name in others)])


def run(call: Call, plan: fr.Plan, scale: float) -> torch.Tensor:
    launch = fused.Launch.of(call.q, call.k, call.v, plan.lowered)
    prepares = folded.prepares(call.q, call.k, call.v, plan.lowered)
    return split_rows.run(call.q, call.k, call.v, plan.lowered, scale, launch, prepares)


def check(call: Call) -> torch.Tensor:
    plan = call.planned()
    assert split_rows.splits(plan.lowered)
    out = run(call, plan, call.q.shape[3] ** -0.5)
    assert out.shape == call.q.shape
    assert out.is_contiguous()
    assert_close(out, call.exact()[0], call.low()[0])
    return out


@pytest.mark.parametrize("kind", ["levels", "own", "gain"])
@pytest.mark.parametrize(
    "others", [(), ("gains",), ("weight",), ("group",), ("weight", "group"), ("scattered",), ("weight", "scattered")]
)
def test_against_the_reference(kind, others):
    check(picture(kind, others=others))


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("kind", ["levels", "gain"])
def test_pairings_of_applied_and_other_ropes(kind, pairing, applied):
    check(picture(kind, pairing=pairing, applied=applied, others=("weight", "group")))


@pytest.mark.parametrize("kind", ["levels", "own", "gain"])
def test_rows_that_set_different_queries_apart(kind):
    """Those of any row are left to the fused loop in all of them."""
    call = picture(kind, batch=2, others=("weight", "group"))
    rope = axial(scatter(generator(1), TOKENS, batch=2), 16)
    out = check(replace(call, rope=rope))
    first = call.modulations[0]
    for b in range(2):
        value = first.gain[b] if kind == "gain" else first.scale[b]
        one = replace(first, gain=value) if kind == "gain" else replace(first, scale=value)
        row = Call(*(x[b : b + 1] for x in (call.q, call.k, call.v)), fr.RoPE(rope.angles[b], rope.axis),
                   modulations=[one, *call.modulations[1:]])  # fmt: skip
        assert_close(out[b : b + 1], row.exact()[0], row.low()[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    call = picture(others=("group",))
    check(replace(call, **{name: lay_out(getattr(call, name), layout) for name in "qkv"}))


def test_other_tokens_as_keys():
    g = generator(2)
    q, k, v = tensors(g, batch=1, queries=TOKENS, keys=51, heads=1, dim=16, dtype=HALF)
    r = torch.where(torch.arange(TOKENS, device=DEVICE) % 5 == 0, 0.7, 1.0)
    check(Call(q, k, v, axial(grid(TOKENS), 16), axial(scatter(g, 51), 16), [fr.QueryScale(r, keys=slice(7, 40))]))


def test_no_rope_at_all():
    call = picture("gain", others=("group",))
    check(replace(call, rope=None))


def test_plans_with_other_numbers():
    call = picture(others=("weight", "group"))
    weight = torch.linspace(1.4, 0.2, 8, device=DEVICE)
    plan = call.planned().with_weight(weight).with_groups([(1.1, 0.4)])
    scale, band, group = call.modulations
    other = replace(call, modulations=[scale, replace(band, weight=weight), replace(group, bias=1.1, delta=0.4)])
    out = run(call, plan, 0.25)
    assert_close(out, other.exact()[0], other.low()[0])


@settings(max_examples=8)
@given(st.integers(0, 99), st.sampled_from(["levels", "own", "gain"]), st.sampled_from([(2, 1), (2, 2)]))
def test_any_picture(seed, kind, heads):
    others = [name for n, name in enumerate(("weight", "group")) if seed >> n & 1]
    check(picture(kind, seed=seed, heads=heads[0], key_heads=heads[1], others=others))


def test_a_polynomial_among_the_modulated_queries(monkeypatch):
    monkeypatch.setattr(polynomial, "LEAST_FILLED", 0.0)
    call = picture("own", dim=32, heads=1, others=("group",))
    plan = call.planned()
    assert fused.Launch.of(call.q, call.k, call.v, plan.lowered).polynomial
    with Watch() as watch:
        out = run(call, plan, 32**-0.5)
    assert watch.read == []
    assert_close(out, call.exact()[0], call.low()[0])


def test_the_loop_runs_over_modulated_queries_alone(monkeypatch):
    """300 queries of which 10 are modulated: a tile of them for a head, not three."""
    g = generator(3)
    q, k, v = tensors(g, batch=1, queries=300, heads=2, dim=16, dtype=HALF)
    r = torch.where(torch.arange(300, device=DEVICE) < 10, 0.5, 1.0)
    call = Call(q, k, v, axial(grid(300), 16), modulations=[fr.QueryScale(r, keys=slice(100, None))])
    plan, rows = call.planned(), []
    from fastrope import kernels

    prepare = kernels.prepare_queries
    monkeypatch.setattr(kernels, "prepare_queries", lambda *a: rows.append(prepare(*a)) or rows[-1])
    check(call)
    assert [x[0].shape[3] for x in rows] == [QUERY_TILE]
    assert plan.lowered.sorted_queries.num_modulated == QUERY_TILE
    assert sorted(plan.lowered.unmodulated.rows.tolist()) == list(range(10, 300))


@pytest.fixture
def auto(monkeypatch):
    """``auto`` chooses as on a GPU; the runs it led to."""
    runs, run, choose = [], split_rows.run, dispatch._backend_for
    chosen = dispatch.Decision("triton", "as on a GPU", split=True)
    monkeypatch.setattr(dispatch, "_backend_for", lambda *call: chosen if call[3] == "auto" else choose(*call))
    monkeypatch.setattr(split_rows, "run", lambda *call: runs.append(run(*call)) or runs[-1])
    return runs


def test_on_the_way_there(auto):
    call = picture(others=("weight", "group"))
    out = call.run("auto", return_lse=False)
    assert torch.equal(out, auto[0])
    found = fr.explain(call.q, call.k, call.v, **call.tokens())
    assert "unmodulated queries: 64, through torch's attention" in str(found)
    assert "prologue: kernels over q, k" in str(found)
    plan = call.planned()
    arguments = call.q, call.k, call.v, list(plan.tensors), plan.spec, 0.25, False, "auto"
    torch.library.opcheck(ops.planned_attention, arguments, test_utils=("test_schema", "test_faketensor"))
    assert len(auto) > 1


@pytest.mark.parametrize(
    ("others", "applied", "layout"),
    [(("weight",), True, "contiguous"), (("group",), True, "contiguous"), ((), False, "shifted")],
)
def test_explain_names_the_prologues_of_both_sides(others, applied, layout, auto, monkeypatch):
    """Keys that only the folded side changes, and values that only it copies, are in the prologue, too."""
    from fastrope import kernels

    call = picture("gain", others=others, applied=applied)
    if layout == "shifted":  # no descriptor describes it
        call = replace(call, v=call.v.new_zeros(call.v.numel() + 1)[1:].view(call.v.shape).copy_(call.v))
    plan, seen = call.planned(), {"q"}  # whose modulated rows prepare_queries reads
    names, pack = {call.q.data_ptr(): "q", call.k.data_ptr(): "k", call.v.data_ptr(): "v"}, kernels.pack_rows
    monkeypatch.setattr(kernels, "pack_rows", lambda x, *a: seen.add(names[x.data_ptr()]) or pack(x, *a))
    fr.attention(call.q, call.k, call.v, plan=plan)
    assert len(auto) == 1
    assert set(fr.explain(call.q, call.k, call.v, plan=plan).decision.packs) == seen


@pytest.mark.parametrize("kind", ["levels", "own"])
def test_streams(kind, auto):
    """Text and image as projections leave them, against the same steps one by one."""
    call = picture(kind, others=("weight", "group"), key_heads=2)
    weight = torch.linspace(0.8, 1.2, 16, device=DEVICE)
    parts = [fr.Stream(*(x[:, part] for x in (call.q, call.k, call.v)), fr.Norm(weight, 0.0), fr.Norm(weight, 0.0))
             for part in (slice(6), slice(6, None))]  # fmt: skip
    plan = call.planned()
    out = fr.joint_attention(parts, plan=plan)
    assert len(auto) == 1
    wide = [fr.Stream(*(x.double() for x in s[:3]), *s[3:]) for s in parts]
    exact = fr.attention(*joint.join(wide), plan=plan, backend="eager")
    assert_close(out, exact, fr.attention(*joint.join(parts), plan=plan, backend="eager"))


@pytest.mark.parametrize("kind", ["random", "row", "shared"])
@pytest.mark.parametrize("others", [(), ("weight", "group")], ids=str)
def test_masked_keys_are_left_out(others, kind, auto):
    call = picture(others=others, batch=2)
    call = replace(call, key_mask=key_masks(generator(0), kind, 2, TOKENS))
    assert_close(call.run("auto", return_lse=False), call.exact()[0], call.low()[0])
    assert len(auto) == 1


def test_what_does_not_split():
    """Most queries modulated, and none at all."""
    call = picture()
    assert split_rows.splits(call.planned().lowered)
    most = fr.QueryScale(torch.where(torch.arange(TOKENS, device=DEVICE) < 36, 1.0, 0.5), keys=slice(40, None))
    assert not split_rows.splits(replace(call, modulations=[most]).planned().lowered)
    grouped = replace(call, modulations=[fr.BiasDelta(1, 1.1, keys=slice(40, None))])
    assert not split_rows.splits(grouped.planned().lowered)


def test_the_whole_loop_still_computes_them():
    """A plan that splits, asked for by the name of the backend, or for a log-sum-exp."""
    for kind in ("levels", "gain"):
        call = picture(kind, others=("weight", "group"))
        out, lse = call.run("triton")
        exact, low = call.exact(), call.low()
        assert_close(out, exact[0], low[0])
        assert_close(lse, exact[1], low[1], HALF, name="lse")
