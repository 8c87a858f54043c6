"""Attention of queries with per-query position scales, against the scaled keys, by a polynomial.

Queries come sorted by scale, so those of a tile differ little from the middle one. The middle one's scale turns the
keys, once for the whole tile; what is left for query i, the small angle ``x = (f_i - f) psi_j``, goes into a polynomial
whose terms are a factor of the query times a factor of the key (pairs as complex numbers, R = max |psi_j|)::

    <R(x) q, k>  =  sum over n of  < a_n i^n ((f_i - f) R)^n q , (psi_j / R)^n k >

so that every term is one more product of the loop's own shape. ``psi_j`` is the key's angle from the middle of all
scaled keys, ``-f`` the scale, less 1 where keys arrive rotated. The half of the pairs that reach furthest gets degree
3, the others 1. The plan makes tiles so narrow that no pair is turned wrongly by more than half a rounding of the dtype
(``fastrope/planning/polynomial.py``). In float32 the exact kernel of ``axis_blocks.py`` serves. The fused loop resumes
the running softmax.

The file is long because all of this mechanism stands in it, with one entry: a measurement may remove it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import abi
from .common import (
    BUCKET_BASE,
    FIRST_OF_VARIANT,
    LOWEST,
    SCALED,
    SEGMENT_FIELDS,
    START,
    STOP,
    VARIANT,
    load_key_bias,
    logit_map,
    sincos,
    sincos_of_product,
    softmax_step,
    store_state,
)  # fmt: skip
from .config import LaunchConfig
from .descriptors import load_block, tile
from .launch import Launch, Layout, batch_stride, launch, strides
from .tables import LOG2E, KernelTables, Polynomial

FAR, NEAR = tl.constexpr(3), tl.constexpr(1)  # degrees
TERMS = tl.constexpr(6)  # FAR + 1 of the pairs that reach furthest, then NEAR + 1 of the others
QUARTER = tl.constexpr(0.6366197723675814)  # quarter turns in a radian


@triton.jit
def coefficients(x, DEGREE: tl.constexpr):
    """``a_n`` of the polynomial nearest to ``exp(i t)`` over ``|t| <= x``, up to order x^4: Chebyshev's, whose error is
    ``x^4 / 192`` at degree 3 and ``x^2 / 4`` at degree 1. The sign of ``i^2`` is in them."""
    z = x * x
    if DEGREE == 3:
        a0, a1, a2, a3 = 1.0 - z * z / 192, 1.0 - z * z / 384, z / 24 - 0.5, z / 96 - 0.16666667
    else:
        a0, a1, a2, a3 = 1.0 - z / 4, 1.0 - z / 8, z, z
    return a0, a1, a2, a3


@triton.jit
def side_by_side(x, y, dtype: tl.constexpr):
    """Members [rows, C] of pairs as adjacent channels, [rows, 2 C]."""
    return tl.reshape(tl.join(x.to(dtype), y.to(dtype)), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def rows_of_tile(TILES, b, tile, part, tiles_batch_stride, BLOCK_M: tl.constexpr):
    """Sorted queries of a part of a tile, [BLOCK_M], and which of them there are."""
    tiles = TILES + b * tiles_batch_stride + tile
    offs_m = tl.load(tiles) + part * BLOCK_M + tl.arange(0, BLOCK_M)
    return offs_m, offs_m < tl.load(tiles + 1)


TERMS_COUNTS = (
    "num_tiles", "num_segments", "num_queries", "num_variants", "num_per_query", "heads", "tiles_batch_stride",
    "middle_batch_stride", "sorted_batch_stride", "factor_batch_stride", "origin_batch_stride", "interleaved",
)  # fmt: skip


@triton.jit(do_not_specialize=TERMS_COUNTS)
def terms_kernel(
    Q, RESIDUAL, OUT, SEGMENTS, TILES, MIDDLE, SORTED_QUERIES, FACTOR, ORIGIN, SHARE, COLUMNS,
    stride_qb, stride_qh, stride_qv, stride_qs, stride_qd,
    num_tiles, num_segments, num_queries, num_variants, num_per_query, heads, tiles_batch_stride, middle_batch_stride,
    sorted_batch_stride, factor_batch_stride, origin_batch_stride, interleaved, max_key_angle,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, QUERY_TILE: tl.constexpr,
):  # fmt: skip
    """OUT[b, h, variant, row, n] = a_n i^n ((f_i - f) R)^n R(f_i origin) q, of the variants of scaled segments."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = 2 * BLOCK_P
    PARTS: tl.constexpr = QUERY_TILE // BLOCK_M
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS % num_tiles
    bh = tl.program_id(0) // (PARTS * num_tiles)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    offs_m, row_mask = rows_of_tile(TILES, b, tile, part, tiles_batch_stride, BLOCK_M)
    rows = tl.load(SORTED_QUERIES + b * sorted_batch_stride + offs_m, mask=row_mask, other=0)
    factors = FACTOR + b * factor_batch_stride + rows
    factor = tl.load(factors, mask=row_mask, other=0.0)
    factor_low = tl.load(factors + num_queries, mask=row_mask, other=0.0)
    middles = MIDDLE + b * middle_batch_stride + 2 * tile
    delta = ((factor - tl.load(middles)) + factor_low) * max_key_angle
    half_width = tl.load(middles + 1) * max_key_angle
    d = delta[:, None]
    dtype: tl.constexpr = OUT.dtype.element_ty
    for s in range(num_segments):
        row = SEGMENTS + s * SEGMENT_FIELDS
        variant = tl.load(row + VARIANT).to(tl.int64)
        wanted = (tl.load(row + SCALED) != 0) & (tl.load(row + FIRST_OF_VARIANT) != 0)
        mask = tl.where(wanted, row_mask, False)[:, None]
        q_rows = Q + b * stride_qb + h * stride_qh + variant * stride_qv + offs_m.to(tl.int64)[:, None] * stride_qs
        at = ((bh.to(tl.int64) * num_variants + variant) * num_per_query + offs_m)[:, None]
        residual_rows = RESIDUAL + at * HEAD_DIM
        out = OUT + at * (TERMS * WIDTH) + tl.arange(0, WIDTH)[None, :]
        for near in tl.static_range(2):
            pair = tl.load(COLUMNS + near * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
            known = pair >= 0
            first = tl.where(interleaved != 0, 2 * pair, pair)
            second = tl.where(interleaved != 0, 2 * pair + 1, pair + PAIRS)
            x = tl.load(q_rows + first * stride_qd, mask=mask & known, other=0.0).to(tl.float32)
            y = tl.load(q_rows + second * stride_qd, mask=mask & known, other=0.0).to(tl.float32)
            x += tl.load(residual_rows + first, mask=mask & known, other=0.0).to(tl.float32)
            y += tl.load(residual_rows + second, mask=mask & known, other=0.0).to(tl.float32)
            origin = ORIGIN + b * origin_batch_stride + pair
            sin, cos = sincos_of_product(
                factor[:, None], factor_low[:, None],
                tl.load(origin, mask=known, other=0.0), tl.load(origin + PAIRS, mask=known, other=0.0),
            )  # fmt: skip
            x, y = x * cos - y * sin, y * cos + x * sin
            a0, a1, a2, a3 = coefficients(
                half_width * tl.load(SHARE + pair, mask=known, other=0.0), NEAR if near else FAR
            )
            term = out + near * (FAR + 1) * WIDTH
            tl.store(term, side_by_side(x * a0, y * a0, dtype), mask=mask)
            x, y = -y * d, x * d
            tl.store(term + WIDTH, side_by_side(x * a1, y * a1, dtype), mask=mask)
            if near == 0:  # the sign of i^2 is in the coefficients
                x, y = y * d, -x * d
                tl.store(term + 2 * WIDTH, side_by_side(x * a2, y * a2, dtype), mask=mask)
                x, y = -y * d, x * d
                tl.store(term + 3 * WIDTH, side_by_side(x * a3, y * a3, dtype), mask=mask)


@triton.jit
def load_term(Q, offs_m, row_mask, TERM: tl.constexpr, WIDTH: tl.constexpr):
    """Query factors of one term, [M, WIDTH]."""
    ptrs = Q + offs_m[:, None] * (TERMS * WIDTH) + (TERM * WIDTH + tl.arange(0, WIDTH))[None, :]
    return tl.load(ptrs, mask=row_mask[:, None], other=0.0)


@triton.jit
def add_scores(qk, q0, q1, q2, q3, k, phase, turn, DEGREE: tl.constexpr):
    """qk [M, N] plus the scores of some pairs: of the query factors and the keys k [N, 2 C], turned back by
    turn * phase [N, C] and times powers of phase."""
    dtype: tl.constexpr = k.dtype
    x, y = tl.split(tl.reshape(k.to(tl.float32), (k.shape[0], phase.shape[1], 2)))
    sin, cos = sincos(turn * phase)
    x, y = x * cos + y * sin, y * cos - x * sin
    qk = tl.dot(q0, tl.trans(side_by_side(x, y, dtype)), qk)
    x, y = x * phase, y * phase
    qk = tl.dot(q1, tl.trans(side_by_side(x, y, dtype)), qk)
    if DEGREE == 3:
        x, y = x * phase, y * phase
        qk = tl.dot(q2, tl.trans(side_by_side(x, y, dtype)), qk)
        x, y = x * phase, y * phase
        qk = tl.dot(q3, tl.trans(side_by_side(x, y, dtype)), qk)
    return qk


POLYNOMIAL_COUNTS = (
    "num_tiles", "num_segments", "num_queries", "num_variants", "num_rows", "num_keys", "num_scaled", "num_per_query",
    "heads", "key_heads", "phase_rows", "tiles_batch_stride", "middle_batch_stride", "sorted_batch_stride",
    "groups_batch_stride", "gains_batch_stride", "biases_batch_stride", "key_bias_batch_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=POLYNOMIAL_COUNTS)
def polynomial_kernel(
    Q, K, V, PHASE, STATE, STATE_M, STATE_L, SEGMENTS, TILES, MIDDLE, SORTED_QUERIES, BIAS, GROUPS, GAINS,
    LOGIT_BIASES, KEY_BIAS,
    stride_vb, stride_vh, stride_vs, stride_vd,
    num_tiles, num_segments, num_queries, num_variants, num_rows, num_keys, num_scaled, num_per_query, heads, key_heads,
    phase_rows, tiles_batch_stride, middle_batch_stride, sorted_batch_stride, groups_batch_stride, gains_batch_stride,
    biases_batch_stride, key_bias_batch_stride, max_key_angle, log2_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, QUERY_TILE: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of queries with per-query scales of one head against all scaled segments."""
    WIDTH: tl.constexpr = 2 * BLOCK_P
    PARTS: tl.constexpr = QUERY_TILE // BLOCK_M
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS % num_tiles
    bh = tl.program_id(0) // (PARTS * num_tiles)
    b = (bh // heads).to(tl.int64)
    kv_head = bh % heads // (heads // key_heads)
    offs_m, row_mask = rows_of_tile(TILES, b, tile, part, tiles_batch_stride, BLOCK_M)
    rows = tl.load(SORTED_QUERIES + b * sorted_batch_stride + offs_m, mask=row_mask, other=0)
    turn = tl.load(MIDDLE + b * middle_batch_stride + 2 * tile) * max_key_angle * QUARTER
    # The pairs that reach furthest and the others lie apart, like heads of their own.
    far, near, phase_row = 2 * kv_head, 2 * kv_head + 1, tl.where(phase_rows > 1, b, 0)
    if TMA:
        k_far, k_near, phase_far, phase_near, v_head = K, K, PHASE, PHASE, V
    else:
        k_far = K + (b * 2 * key_heads + far) * num_scaled * WIDTH
        k_near = k_far + num_scaled.to(tl.int64) * WIDTH
        phase_far = PHASE + 2 * phase_row * num_scaled * BLOCK_P
        phase_near = phase_far + num_scaled.to(tl.int64) * BLOCK_P
        v_head = V + b * stride_vb + kv_head.to(tl.int64) * stride_vh
    b32, phase_row = b.to(tl.int32), phase_row.to(tl.int32)
    key_biases = KEY_BIAS
    if HAS_KEY_BIAS:
        key_biases = KEY_BIAS + b * key_bias_batch_stride
    offs_n = tl.arange(0, BLOCK_N)
    m_i = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for s in range(num_segments):
        row = SEGMENTS + s * SEGMENT_FIELDS
        start = tl.load(row + START)
        met = (tl.load(row + SCALED) != 0) & (tl.max(row_mask.to(tl.int32)) > 0)
        stop = tl.where(met, tl.load(row + STOP), start)
        shift = tl.load(row + BUCKET_BASE) - (num_keys - num_scaled) - start  # K holds scaled keys alone, in order
        bias_rows = (bh.to(tl.int64) * num_segments + s) * num_rows + offs_m
        row_scale, row_bias = logit_map(
            row, rows, row_mask, BIAS, bias_rows, GROUPS + b * groups_batch_stride, GAINS + b * gains_batch_stride,
            LOGIT_BIASES + b * biases_batch_stride, num_queries, log2_scale,
        )  # fmt: skip
        terms = Q + (bh.to(tl.int64) * num_variants + tl.load(row + VARIANT)) * num_per_query * (TERMS * WIDTH)
        q0 = load_term(terms, offs_m, row_mask, 0, WIDTH)
        q1 = load_term(terms, offs_m, row_mask, 1, WIDTH)
        q2 = load_term(terms, offs_m, row_mask, 2, WIDTH)
        q3 = load_term(terms, offs_m, row_mask, 3, WIDTH)
        q4 = load_term(terms, offs_m, row_mask, 4, WIDTH)
        q5 = load_term(terms, offs_m, row_mask, 5, WIDTH)
        for start_n in tl.range(start, stop, BLOCK_N, disable_licm=True):  # moved out of the loop, constants spill
            at = start_n + shift
            valid = offs_n < stop - start_n
            if HAS_KEY_BIAS:
                key_bias = load_key_bias(key_biases, start_n + offs_n, valid)
                valid = key_bias > -float("inf")
            k = load_block(k_near, b32, near, at, offs_n, valid, WIDTH, 1, WIDTH, WIDTH, BLOCK_N, TMA)
            phase = load_block(phase_near, phase_row, 1, at, offs_n, valid, BLOCK_P, 1, BLOCK_P, BLOCK_P, BLOCK_N, TMA)
            qk = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            qk = add_scores(qk, q4, q5, q5, q5, k, phase, turn, NEAR)
            k = load_block(k_far, b32, far, at, offs_n, valid, WIDTH, 1, WIDTH, WIDTH, BLOCK_N, TMA)
            phase = load_block(phase_far, phase_row, 0, at, offs_n, valid, BLOCK_P, 1, BLOCK_P, BLOCK_P, BLOCK_N, TMA)
            qk = add_scores(qk, q0, q1, q2, q3, k, phase, turn, FAR)
            qk = qk * row_scale[:, None] + row_bias[:, None]
            if HAS_KEY_BIAS:
                qk += key_bias[None, :]
            qk = tl.where(valid[None, :], qk, -float("inf"))
            p, alpha, m_i, l_i = softmax_step(qk, m_i, l_i)
            acc = acc * alpha[:, None]
            # Rows beyond the tile load as zeros: 0 x NaN of what lies behind the buffer would poison the sum.
            v = load_block(
                v_head, b32, kv_head, start_n, offs_n, valid, stride_vs, stride_vd, HEAD_DIM, BLOCK_D, BLOCK_N, TMA
            )
            acc = tl.dot(p.to(v.dtype), v, acc)

    state = bh.to(tl.int64) * num_per_query + offs_m
    store_state(STATE, STATE_M, STATE_L, acc, m_i, l_i, state, row_mask, HEAD_DIM, BLOCK_D)


def polynomial_attention(
    queries: torch.Tensor,
    residual: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    interleaved: bool,
    key_bias: torch.Tensor | None,
    tables: KernelTables,
    bias: torch.Tensor,
    polynomial: Polynomial,
    num_queries: int,
    scale: float,
    config: LaunchConfig,
    terms_config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Online softmax of queries with per-query scales over the scaled segments, 16-bit inputs.

    Args:
        queries, residual: ``(B, H, variants, N, D)`` and ``(B, H, variants, C, D)`` of :func:`prepare_queries`.
        k: ``(B, 2 Hkv, n, 2 P)`` contiguous: the scaled keys in key order as adjacent members of the P pairs that reach
            furthest, then of the P others, as heads of their own; to be turned by ``-factor`` times their angle.
        v: ``(B, Hkv, Sk, D)``; any strides, unless ``config.tma``.
        interleaved, key_bias, tables, bias, scale: as in :func:`fused_attention`.
        polynomial: the plan's tables, with tiles for the dtype of ``queries``.
        num_queries: ``Sq``.

    Returns:
        as :func:`axis_block_attention`.
    """
    batch, heads, variants, _, dim = queries.shape
    t, p, tiles = tables, polynomial, polynomial.tiles(queries.dtype)
    terms = queries.new_empty((batch, heads, variants, t.num_per_query, TERMS.value * k.shape[3]))
    tensors = {
        "Q": queries, "RESIDUAL": residual, "OUT": terms, "SEGMENTS": t.segments, "TILES": tiles.bounds,
        "MIDDLE": tiles.middle, "SORTED_QUERIES": t.sorted_queries, "FACTOR": p.factor, "ORIGIN": p.origin,
        "SHARE": p.share, "COLUMNS": p.columns,
    }  # fmt: skip
    launch(_terms, tensors, num_queries, p.max_key_angle, interleaved, terms_config)
    shape = batch, heads, t.num_per_query
    acc = torch.empty((*shape, dim), dtype=torch.float32, device=queries.device)
    m, l_sum = (torch.empty(shape, dtype=torch.float32, device=queries.device) for _ in range(2))
    tensors = {
        "Q": terms, "K": k, "V": v, "PHASE": p.phase, "STATE": acc, "STATE_M": m, "STATE_L": l_sum,
        "SEGMENTS": t.segments, "TILES": tiles.bounds, "MIDDLE": tiles.middle, "SORTED_QUERIES": t.sorted_queries,
        "BIAS": bias, "GROUPS": t.groups, "GAINS": t.gains, "LOGIT_BIASES": t.biases,
        "KEY_BIAS": key_bias,
    }  # fmt: skip
    launch(_polynomial, tensors, num_queries, p.max_key_angle, scale, config)
    return acc, m, l_sum


def _of_tiles(
    at: dict[str, Layout | None], num_queries: int, max_key_angle: float, config: LaunchConfig
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments that both kernels have."""
    (batch, heads, variants), tiles = at["Q"].shape[:3], at["TILES"].shape[1] - 1
    grid = (tiles * (abi.QUERY_TILE // config.block_m) * batch * heads,)
    return grid, dict(
        num_tiles=tiles, num_segments=at["SEGMENTS"].shape[0], num_queries=num_queries, num_variants=variants,
        heads=heads, tiles_batch_stride=batch_stride(at["TILES"]), middle_batch_stride=batch_stride(at["MIDDLE"]),
        sorted_batch_stride=batch_stride(at["SORTED_QUERIES"]), max_key_angle=max_key_angle, BLOCK_M=config.block_m,
        QUERY_TILE=abi.QUERY_TILE, **config.options,
    )  # fmt: skip


def _terms(
    at: dict[str, Layout], num_queries: int, max_key_angle: float, interleaved: bool, config: LaunchConfig
) -> Launch:
    grid, shared = _of_tiles(at, num_queries, max_key_angle, config)
    arguments = dict(
        **shared, **strides("q", at["Q"], "bhvsd"), num_per_query=at["OUT"].shape[3],
        factor_batch_stride=batch_stride(at["FACTOR"]), origin_batch_stride=batch_stride(at["ORIGIN"]),
        interleaved=int(interleaved), HEAD_DIM=at["Q"].shape[4], BLOCK_P=at["OUT"].shape[4] // (2 * TERMS.value),
    )  # fmt: skip
    return Launch(terms_kernel, grid, arguments)


def _polynomial(
    at: dict[str, Layout | None], num_queries: int, max_key_angle: float, scale: float, config: LaunchConfig
) -> Launch:
    grid, shared = _of_tiles(at, num_queries, max_key_angle, config)
    keys, values, phase, key_bias = (at[name] for name in ("K", "V", "PHASE", "KEY_BIAS"))
    arguments = dict(
        **shared, **strides("v", values, "bhsd"), num_rows=at["BIAS"].shape[3], num_keys=values.shape[2],
        num_scaled=keys.shape[2], num_per_query=at["STATE_M"].shape[2], key_heads=values.shape[1],
        phase_rows=phase.shape[0], groups_batch_stride=batch_stride(at["GROUPS"]),
        gains_batch_stride=batch_stride(at["GAINS"]), biases_batch_stride=batch_stride(at["LOGIT_BIASES"]),
        key_bias_batch_stride=batch_stride(key_bias), log2_scale=scale * LOG2E,
        HEAD_DIM=values.shape[3], BLOCK_D=config.block_d, BLOCK_N=config.block_n, BLOCK_P=keys.shape[3] // 2,
        HAS_KEY_BIAS=key_bias is not None, TMA=config.tma,
    )  # fmt: skip
    channels = {"K": keys.shape[3], "PHASE": keys.shape[3] // 2, "V": config.block_d}
    tiles = {name: tile(at[name], config.block_n, n) for name, n in channels.items()} if config.tma else {}
    return Launch(
        polynomial_kernel,
        grid,
        arguments,
        dict.fromkeys(("GROUPS", "GAINS", "LOGIT_BIASES", "KEY_BIAS"), "STATE_M"),
        tiles,
    )
