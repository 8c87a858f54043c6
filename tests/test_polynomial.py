"""Queries with per-query scales, in 16 bits: tiles of similar scales, a turn of the keys, and a polynomial."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numerics import (
    DEVICE,
    LAYOUTS,
    Call,
    axial,
    check,
    compare,
    disjoint_sets,
    generator,
    grid,
    key_masks,
    lay_out,
    many_signatures,
    scatter,
    skip_unless_runnable,
    tensors,
    uniform,
    with_tiles,
)  # fmt: skip
from pages import page

import fastrope as fr
from fastrope import device as devices
from fastrope.backends import fused
from fastrope.kernels.abi import QUERY_TILE
from fastrope.planning import polynomial
from fastrope.planning.resolved import Scale
from fastrope.planning.tables import SortedQueries

pytest.importorskip("triton")
from fastrope import kernels
from fastrope.kernels.polynomial import coefficients

INTERPRETED = devices.interpreted()
HALVES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d).removeprefix("torch."))
TOKENS = 46 if INTERPRETED else 400


@pytest.fixture(autouse=True)
def _runnable():
    skip_unless_runnable("triton")


@pytest.fixture
def sparse(monkeypatch):
    """A polynomial for calls of few queries, too, whose tiles a plan would rather leave to axis blocks."""
    monkeypatch.setattr(polynomial, "LEAST_FILLED", 0.0)


def picture(dtype, dim=32, tokens=TOKENS, text=6, batch=1, heads=1, low=0.6, seed=0, applied=False, **options):
    """``[text | target | reference]``; queries of the target loosened, each its own way."""
    g = generator(seed)
    reference = (tokens - text) // 2
    positions = torch.cat([grid(tokens - reference, text), grid(reference, frame=1)])
    q, k, v = tensors(g, batch=batch, queries=tokens, heads=heads, dim=dim, dtype=dtype, **options)
    r = torch.ones(batch, tokens, device=DEVICE)
    r[:, text : tokens - reference] = uniform(g, batch, tokens - reference - text, low=low)
    where = slice(tokens - reference, None)
    scale = fr.QueryScale(r if batch > 1 else r[0], keys=where, axes=(1, 2))
    return g, Call(q, k, v, axial(positions, dim, applied=applied), modulations=[scale]), where


def by_polynomial(call: Call) -> Call:
    """The call, which must go through the polynomial."""
    assert fused.Launch.of(call.q, call.k, call.v, call.planned().lowered).polynomial
    return call


# ---- tables ----------------------------------------------------------------------------------------------------------


@example([0.5] * (2 * QUERY_TILE + 1), 0.0)
@given(st.lists(st.floats(0, 1), max_size=400), st.floats(0, 1))
def test_tiles_partition_the_queries(values, width):
    r = torch.tensor(sorted(values), dtype=torch.float64)
    bounds = polynomial.tile_bounds(r, width)
    assert bounds[0] == 0
    assert bounds[-1] == len(r)
    for first, last in itertools.pairwise(bounds):
        assert 0 < last - first <= QUERY_TILE
        assert last == first + 1 or r[last - 1] - r[first] <= width
        if last < len(r) and last - first < QUERY_TILE:  # as wide as may be
            assert r[last] - r[first] > width


def nearest(degree: int, x: float) -> float:
    """The error of Chebyshev's polynomial for ``exp(i t)``, ``|t| <= x``: numpy's, not ours."""
    t = np.linspace(-1, 1, 2001)
    real, imaginary = (np.polynomial.chebyshev.chebinterpolate(lambda s, f=f: f(x * s), degree + 1)[: degree + 1]
                       for f in (np.cos, np.sin))  # fmt: skip
    value = np.polynomial.chebyshev.chebval(t, real) + 1j * np.polynomial.chebyshev.chebval(t, imaginary)
    return float(abs(value - np.exp(1j * x * t)).max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("far", "near", "degree"), [(31.5, 0.1, 3), (31.5, 25.0, 1), (800.0, 1.0, 3), (2.0, 2.0, 1)])
def test_tiles_are_as_wide_as_half_a_rounding_lets_them(dtype, far, near, degree):
    width = polynomial.tile_width(far, near, 0.0, dtype)
    allowed = torch.finfo(dtype).eps / 4
    assert nearest(3, far * width / 2) <= allowed
    assert nearest(1, near * width / 2) <= allowed
    assert nearest(degree, (far if degree == 3 else near) * width / 2) > 0.9 * allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("degree", [1, 3])
def test_the_kernels_polynomial_is_the_nearest(degree, dtype):
    """For the widest tile and for narrower ones; the sign of ``i^2`` is in the coefficients."""
    reach = (1.0, 0.0) if degree == 3 else (0.0, 1.0)
    for part in (1.0, 0.7, 0.4):
        x = part * polynomial.tile_width(*reach, 0.0, dtype) / 2
        a0, a1, a2, a3 = coefficients.fn(x, degree)
        t = np.linspace(-x, x, 2001)
        value = a0 + a1 * 1j * t + (a2 * t**2 + a3 * 1j * t**3 if degree == 3 else 0)
        assert abs(value - np.exp(1j * t)).max() < 1.05 * nearest(degree, x)


def test_angles_that_float32_cannot_hold_get_no_polynomial():
    assert polynomial.tile_width(31.5, 1.0, 1.0, torch.float16) > 0
    assert polynomial.tile_width(1e3, 1.0, 1.0, torch.float16) == 0
    assert polynomial.tile_width(0.0, 0.0, 1.0, torch.float16) == float("inf")


@pytest.mark.parametrize(("extent", "level", "found"), [(1.0, 0.5, True), (1e4, 0.5, False), (1.0, 1e6, True)])
def test_equal_scales_do_not_make_up_for_keys_too_far_apart(extent, level, found):
    """Ten scales of 100 queries each would fill tiles of any width. What queries of a bucket turn by does not count."""
    r = torch.cat([torch.linspace(0.6, 0.9, 10).repeat_interleave(100), torch.full((QUERY_TILE,), level)])
    rope = fr.RoPE.axial(torch.arange(len(r))[:, None] * extent, (16,))
    plan = fr.plan(rope=rope, modulations=[fr.QueryScale(r, keys=slice(0, 100))])
    assert plan.lowered.num_buckets == 1
    assert (plan.lowered.polynomial is not None and plan.lowered.polynomial.float16 is not None) == found


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("pairs", [8, 9, 24, 33, 64])
def test_channels_hold_every_pair_once_furthest_first(pairs, pairing):
    g = generator(pairs)
    angles = uniform(g, 2, 5, pairs, low=-3.0, high=3.0).double().cpu()
    turned = torch.arange(pairs) % 3 > 0
    queries = SortedQueries(torch.arange(QUERY_TILE)[None].int(), torch.full((1, 1), -1), QUERY_TILE, QUERY_TILE)
    r = torch.linspace(0.7, 0.701, QUERY_TILE, dtype=torch.float64)[None]
    rows, scale = torch.arange(5), Scale(r, torch.ones(5, dtype=torch.bool), turned)
    found = polynomial.polynomial(scale, queries, [QUERY_TILE], angles, rows, rows, pairing, applied=False)
    columns, channels = found.columns, found.channels.flatten()
    known = columns >= 0
    assert sorted(columns[known].tolist()) == list(range(pairs))
    first = 2 * columns if pairing == "interleaved" else columns
    assert torch.equal(
        channels.view(-1, 2)[known], torch.stack([first, first + (1 if pairing == "interleaved" else pairs)], 1)[known]
    )
    share = found.share[columns[known]]
    assert torch.equal(share, share.sort(descending=True).values)
    assert share[0] == 1
    phase = found.phase.double().transpose(1, 2).flatten(2)  # (Bk, n, columns)
    spread = torch.where(turned, angles, 0.0)[..., columns[known]]
    assert torch.allclose(
        phase[..., known] * found.max_key_angle, spread - (spread.amax(1) + spread.amin(1))[:, None] / 2, atol=1e-5
    )
    assert not phase[..., ~known].any()


def test_memory_is_as_documented():
    """Keys: packed, then their channels in order; queries: the residual, and six terms of half the pairs each."""
    copies = {dim: (1 + 4 * half / dim, 1 + 12 * half / dim) for dim in range(16, 129, 2)
              if (half := polynomial.half_of(dim // 2))}  # fmt: skip
    assert max(copies.values()) == (3, 7)
    assert copies[128] == (2, 4)
    stated = "three copies of the covered keys and seven of these queries per query variant"
    assert f"{stated} (two and four at head dim 128)" in page("backends.md")


# ---- against the reference -------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("dim", [16, 34, 96, 128])
def test_head_dims(dtype, dim, sparse):
    check(by_polynomial(picture(dtype, dim=dim)[1]), "triton")


@dtypes
@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_pairings_of_applied_and_other_ropes(dtype, pairing, applied, sparse):
    g, call, _ = picture(dtype)
    rope = axial(torch.cat([grid(26, 6), grid(20, frame=1)]) if INTERPRETED else scatter(g, TOKENS), 32, pairing)
    call = replace(call, rope=rope.as_applied() if applied else rope)
    check(by_polynomial(call), "triton")


@dtypes
@pytest.mark.parametrize("axes", [None, (2,), (0, 1)])
def test_axes(dtype, axes, sparse):
    _, call, where = picture(dtype)
    scale = call.modulations[0].scale
    check(by_polynomial(replace(call, modulations=[fr.QueryScale(scale, keys=where, axes=axes)])), "triton")


@dtypes
def test_batch_of_scales_positions_and_grouped_heads(dtype, sparse):
    g, call, where = picture(dtype, batch=2, heads=2, key_heads=1)
    rope = axial(scatter(g, TOKENS, batch=2), 32)
    out, lse = check(by_polynomial(replace(call, rope=rope)), "triton")
    for b in range(2):
        row = fr.QueryScale(call.modulations[0].scale[b], keys=where, axes=(1, 2))
        one = Call(
            *(x[b : b + 1] for x in (call.q, call.k, call.v)), fr.RoPE(rope.angles[b], rope.axis), modulations=[row]
        )
        compare(by_polynomial(one), out[b : b + 1], lse[b : b + 1], "row", twin=one)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout, sparse):
    _, call, _ = picture(dtype)
    check(by_polynomial(replace(call, **{name: lay_out(getattr(call, name), layout) for name in "qkv"})), "triton")


@dtypes
@pytest.mark.parametrize("kind", ["random", "rows"])
def test_key_masks_and_what_masked_keys_hold(dtype, kind, sparse):
    g, call, _ = picture(dtype, batch=2)
    mask = key_masks(g, "random", 2, TOKENS)
    if kind == "rows":
        mask[1] = False
    clean = replace(call, key_mask=mask)
    out, lse = check(by_polynomial(clean), "triton")
    for name in "kv":
        getattr(call, name)[~mask] = float("nan")
    again = clean.run("triton")
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


@dtypes
def test_beside_every_other_modulation(dtype, sparse):
    """Weights, groups and gains, those of two rows, that each cover a part of the scaled keys and of the others."""
    g, call, where = picture(dtype, tokens=TOKENS + 3, batch=2, heads=1, low=0.8)
    start, n = where.start, call.q.shape[1]
    members = disjoint_sets(g, 2, n)
    others = [
        fr.BandWeight(uniform(g, 16, low=0.3, high=1.4), keys=slice(start - 5, start + 9)),
        fr.BiasDelta(*torch.tensor([[0.7, 1.5], [1.3, 0.8]], device=DEVICE), keys=members[0]),
        fr.BiasDelta(1.2, 0.6, keys=members[1]),
        fr.LogitGain(uniform(g, 2, n, low=-0.5, high=1.4), keys=slice(start + 4, n - 3)),
    ]  # fmt: skip
    check(by_polynomial(replace(call, modulations=[*call.modulations, *others])), "triton")


@dtypes
def test_more_signatures_than_one_launch_holds(dtype, sparse):
    g, call, _ = picture(dtype, dim=16, tokens=24, heads=1)
    call = by_polynomial(replace(call, modulations=many_signatures(g, 24, 24, 16, "distinct")))
    assert len(call.planned().lowered.passes) > 1
    check(call, "triton")


@dtypes
@pytest.mark.parametrize("applied", [(False, False), (True, False), (False, True)])
def test_scattered_keys_and_other_tokens(dtype, applied, sparse):
    """Keys that are sorted by signature, of another rope, which alone may be applied or not."""
    g = generator(5)
    q, k, v = tensors(g, batch=1, queries=TOKENS, keys=51, heads=1, dim=32, dtype=dtype)
    scale = fr.QueryScale(uniform(g, TOKENS, low=0.9), keys=torch.randperm(51, generator=g)[:30])
    ropes = axial(grid(TOKENS), 32, applied=applied[0]), axial(scatter(g, 51), 32, applied=applied[1])
    call = Call(q, k, v, *ropes, modulations=[scale])
    assert call.planned().lowered.keys.order is not None
    check(by_polynomial(call), "triton")


@dtypes
def test_buckets_beside_per_query_scales(dtype, sparse):
    g = generator(6)
    q, k, v = tensors(g, batch=1, queries=210, heads=1, dim=16, dtype=dtype)
    r = uniform(g, 210, low=0.5)
    r[torch.randperm(210, generator=g)[:140]] = 0.75
    call = Call(q, k, v, axial(grid(210), 16), modulations=[fr.QueryScale(r, keys=slice(150, None), axes=(1, 2))])
    assert call.planned().lowered.num_buckets == 1
    check(by_polynomial(call), "triton")


@dtypes
def test_the_origin_does_not_matter(dtype, sparse):
    """Positions that start at -3000: angles from the middle of the keys are as small as before."""
    g, call, _ = picture(dtype)
    positions = scatter(g, TOKENS)
    plain, shifted = (replace(call, rope=axial(x, 32)) for x in (positions, positions - 3000.0))
    compare(plain, *by_polynomial(shifted).run("triton"), "shifted", twin=shifted)


@dtypes
def test_keys_that_reach_far(dtype):
    """Angles of hundreds of radians for a tile of almost equal scales: each is turned by many periods."""
    g = generator(7)
    q, k, v = tensors(g, batch=1, queries=QUERY_TILE, keys=60, heads=1, dim=16, dtype=dtype)
    scale = fr.QueryScale(torch.linspace(0.7, 0.701, QUERY_TILE, device=DEVICE))
    ropes = (fr.RoPE.axial(scatter(g, n, extent=600.0)[:, :1], (16,)) for n in (QUERY_TILE, 60))
    call = by_polynomial(Call(q, k, v, *ropes, modulations=[scale]))
    assert call.planned().lowered.polynomial.max_key_angle > 250
    check(call, "triton")


def test_r_of_almost_zero_is_attention_without_rope_on_these_keys(sparse):
    """Per-query scales of next to nothing, against the closed form."""
    _, call, where = picture(torch.float16)
    r = torch.where(call.modulations[0].scale == 1, 1.0, torch.arange(TOKENS, device=DEVICE) * 1e-7)
    small, none = (
        replace(call, modulations=[fr.QueryScale(x, keys=where)]) for x in (r, torch.where(r == 1, 1.0, 0.0))
    )
    compare(none, *by_polynomial(small).run("triton"), "zero", twin=small)


@settings(max_examples=4 if INTERPRETED else 30)
@given(st.integers(0, 999), st.sampled_from([(1, 1), (2, 1)]), st.floats(0.0, 0.99), st.integers(14, 60))
def test_any_scales(seed, heads, low, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polynomial, "LEAST_FILLED", 0.0)
        _, call, _ = picture(
            HALVES[0], dim=16, tokens=tokens + 14, low=low, seed=seed, heads=heads[0], key_heads=heads[1]
        )
        check(by_polynomial(call), "triton")


@pytest.mark.skipif(not INTERPRETED, reason="chooses Hopper's kernel on CPU tensors")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [16, 40])
def test_through_descriptors(dim, masked, sparse, monkeypatch):
    chosen, select = [], kernels.select
    monkeypatch.setattr(kernels, "select", lambda kernel, *where: chosen.append(kernel) or select(kernel, *where))
    monkeypatch.setattr(devices, "architecture", lambda device: "sm_90")
    g, call, _ = picture(torch.float16, dim=dim, batch=2, low=0.9)
    if masked:  # and positions of each row
        call = replace(call, rope=axial(scatter(g, TOKENS, batch=2), dim), key_mask=key_masks(g, "random", 2, TOKENS))
    for kernel in ("polynomial_tma", "attention_modulated_tma"):
        with_tiles(monkeypatch, kernel, block_m=32, block_n=16)
    check(by_polynomial(call), "triton")
    assert {"polynomial_tma", "terms", "attention_modulated_tma"} <= set(chosen)


# ---- where it runs ---------------------------------------------------------------------------------------------------


def test_what_goes_through_axis_blocks(monkeypatch):
    """Float32, wide heads, scales too far apart, and a switch; explain says which."""
    _, call, where = picture(torch.float16, tokens=140)

    def how(call):
        return fr.explain(call.q, call.k, call.v, **call.tokens(), backend="triton").decision.launch.per_query

    assert "too few queries of similar scales" in how(call)
    near = fr.QueryScale(torch.linspace(0.7, 0.71, 140, device=DEVICE), keys=where)
    full = replace(call, modulations=[near])
    assert how(full) == "a polynomial, in 2 tiles of similar scales"
    assert "these through a polynomial" in str(fr.explain(full.q, full.k, full.v, **full.tokens(), backend="triton"))
    assert "axis blocks, exact (float32)" in how(full.to(torch.float32))
    wide = picture(torch.float16, dim=256, tokens=140)[1]
    assert "256 channels" in how(replace(wide, modulations=[near]))
    monkeypatch.setenv("FASTROPE_POLYNOMIAL", "0")
    assert "FASTROPE_POLYNOMIAL=0" in how(full)
    assert fr.explain(call.q, call.k, call.v, rope=call.rope, backend="triton").decision.launch.per_query is None


def test_it_is_as_exact_as_axis_blocks(sparse, monkeypatch):
    """Every query loosened against every key, in two query variants: the mean error of a polynomial that showed would
    be the larger."""
    g = generator(1)
    n = 14 * 14
    q, k, v = tensors(g, batch=1, queries=n, heads=1, dim=32, dtype=torch.float16)
    scale = fr.QueryScale(uniform(g, n, low=0.6), keys=slice(0, n))
    weight = fr.BandWeight(uniform(g, 16, low=0.6, high=1.6), keys=slice(n // 2))
    call = Call(q, k, v, axial(grid(n), 32), modulations=[scale, weight])
    exact = call.exact()[0]
    errors = []
    for switch in ("1", "0"):
        monkeypatch.setenv("FASTROPE_POLYNOMIAL", switch)
        errors.append(float((call.run("triton")[0].double() - exact).abs().mean()))
    assert errors[0] <= 1.02 * errors[1], errors
