"""The fused loop: modulated attention over segments of keys, one launch.

A segment's treatment never enters the loop over keys. It is a query tile (prepared once: rotated for the segment, times
its band weights), a row of the packed keys to start from, and an affine map of the logits (row factor ``delta g``, row
bias ``(lambda - delta) g <w q, mu>``); the loop body is that of plain attention.
"""

import torch
import triton
import triton.language as tl

from .common import (
    LEVEL_BASE,
    LN2,
    LOWEST,
    SCALED,
    SEGMENT_FIELDS,
    START,
    STOP,
    VIEW,
    load_tile,
    logit_map,
    softmax_step,
    when,
)  # fmt: skip
from .config import LaunchConfig, precision
from .descriptors import descriptor, load_block
from .tables import LOG2E, SLOT_TILE, SegmentTables, batch_stride


@triton.jit
def attend(
    acc, l_i, m_i, q, row_scale, row_bias,
    K, V, KEY_MASK, b, h, start, stop, key_shift, stride_ks, stride_kd, stride_vs, stride_vd,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MODULATED: tl.constexpr,
    HAS_MASK: tl.constexpr, TMA: tl.constexpr, PIPELINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of one query tile over keys [start, stop), whose rows in K lie key_shift further.

    Every tile is bounds-checked: a second body for the last tile takes registers that a 128-row tile does not have
    (compiled for sm_80 and sm_90: spills). Pipelined, a tile's values are weighed one tile late, so that this product
    runs while the softmax of the next tile does. Descriptors know no mask: masked values arrive as zeros. With them,
    constants stay in the loop: moved out by the compiler they take 12 to 15 registers more; with pointers it is the
    other way round (compiled).
    """
    tl.static_assert(TMA or not PIPELINED, "the tile before is read without a mask")
    if MODULATED:  # a row's constant is a shift of its running maximum
        m_i -= row_bias
        factor = row_scale[:, None]
    else:
        factor = row_scale
    offs_n = tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = q.dtype
    if PIPELINED:  # the first product is of zeros; the compiler keeps weights in registers that are carried as integers
        carried = tl.zeros([acc.shape[0], BLOCK_N], dtype=tl.int16)
        alpha = tl.full([acc.shape[0]], 1.0, dtype=tl.float32)
    for start_n in tl.range(start, stop, BLOCK_N, disable_licm=TMA):
        valid = offs_n < stop - start_n
        if HAS_MASK:
            valid = valid & (tl.load(KEY_MASK + start_n + offs_n, mask=valid, other=0) != 0)
        k = load_block(
            K, b, h, start_n + key_shift, offs_n, valid, stride_ks, stride_kd, HEAD_DIM, BLOCK_D, BLOCK_N, TMA
        )
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor  # [BLOCK_M, BLOCK_N] float32
        qk = tl.where(valid[None, :], qk, -float("inf"))
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
            acc = tl.dot(p.to(dtype), v, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D] float32
    if PIPELINED:
        last = start + (tl.cdiv(stop - start, BLOCK_N) - 1) * BLOCK_N
        v = load_block(
            V, b, h, last, offs_n, offs_n < stop - last, stride_vs, stride_vd, HEAD_DIM, BLOCK_D, BLOCK_N, TMA
        )
        acc = tl.dot(carried.to(dtype, bitcast=True), v, acc * alpha[:, None])
    if MODULATED:
        m_i += row_bias
    return acc, l_i, m_i


@triton.jit
def resume(
    acc, l_i, m_i, STATE, STATE_M, STATE_L, state, resumed, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Merge what queries with a scale of their own have met in the patch kernel: rows ``state`` of its state."""
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
    "num_segments", "num_queries", "num_keys", "num_rows", "heads", "key_heads", "scaled_keys", "num_slots",
    "continuous", "groups_batch_stride", "gains_batch_stride", "mask_batch_stride", "slots_batch_stride",
    "level_batch_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=ATTENTION_COUNTS)
def attention_kernel(
    Q, K, V, OUT, LSE, SEGMENTS, BIAS, GROUPS, GAINS, KEY_MASK, SLOTS, SLOT_LEVEL, STATE, STATE_M, STATE_L,
    stride_qb, stride_qh, stride_qv, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    num_segments, num_queries, num_keys, num_rows, heads, key_heads, scaled_keys, num_slots, continuous,
    groups_batch_stride, gains_batch_stride, mask_batch_stride, slots_batch_stride, level_batch_stride, log2_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLOT_TILE: tl.constexpr, MODULATED: tl.constexpr, HAS_MASK: tl.constexpr, TMA: tl.constexpr,
    PIPELINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head against all segments. num_slots is 0 where queries keep their order."""
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
    mask_base = KEY_MASK
    if HAS_MASK:
        mask_base = KEY_MASK + b * mask_batch_stride
    m_i = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    if MODULATED:
        slotted = tile * BLOCK_M < num_slots
        slot = tl.load(SLOTS + b * slots_batch_stride + offs_m, mask=offs_m < num_slots, other=-1)
        level = tl.load(SLOT_LEVEL + b * level_batch_stride + tile * BLOCK_M // SLOT_TILE, mask=slotted, other=0)
        rows = tl.where(slotted, slot, offs_m)
        row_mask = (rows >= 0) & in_range
        for s in range(num_segments):
            row = SEGMENTS + s * SEGMENT_FIELDS
            start = tl.load(row + START)
            stop = tl.load(row + STOP)
            scaled = tl.load(row + SCALED) != 0
            skip = (scaled & (level < 0)) | (tl.max(rows) < 0)  # done by the patch kernel; a tile of padding
            stop = tl.where(skip, start, stop)
            # The copy of a scaled key at level 0, r = 1, is the key itself in key order.
            copy = tl.load(row + LEVEL_BASE) + level * scaled_keys
            key_shift = tl.where(scaled & (level > 0), copy - start, 0)
            bias_rows = (bh.to(tl.int64) * num_segments + s) * num_rows + offs_m
            row_scale, row_bias = logit_map(
                row, rows, row_mask, BIAS, bias_rows, GROUPS + b * groups_batch_stride, GAINS + b * gains_batch_stride,
                num_queries, log2_scale,
            )  # fmt: skip
            view = q_base + tl.load(row + VIEW).to(tl.int64) * stride_qv
            q = load_tile(view, 0, offs_m, in_range, stride_qs, stride_qd, HEAD_DIM, BLOCK_D)
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, row_scale, row_bias,
                k_head, v_head, mask_base, b.to(tl.int32), kv_head, start, stop, key_shift,
                stride_ks, stride_kd, stride_vs, stride_vd,
                HEAD_DIM, BLOCK_D, BLOCK_N, MODULATED, HAS_MASK, TMA, PIPELINED, PRECISION,
            )  # fmt: skip
        state = bh.to(tl.int64) * continuous + offs_m
        acc, l_i, m_i = resume(
            acc, l_i, m_i, STATE, STATE_M, STATE_L, state, when(level < 0, row_mask), HEAD_DIM, BLOCK_D
        )
    else:
        rows, row_mask = offs_m, in_range
        q = load_tile(q_base, 0, offs_m, in_range, stride_qs, stride_qd, HEAD_DIM, BLOCK_D)
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q, log2_scale, 0.0,
            k_head, v_head, mask_base, b.to(tl.int32), kv_head, 0, num_keys, 0,
            stride_ks, stride_kd, stride_vs, stride_vd,
            HEAD_DIM, BLOCK_D, BLOCK_N, MODULATED, HAS_MASK, TMA, PIPELINED, PRECISION,
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
    key_mask: torch.Tensor | None,
    tables: SegmentTables | None,
    bias: torch.Tensor | None,
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    scale: float,
    dtype: torch.dtype,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in one launch.

    Args:
        q: ``(B, H, views, N, D)``, rotated and weighted, in slot order; any strides.
        k: ``(B, Hkv, R, D)``, rotated; rows beyond ``num_keys`` are the scaled keys once per level. Any strides.
        v: ``(B, Hkv, Sk, D)``, any strides.
        num_queries, num_keys: ``Sq`` and ``Sk``.
        key_mask: ``(Bx, Sk)`` bool, or None.
        tables, bias: modulations and the row bias of :func:`prepare_queries`, or None for plain attention.
        state: ``acc (B, H, C, D)``, ``m`` and ``l (B, H, C)`` float32 of the continuous slots, or None.
        scale: factor of the logits.
        dtype: of the output.
        config: with ``tma``, k and v must be :func:`describable` and the values of masked keys zero.

    Returns:
        out ``(B, Sq, H, D)`` and lse ``(B, H, Sq)`` float32, natural log.
    """
    batch, heads, _, rows, dim = q.shape
    out = torch.empty((batch, num_queries, heads, dim), dtype=dtype, device=q.device)
    lse = torch.empty((batch, heads, num_queries), dtype=torch.float32, device=q.device)
    t = tables or SegmentTables(lse)
    # Pointers of the right type stand in for tables whose loads are all masked off.
    bias, groups, gains, mask = (lse if x is None else x for x in (bias, t.groups, t.gains, key_mask))
    slots, slot_level = (t.segments, t.segments) if t.slots is None else (t.slots, t.slot_level)
    keys, values = (descriptor(x, config.block_n, config.block_d) for x in (k, v)) if config.tma else (k, v)
    attention_kernel[(triton.cdiv(rows, config.block_m) * batch * heads,)](
        q, keys, values, out, lse, t.segments, bias, groups, gains, mask, slots, slot_level,
        *(state or (lse, lse, lse)), *q.stride(), *k.stride(), *v.stride(),
        t.segments.shape[0], num_queries, num_keys, rows, heads, k.shape[1], t.scaled_keys,
        0 if t.slots is None else t.slots.shape[1], t.continuous,
        batch_stride(t.groups), batch_stride(t.gains), batch_stride(key_mask), batch_stride(t.slots),
        batch_stride(t.slot_level), scale * LOG2E,
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SLOT_TILE=SLOT_TILE,
        MODULATED=tables is not None, HAS_MASK=key_mask is not None, TMA=config.tma, PIPELINED=config.pipelined,
        PRECISION=precision(q.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse
