"""Exact attention of queries with per-query position scales, against the scaled keys.

The score of a scaled pair is ``<R((1 - r_i) phi_j) R(r_i phi_i) q_i, R(phi_j) k_j>``. On a grid many keys share
``phi_j`` on an axis, so a query is turned once per coordinate and not once per key. An axis block holds 8 x 8 keys.
Those of a row share the angles of pair class A, those of a column those of class B, all of them those of class C, and

    s[u, v] = <q_A turned for row u, k_A> + <q_B turned for column v, k_B> + <q_C turned for the block, k_C>

is two batched products and a plain one. The fused loop resumes the running softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import abi
from .common import (
    FIRST_BLOCK,
    LAST_BLOCK,
    LOWEST,
    SEGMENT_FIELDS,
    WEIGHT,
    load_key_bias,
    logit_map,
    sincos_of_product,
    softmax_step,
    store_state,
    when,
)  # fmt: skip
from .config import LaunchConfig
from .launch import Launch, Layout, batch_stride, launch, strides
from .tables import LOG2E, AxisBlocks, KernelTables

AXIS_BLOCK = tl.constexpr(abi.AXIS_BLOCK)
CHUNK = tl.constexpr(abi.PAIR_CHUNK)


@triton.jit
def load_pairs(X, rows, mask, pair, stride_s, stride_d, interleaved, PAIRS: tl.constexpr):
    """Both members of some pairs of some rows; rows, mask and pair broadcast to the shape returned. Offsets inside a
    head are int32."""
    first = tl.where(interleaved != 0, 2 * pair, pair)
    second = tl.where(interleaved != 0, 2 * pair + 1, pair + PAIRS)
    x = tl.load(X + (rows * stride_s + first * stride_d), mask=mask, other=0.0)
    y = tl.load(X + (rows * stride_s + second * stride_d), mask=mask, other=0.0)
    return x, y


@triton.jit
def query_pairs(
    Q, COS, SIN, WEIGHTS, rows, row_mask, pair, weight, stride_s, stride_d, interleaved, PAIRS: tl.constexpr
):
    """Query pairs at their own scale times the segment's weights: [M, CHUNK] float32 each; pair -1 is zero."""
    mask = row_mask[:, None] & (pair >= 0)[None, :]
    x, y = load_pairs(Q, rows[:, None], mask, pair[None, :], stride_s, stride_d, interleaved, PAIRS)
    x, y = x.to(tl.float32), y.to(tl.float32)
    table = rows[:, None] * PAIRS + pair[None, :]
    cos = tl.load(COS + table, mask=mask, other=1.0)
    sin = tl.load(SIN + table, mask=mask, other=0.0)
    w = tl.load(WEIGHTS + weight * PAIRS + pair, mask=when(weight >= 0, pair >= 0), other=1.0)[None, :]
    return (x * cos - y * sin) * w, (y * cos + x * sin) * w


@triton.jit
def key_turns(KEY_PHASE, keys, mask, pair, phase_low, PAIRS: tl.constexpr):
    """Leading and trailing part of the phases of some pairs of some keys, in quarter turns; keys, mask and pair
    broadcast to the shape returned."""
    ptrs = KEY_PHASE + (keys * PAIRS + pair)
    return tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + phase_low, mask=mask, other=0.0)


@triton.jit
def turned_product(
    s, Q, COS, SIN, WEIGHTS, rows, row_mask, factor, factor_low, weight, stride_qs, stride_qd,
    K, KEY_PHASE, phase_low, representatives, keys, present, stride_ks, stride_kd,
    COLUMNS, num_columns, interleaved, PAIRS: tl.constexpr,
):  # fmt: skip
    """Add one pair class's scores of a block to s [U, M, N]: queries turned once per representative, times U x N keys.

    representatives: [U] keys that stand for the coordinates; keys, present: [U, N].
    """
    for c in range(0, num_columns, CHUNK):
        pair = tl.load(COLUMNS + c + tl.arange(0, CHUNK))
        x, y = query_pairs(Q, COS, SIN, WEIGHTS, rows, row_mask, pair, weight, stride_qs, stride_qd, interleaved, PAIRS)
        phase, low = key_turns(
            KEY_PHASE, representatives[:, None], (pair >= 0)[None, :], pair[None, :], phase_low, PAIRS
        )  # [U, C]
        sin, cos = sincos_of_product(
            factor[None, :, None], factor_low[None, :, None], phase[:, None, :], low[:, None, :]
        )  # [U, M, C]
        turned_x = (x[None, :, :] * cos - y[None, :, :] * sin).to(K.dtype.element_ty)
        turned_y = (y[None, :, :] * cos + x[None, :, :] * sin).to(K.dtype.element_ty)
        mask = present[:, None, :] & (pair >= 0)[None, :, None]
        k_x, k_y = load_pairs(
            K, keys[:, None, :], mask, pair[None, :, None], stride_ks, stride_kd, interleaved, PAIRS
        )  # [U, C, N]
        s = tl.dot(turned_x, k_x, s, input_precision="ieee")
        s = tl.dot(turned_y, k_y, s, input_precision="ieee")
    return s


@triton.jit
def whole_block_product(
    qk, Q, COS, SIN, WEIGHTS, rows, row_mask, factor, factor_low, weight, stride_qs, stride_qd,
    K, KEY_PHASE, phase_low, representative, keys, present, stride_ks, stride_kd,
    COLUMNS, num_columns, interleaved, PAIRS: tl.constexpr,
):  # fmt: skip
    """Add the scores of the pairs whose angles a whole block shares to qk [M, KEYS]: queries turned once.

    keys, present: [KEYS]. The class also holds the pairs no scale covers: their phases are zero.
    """
    for c in range(0, num_columns, CHUNK):
        pair = tl.load(COLUMNS + c + tl.arange(0, CHUNK))
        x, y = query_pairs(Q, COS, SIN, WEIGHTS, rows, row_mask, pair, weight, stride_qs, stride_qd, interleaved, PAIRS)
        phase, low = key_turns(KEY_PHASE, representative, pair >= 0, pair, phase_low, PAIRS)
        sin, cos = sincos_of_product(factor[:, None], factor_low[:, None], phase[None, :], low[None, :])  # [M, C]
        mask = (pair >= 0)[:, None] & present[None, :]
        k_x, k_y = load_pairs(
            K, keys[None, :], mask, pair[:, None], stride_ks, stride_kd, interleaved, PAIRS
        )  # [C, KEYS]
        qk = tl.dot((x * cos - y * sin).to(k_x.dtype), k_x, qk, input_precision="ieee")
        qk = tl.dot((y * cos + x * sin).to(k_y.dtype), k_y, qk, input_precision="ieee")
    return qk


@triton.jit
def weigh_values(
    acc, p, V, keys, present, stride_vs, stride_vd,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """acc += p V over the keys of a block, ROWS of its rows at a time (in float32 a product holds all its operands in
    registers). p: [M, AXIS_BLOCK * AXIS_BLOCK]; keys, present: [AXIS_BLOCK, AXIS_BLOCK]."""
    BLOCK_M: tl.constexpr = p.shape[0]
    STEPS: tl.constexpr = AXIS_BLOCK // ROWS
    offs_d = tl.arange(0, BLOCK_D)
    step = tl.arange(0, STEPS)
    for i in range(STEPS):
        chosen = step == i
        p_i, key, here = (
            p,
            tl.reshape(keys, (AXIS_BLOCK * AXIS_BLOCK,)),
            tl.reshape(present, (AXIS_BLOCK * AXIS_BLOCK,)),
        )
        if STEPS > 1:
            p_i = tl.sum(tl.where(chosen[None, :, None], tl.reshape(p, (BLOCK_M, STEPS, ROWS * AXIS_BLOCK)), 0.0), 1)
            key = tl.sum(tl.where(chosen[:, None], tl.reshape(keys, (STEPS, ROWS * AXIS_BLOCK)), 0), 0)
            found = tl.where(chosen[:, None], tl.reshape(present.to(tl.int32), (STEPS, ROWS * AXIS_BLOCK)), 0)
            here = tl.sum(found, 0) != 0
        mask = here[:, None] & (offs_d < HEAD_DIM)[None, :]
        v = tl.load(V + (key[:, None] * stride_vs + offs_d[None, :] * stride_vd), mask=mask, other=0.0)
        acc = tl.dot(p_i.to(v.dtype), v, acc, input_precision="ieee")
    return acc


AXIS_BLOCK_COUNTS = (
    "num_segments", "num_queries", "num_sorted", "heads", "key_heads", "num_per_query", "columns_a", "columns_b",
    "columns_c", "cos_batch_stride", "phase_batch_stride", "phase_low", "factor_batch_stride", "groups_batch_stride",
    "gains_batch_stride", "biases_batch_stride", "key_bias_batch_stride", "sorted_batch_stride", "bucket_batch_stride",
    "interleaved",
)  # fmt: skip


@triton.jit(do_not_specialize=AXIS_BLOCK_COUNTS)
def axis_block_kernel(
    Q, K, V, STATE, STATE_M, STATE_L,
    SEGMENTS, BLOCK_KEYS, BLOCK_A, BLOCK_B, BLOCK_C, COLUMNS_A, COLUMNS_B, COLUMNS_C,
    QUERY_COS, QUERY_SIN, KEY_PHASE, FACTOR,
    WEIGHTS, BIAS, GROUPS, GAINS, LOGIT_BIASES, KEY_BIAS, SORTED_QUERIES, TILE_BUCKET,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    num_segments, num_queries, num_sorted, heads, key_heads, num_per_query, columns_a, columns_b, columns_c,
    cos_batch_stride, phase_batch_stride, phase_low, factor_batch_stride,
    groups_batch_stride, gains_batch_stride, biases_batch_stride, key_bias_batch_stride, sorted_batch_stride,
    bucket_batch_stride, interleaved,
    log2_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    QUERY_TILE: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
):  # fmt: skip
    """One tile of queries with per-query scales of one head against the axis blocks of all scaled segments."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    KEYS: tl.constexpr = AXIS_BLOCK * AXIS_BLOCK
    num_tiles = num_per_query // BLOCK_M
    tile = tl.program_id(0) % num_tiles
    bh = tl.program_id(0) // num_tiles
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    kv_head = (h // (heads // key_heads)).to(tl.int64)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(SORTED_QUERIES + b * sorted_batch_stride + offs_m)
    bucket = tl.load(TILE_BUCKET + b * bucket_batch_stride + tile * BLOCK_M // QUERY_TILE)
    row_mask = when(bucket < 0, rows >= 0)
    q_base = Q + b * stride_qb + h.to(tl.int64) * stride_qh
    k_base = K + b * stride_kb + kv_head * stride_kh
    v_base = V + b * stride_vb + kv_head * stride_vh
    cos, sin = QUERY_COS + b * cos_batch_stride, QUERY_SIN + b * cos_batch_stride
    key_phase = KEY_PHASE + b * phase_batch_stride
    factor = tl.load(FACTOR + b * factor_batch_stride + rows, mask=row_mask, other=0.0)
    factor_low = tl.load(FACTOR + b * factor_batch_stride + num_queries + rows, mask=row_mask, other=0.0)
    offs_u = tl.arange(0, AXIS_BLOCK)

    m_i = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for s in range(num_segments):
        row = SEGMENTS + s * SEGMENT_FIELDS
        first_block = tl.load(row + FIRST_BLOCK)
        last_block = tl.where(tl.max(rows) >= 0, tl.load(row + LAST_BLOCK), first_block)
        weight = tl.load(row + WEIGHT)
        bias_rows = (bh.to(tl.int64) * num_segments + s) * num_sorted + offs_m
        row_scale, row_bias = logit_map(
            row, rows, row_mask, BIAS, bias_rows, GROUPS + b * groups_batch_stride, GAINS + b * gains_batch_stride,
            LOGIT_BIASES + b * biases_batch_stride, num_queries, log2_scale,
        )  # fmt: skip
        for block in range(first_block, last_block):
            keys = tl.load(BLOCK_KEYS + block * KEYS + offs_u[:, None] * AXIS_BLOCK + offs_u[None, :])  # [U, N]
            present = keys >= 0
            if HAS_KEY_BIAS:
                key_bias = load_key_bias(KEY_BIAS + b * key_bias_batch_stride, keys, present)
                present = key_bias > -float("inf")
            across = turned_product(
                tl.zeros([AXIS_BLOCK, BLOCK_M, AXIS_BLOCK], dtype=tl.float32),
                q_base, cos, sin, WEIGHTS, rows, row_mask, factor, factor_low, weight, stride_qs, stride_qd,
                k_base, key_phase, phase_low, tl.load(BLOCK_B + block * AXIS_BLOCK + offs_u), tl.trans(keys),
                tl.trans(present), stride_ks, stride_kd, COLUMNS_B, columns_b, interleaved, PAIRS,
            )  # [N, M, U]  # fmt: skip
            qk = turned_product(
                tl.permute(across, (2, 1, 0)),
                q_base, cos, sin, WEIGHTS, rows, row_mask, factor, factor_low, weight, stride_qs, stride_qd,
                k_base, key_phase, phase_low, tl.load(BLOCK_A + block * AXIS_BLOCK + offs_u), keys, present,
                stride_ks, stride_kd, COLUMNS_A, columns_a, interleaved, PAIRS,
            )  # [U, M, N]  # fmt: skip
            qk = tl.reshape(tl.permute(qk, (1, 0, 2)), (BLOCK_M, KEYS))

            flat = tl.reshape(present, (KEYS,))
            qk = whole_block_product(
                qk, q_base, cos, sin, WEIGHTS, rows, row_mask, factor, factor_low, weight, stride_qs, stride_qd,
                k_base, key_phase, phase_low, tl.load(BLOCK_C + block).to(tl.int64), tl.reshape(keys, (KEYS,)), flat,
                stride_ks, stride_kd, COLUMNS_C, columns_c, interleaved, PAIRS,
            )  # fmt: skip
            qk = qk * row_scale[:, None] + row_bias[:, None]
            if HAS_KEY_BIAS:
                qk += tl.reshape(key_bias, (KEYS,))[None, :]
            qk = tl.where(flat[None, :], qk, -float("inf"))
            p, alpha, m_i, l_i = softmax_step(qk, m_i, l_i)
            acc = weigh_values(
                acc * alpha[:, None], p, V=v_base, keys=keys, present=present, stride_vs=stride_vs, stride_vd=stride_vd,
                HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, ROWS=BLOCK_N // AXIS_BLOCK,
            )  # fmt: skip

    state = bh.to(tl.int64) * num_per_query + offs_m
    store_state(STATE, STATE_M, STATE_L, acc, m_i, l_i, state, row_mask, HEAD_DIM, BLOCK_D)


def axis_block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    interleaved: bool,
    key_bias: torch.Tensor | None,
    tables: KernelTables,
    bias: torch.Tensor,
    blocks: AxisBlocks,
    scale: float,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Online softmax of queries with per-query scales over the scaled segments.

    Args:
        q: ``(B, Sq, H, D)`` as the caller has it, any strides.
        k: ``(B, Hkv, R, D)`` rotated at r = 1 in its first Sk rows; v: ``(B, Hkv, Sk, D)``. Any strides.
        rotation: cos and sin ``(Bx, 2, Sq, D/2)`` float32; variant 1 brings q to its per-query scale.
        interleaved, key_bias, tables, bias, scale: as in :func:`fused_attention`.
        blocks: the scaled keys.

    Returns:
        ``acc (B, H, C, D)``, ``m`` and ``l (B, H, C)``, float32: unnormalised output, running maximum (base 2), sum.
    """
    batch, _, heads, dim = q.shape
    t, shape = tables, (batch, heads, tables.num_per_query)
    acc = torch.empty((*shape, dim), dtype=torch.float32, device=q.device)
    m, l_sum = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    cos, sin = (x[:, 1] for x in rotation)
    tensors = {
        "Q": q, "K": k, "V": v, "STATE": acc, "STATE_M": m, "STATE_L": l_sum, "SEGMENTS": t.segments,
        "BLOCK_KEYS": blocks.keys, "BLOCK_A": blocks.rows_a, "BLOCK_B": blocks.rows_b, "BLOCK_C": blocks.rows_c,
        "COLUMNS_A": blocks.pairs_a, "COLUMNS_B": blocks.pairs_b, "COLUMNS_C": blocks.pairs_c, "QUERY_COS": cos,
        "QUERY_SIN": sin, "KEY_PHASE": blocks.phase, "FACTOR": blocks.factor, "WEIGHTS": t.weights, "BIAS": bias,
        "GROUPS": t.groups,
        "GAINS": t.gains, "LOGIT_BIASES": t.biases, "KEY_BIAS": key_bias,
        "SORTED_QUERIES": t.sorted_queries, "TILE_BUCKET": t.tile_bucket,
    }  # fmt: skip
    launch(_axis_blocks, tensors, interleaved, scale, config)
    return acc, m, l_sum


def _axis_blocks(at: dict[str, Layout | None], interleaved: bool, scale: float, config: LaunchConfig) -> Launch:
    (batch, num_queries, heads, dim), count = at["Q"].shape, at["STATE_M"].shape[2]
    columns = {f"columns_{x}": at[f"COLUMNS_{x.upper()}"].shape[0] for x in "abc"}
    batches = {
        f"{name}_batch_stride": batch_stride(at[table])
        for name, table in (
            ("cos", "QUERY_COS"), ("phase", "KEY_PHASE"), ("factor", "FACTOR"), ("groups", "GROUPS"),
            ("gains", "GAINS"), ("biases", "LOGIT_BIASES"), ("key_bias", "KEY_BIAS"),
            ("sorted", "SORTED_QUERIES"), ("bucket", "TILE_BUCKET"),
        )
    }  # fmt: skip
    arguments = dict(
        **strides("q", at["Q"], "bshd"), **strides("k", at["K"], "bhsd"), **strides("v", at["V"], "bhsd"), **columns,
        **batches, num_segments=at["SEGMENTS"].shape[0], num_queries=num_queries,
        num_sorted=at["SORTED_QUERIES"].shape[1], heads=heads, key_heads=at["K"].shape[1], num_per_query=count,
        phase_low=at["KEY_PHASE"].strides[1], interleaved=int(interleaved), log2_scale=scale * LOG2E,
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        QUERY_TILE=abi.QUERY_TILE, HAS_KEY_BIAS=at["KEY_BIAS"] is not None,
        **config.options,
    )  # fmt: skip
    stand_ins = dict.fromkeys(("WEIGHTS", "GROUPS", "GAINS", "LOGIT_BIASES", "KEY_BIAS"), "STATE_M")
    return Launch(axis_block_kernel, (count // config.block_m * batch * heads,), arguments, stand_ins)
