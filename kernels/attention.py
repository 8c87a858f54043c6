"""The fused loop: modulated attention over segments of keys, one launch.

What covers a segment never enters the loop over keys. It is a query tile (prepared once: rotated for the segment, times
its band weights), a row of the packed keys to start from, and an affine map of the logits (row factor ``delta g``, row
bias ``(lambda - delta) g <w q, mu> + b``); the loop body is that of plain attention. A mask and key biases are one
number per key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import abi
from .common import (
    BUCKET_BASE,
    LN2,
    LOWEST,
    SCALED,
    SEGMENT_FIELDS,
    START,
    STOP,
    VARIANT,
    load_key_bias,
    load_tile,
    logit_map,
    softmax_step,
    when,
)  # fmt: skip
from .config import LaunchConfig
from .descriptors import load_block, tile
from .launch import Launch, Layout, batch_stride, launch, strides
from .tables import LOG2E, KernelTables


@triton.jit
def attend(
    acc, l_i, m_i, q, row_scale, row_bias,
    K, V, KEY_BIAS, b, h, start, stop, key_shift, stride_ks, stride_kd, stride_vs, stride_vd,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MODULATED: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, TMA: tl.constexpr, PIPELINED: tl.constexpr,
):  # fmt: skip
    """Online softmax of one query tile over keys [start, stop), whose rows in K lie key_shift further.

    Every tile is bounds-checked: a second body for the last tile takes registers that a 128-row tile does not have
    (compiled for sm_80 and sm_90: spills). Pipelined, a tile's values are weighed one tile late, so that this product
    runs while the softmax of the next tile does. Descriptors know no mask: masked values arrive as zeros. With them,
    constants stay in the loop: moved out by the compiler they take 12 to 15 registers more; with pointers it is the
    other way round (compiled).
    """
    tl.static_assert(TMA or not PIPELINED, "the tile before is read without a mask")
    factor = row_scale
    if MODULATED:
        factor = row_scale[:, None]
    offs_n = tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = q.dtype
    if PIPELINED:  # the first product is of zeros; the compiler keeps weights in registers that are carried as integers
        carried = tl.zeros([acc.shape[0], BLOCK_N], dtype=tl.int16)
        alpha = tl.full([acc.shape[0]], 1.0, dtype=tl.float32)
    # Read one tile ahead: read in its own tile, the compiler would copy biases through shared memory, with barriers.
    if HAS_KEY_BIAS and TMA:
        next_bias = load_key_bias(KEY_BIAS, start + offs_n, offs_n < stop - start)
    for start_n in tl.range(start, stop, BLOCK_N, disable_licm=TMA):
        valid = offs_n < stop - start_n
        if HAS_KEY_BIAS:
            if TMA:
                key_bias = next_bias
                ahead = start_n + BLOCK_N + offs_n
                next_bias = load_key_bias(KEY_BIAS, ahead, ahead < stop)
            else:
                key_bias = load_key_bias(KEY_BIAS, start_n + offs_n, valid)
            valid = key_bias > -float("inf")
        k = load_block(
            K, b, h, start_n + key_shift, offs_n, valid, stride_ks, stride_kd, HEAD_DIM, BLOCK_D, BLOCK_N, TMA
        )
        qk = tl.dot(q, tl.trans(k), input_precision="ieee") * factor  # [BLOCK_M, BLOCK_N] float32
        if MODULATED:
            qk += row_bias[:, None]  # one instruction with the factor
        if HAS_KEY_BIAS:
            qk += key_bias[None, :]
        qk = tl.where(valid[None, :], qk, -float("inf"))  # a masked key may hold NaN
        if PIPELINED:
            v = load_block(
                V, b, h, start_n - BLOCK_N, offs_n, valid, stride_vs, stride_vd, HEAD_DIM, BLOCK_D, BLOCK_N, TMA
            )
            acc = tl.dot(carried.to(dtype, bitcast=True), v, acc * alpha[:, None])
        p, alpha, m_i, l_i = softmax_step(qk, m_i, l_i)
        if PIPELINED:
            carried = p.to(dtype).to(tl.int16, bitcast=True)
        else:
            acc = acc * alpha[:, None]  # before the values take registers
            # Rows beyond the tile load as zeros: 0 x NaN of what lies behind the buffer would poison the sum.
            v = load_block(V, b, h, start_n, offs_n, valid, stride_vs, stride_vd, HEAD_DIM, BLOCK_D, BLOCK_N, TMA)
            acc = tl.dot(p.to(dtype), v, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_D] float32
    if PIPELINED:
        last = start + (tl.cdiv(stop - start, BLOCK_N) - 1) * BLOCK_N
        v = load_block(
            V, b, h, last, offs_n, offs_n < stop - last, stride_vs, stride_vd, HEAD_DIM, BLOCK_D, BLOCK_N, TMA
        )
        acc = tl.dot(carried.to(dtype, bitcast=True), v, acc * alpha[:, None])
    return acc, l_i, m_i


@triton.jit
def resume(
    acc, l_i, m_i, STATE, STATE_M, STATE_L, state, resumed, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Merge what queries with per-query scales have met in a kernel before this one: rows ``state`` of its state."""
    offs_d = tl.arange(0, BLOCK_D)
    state_m = tl.load(STATE_M + state, mask=resumed, other=LOWEST)
    state_l = tl.load(STATE_L + state, mask=resumed, other=0.0)
    m_new = tl.maximum(m_i, state_m)
    alpha, beta = tl.exp2(m_i - m_new), tl.exp2(state_m - m_new)
    state_acc = tl.load(
        STATE + state[:, None] * HEAD_DIM + offs_d[None, :],
        mask=resumed[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    return acc * alpha[:, None] + state_acc * beta[:, None], l_i * alpha + state_l * beta, m_new


ATTENTION_COUNTS = (
    "num_segments", "num_queries", "num_keys", "num_rows", "heads", "key_heads", "scaled_keys", "num_sorted",
    "num_per_query", "groups_batch_stride", "gains_batch_stride", "biases_batch_stride", "key_bias_batch_stride",
    "sorted_batch_stride", "bucket_batch_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=ATTENTION_COUNTS)
def attention_kernel(
    Q, K, V, OUT, LSE, SEGMENTS, BIAS, GROUPS, GAINS, LOGIT_BIASES, KEY_BIAS, SORTED_QUERIES, TILE_BUCKET,
    STATE, STATE_M, STATE_L,
    stride_qb, stride_qh, stride_qv, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    num_segments, num_queries, num_keys, num_rows, heads, key_heads, scaled_keys, num_sorted, num_per_query,
    groups_batch_stride, gains_batch_stride, biases_batch_stride, key_bias_batch_stride, sorted_batch_stride,
    bucket_batch_stride, log2_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    QUERY_TILE: tl.constexpr, MODULATED: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, TMA: tl.constexpr,
    PIPELINED: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head against all segments. num_sorted is 0 where queries keep their order."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    bh = tl.program_id(0) // num_tiles
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    kv_head = h // (heads // key_heads)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = offs_m < num_rows
    q_base = Q + b * stride_qb + h.to(tl.int64) * stride_qh
    if TMA:
        k_head, v_head = K, V
    else:
        k_head = K + b * stride_kb + kv_head.to(tl.int64) * stride_kh
        v_head = V + b * stride_vb + kv_head.to(tl.int64) * stride_vh
    key_biases = KEY_BIAS
    if HAS_KEY_BIAS:
        key_biases = KEY_BIAS + b * key_bias_batch_stride
    m_i = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    if MODULATED:
        sorted_tile = tile * BLOCK_M < num_sorted
        query = tl.load(SORTED_QUERIES + b * sorted_batch_stride + offs_m, mask=offs_m < num_sorted, other=-1)
        bucket = tl.load(
            TILE_BUCKET + b * bucket_batch_stride + tile * BLOCK_M // QUERY_TILE, mask=sorted_tile, other=0
        )
        rows = tl.where(sorted_tile, query, offs_m)
        row_mask = (rows >= 0) & in_range
        for s in range(num_segments):
            row = SEGMENTS + s * SEGMENT_FIELDS
            start = tl.load(row + START)
            stop = tl.load(row + STOP)
            scaled = tl.load(row + SCALED) != 0
            # The copy of a scaled key at bucket 0, r = 1, is the key itself in key order.
            copy = tl.load(row + BUCKET_BASE) + bucket * scaled_keys
            key_shift = tl.where(scaled & (bucket > 0), copy - start, 0)
            bias_rows = (bh.to(tl.int64) * num_segments + s) * num_rows + offs_m
            row_scale, row_bias = logit_map(
                row, rows, row_mask, BIAS, bias_rows, GROUPS + b * groups_batch_stride, GAINS + b * gains_batch_stride,
                LOGIT_BIASES + b * biases_batch_stride, num_queries, log2_scale,
            )  # fmt: skip
            # Done by an earlier kernel; a tile of padding, or of queries that the segment is hidden from. A maximum of
            # the biases would not see NaN, which is to reach the output. Counted in float32: integers spill on sm_89.
            nobody = tl.max(tl.where(row_mask & (row_bias != -float("inf")), 1.0, 0.0)) == 0.0
            stop = tl.where((scaled & (bucket < 0)) | nobody, start, stop)
            variant = q_base + tl.load(row + VARIANT).to(tl.int64) * stride_qv
            q = load_tile(variant, 0, offs_m, in_range, stride_qs, stride_qd, HEAD_DIM, BLOCK_D)
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, row_scale, row_bias,
                k_head, v_head, key_biases, b.to(tl.int32), kv_head, start, stop, key_shift,
                stride_ks, stride_kd, stride_vs, stride_vd,
                HEAD_DIM, BLOCK_D, BLOCK_N, MODULATED, HAS_KEY_BIAS, TMA, PIPELINED,
            )  # fmt: skip
        state = bh.to(tl.int64) * num_per_query + offs_m
        acc, l_i, m_i = resume(
            acc, l_i, m_i, STATE, STATE_M, STATE_L, state, when(bucket < 0, row_mask), HEAD_DIM, BLOCK_D
        )
    else:
        rows, row_mask = offs_m, in_range
        q = load_tile(q_base, 0, offs_m, in_range, stride_qs, stride_qd, HEAD_DIM, BLOCK_D)
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q, log2_scale, 0.0,
            k_head, v_head, key_biases, b.to(tl.int32), kv_head, 0, num_keys, 0,
            stride_ks, stride_kd, stride_vs, stride_vd,
            HEAD_DIM, BLOCK_D, BLOCK_N, MODULATED, HAS_KEY_BIAS, TMA, PIPELINED,
        )  # fmt: skip

    # No key left: zeros, and a log-sum-exp of -inf.
    total = tl.where(l_i == 0.0, 1.0, l_i)
    out = acc / total[:, None]
    lse = m_i * LN2 + tl.log(l_i)
    offs_d = tl.arange(0, BLOCK_D)
    out_rows = (b * num_queries + rows) * heads + h
    tl.store(
        OUT + out_rows[:, None] * HEAD_DIM + offs_d[None, :], out.to(OUT.dtype.element_ty),
        mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :],
    )  # fmt: skip
    tl.store(LSE + bh.to(tl.int64) * num_queries + rows, lse, mask=row_mask)


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_queries: int,
    num_keys: int,
    key_bias: torch.Tensor | None,
    tables: KernelTables | None,
    bias: torch.Tensor | None,
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    scale: float,
    dtype: torch.dtype,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in one launch.

    Args:
        q: ``(B, H, variants, N, D)``, rotated and weighted, in the order of ``tables.sorted_queries``; any
            strides.
        k: ``(B, Hkv, R, D)``, rotated; rows beyond ``num_keys`` are the scaled keys once per bucket. Any strides.
        v: ``(B, Hkv, Sk, D)``, any strides.
        num_queries, num_keys: ``Sq`` and ``Sk``.
        key_bias: ``(Bx, Sk)`` float32, natural log units, ``-inf`` where a key is masked; or None.
        tables, bias: modulations and the row bias of :func:`prepare_queries`, or None for plain attention.
        state: ``acc (B, H, C, D)``, ``m`` and ``l (B, H, C)`` float32 of the queries with per-query scales, or None.
        scale: factor of the logits.
        dtype: of the output.
        config: with ``tma``, k and v must be :func:`describable` and the values of masked keys zero.

    Returns:
        out ``(B, Sq, H, D)`` and lse ``(B, H, Sq)`` float32, natural log.
    """
    batch, heads, _, _, dim = q.shape
    out = torch.empty((batch, num_queries, heads, dim), dtype=dtype, device=q.device)
    lse = torch.empty((batch, heads, num_queries), dtype=torch.float32, device=q.device)
    t, (acc, m, l_sum) = tables or KernelTables(lse), state or (None, None, None)
    tensors = {
        "Q": q, "K": k, "V": v, "OUT": out, "LSE": lse, "SEGMENTS": t.segments, "BIAS": bias, "GROUPS": t.groups,
        "GAINS": t.gains, "LOGIT_BIASES": t.biases, "KEY_BIAS": key_bias, "SORTED_QUERIES": t.sorted_queries,
        "TILE_BUCKET": t.tile_bucket, "STATE": acc, "STATE_M": m, "STATE_L": l_sum,
    }  # fmt: skip
    modulated = tables is not None
    launch(_attention, tensors, num_keys, modulated, t.scaled_keys, t.num_per_query, scale, config)
    return out, lse


def _attention(
    at: dict[str, Layout | None], num_keys: int, modulated: bool, scaled_keys: int, num_per_query: int, scale: float,
    config: LaunchConfig,
) -> Launch:  # fmt: skip
    batch, heads, _, rows, dim = at["Q"].shape
    order, key_bias = at["SORTED_QUERIES"], at["KEY_BIAS"]
    arguments = dict(
        **strides("q", at["Q"], "bhvsd"), **strides("k", at["K"], "bhsd"), **strides("v", at["V"], "bhsd"),
        num_segments=at["SEGMENTS"].shape[0], num_queries=at["OUT"].shape[1], num_keys=num_keys, num_rows=rows,
        heads=heads, key_heads=at["K"].shape[1], scaled_keys=scaled_keys,
        num_sorted=0 if order is None else order.shape[1], num_per_query=num_per_query,
        groups_batch_stride=batch_stride(at["GROUPS"]), gains_batch_stride=batch_stride(at["GAINS"]),
        biases_batch_stride=batch_stride(at["LOGIT_BIASES"]), key_bias_batch_stride=batch_stride(key_bias),
        sorted_batch_stride=batch_stride(order),
        bucket_batch_stride=batch_stride(at["TILE_BUCKET"]), log2_scale=scale * LOG2E,
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        QUERY_TILE=abi.QUERY_TILE, MODULATED=modulated, HAS_KEY_BIAS=key_bias is not None, TMA=config.tma,
        PIPELINED=config.pipelined, **config.options,
    )  # fmt: skip
    floats = ("BIAS", "GROUPS", "GAINS", "LOGIT_BIASES", "KEY_BIAS", "STATE", "STATE_M", "STATE_L")
    stand_ins = {**dict.fromkeys(floats, "LSE"), **dict.fromkeys(("SORTED_QUERIES", "TILE_BUCKET"), "SEGMENTS")}
    tiles = {name: tile(at[name], config.block_n, config.block_d) for name in "KV"} if config.tma else {}
    grid = (triton.cdiv(rows, config.block_m) * batch * heads,)
    return Launch(attention_kernel, grid, arguments, stand_ins, tiles)
