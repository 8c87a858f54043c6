"""The fused loop: modulated attention over segments of keys, one launch.

A segment's treatment never enters the loop over keys. It becomes, once per query tile and segment, a query tile
(rotated for the segment, times its band weights) and an affine map of the logits (row factor ``delta * g``, row bias
``(lambda - delta) g <q, mu>``); the loop body is that of plain attention.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import (
    GAIN, GROUP, LEVEL_BASE, LN2, LOG2E, SCALED, SEGMENT_FIELDS, START, STOP, WEIGHT, load_rotated, load_rows, pair_of,
    softmax_step, when,
)  # fmt: skip
from .config import LaunchConfig, precision


@triton.jit
def attend(
    acc, l_i, m_i, q, row_scale, row_bias,
    K, V, KEY_MASK, lo, hi, key_shift, stride_ks, stride_kd, stride_vs, stride_vd,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MODULATED: tl.constexpr, HAS_MASK: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of one query tile over keys [lo, hi), whose rows in K lie key_shift further."""
    MASKED: tl.constexpr = HAS_MASK or TAIL
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        valid = offs_n < hi
        if HAS_MASK:
            valid = valid & (tl.load(KEY_MASK + offs_n, mask=valid, other=0) != 0)
        k = load_rows(K, offs_n + key_shift, valid, stride_ks, stride_kd, HEAD_DIM, BLOCK_D, MASKED)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N] float32
        if MODULATED:
            qk = qk * row_scale[:, None] + row_bias[:, None]
        else:
            qk = qk * row_scale
        if MASKED:
            qk = tl.where(valid[None, :], qk, -float("inf"))
        p, m_i, l_i, acc = softmax_step(qk, m_i, l_i, acc, HAS_MASK)
        # Zero rows beyond the tile: 0 x NaN of whatever lies behind the buffer would poison the sum.
        v = load_rows(V, offs_n, valid, stride_vs, stride_vd, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D] float32
    return acc, l_i, m_i


@triton.jit
def attend_segment(
    acc, l_i, m_i, q, row_scale, row_bias,
    K, V, KEY_MASK, start, stop, key_shift, stride_ks, stride_kd, stride_vs, stride_vd,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MODULATED: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [start, stop): full tiles without a bounds check, then what is left."""
    full = start
    if not HAS_MASK:
        full = start + (stop - start) // BLOCK_N * BLOCK_N
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q, row_scale, row_bias,
            K, V, KEY_MASK, start, full, key_shift, stride_ks, stride_kd, stride_vs, stride_vd,
            HEAD_DIM, BLOCK_D, BLOCK_N, MODULATED, False, False, PRECISION,
        )  # fmt: skip
    return attend(
        acc, l_i, m_i, q, row_scale, row_bias,
        K, V, KEY_MASK, full, stop, key_shift, stride_ks, stride_kd, stride_vs, stride_vd,
        HEAD_DIM, BLOCK_D, BLOCK_N, MODULATED, HAS_MASK, True, PRECISION,
    )  # fmt: skip


@triton.jit
def segment_logits(
    q, row, rows, row_mask, mu, WEIGHTS, GROUPS, GAINS, num_queries, half, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The query tile times the segment's band weights, and the affine map of its logits: <w q, (l - d) mu> and d.

    q: [BLOCK_M, BLOCK_D] float32 rotated for the segment; mu: [BLOCK_M or 1, BLOCK_D].
    """
    weight = tl.load(row + WEIGHT)
    group = tl.load(row + GROUP)
    gain = tl.load(row + GAIN)
    offs_d = tl.arange(0, BLOCK_D)
    pair = pair_of(offs_d, half, HEAD_DIM // 2)
    w = tl.load(WEIGHTS + weight * (HEAD_DIM // 2) + pair, mask=when(weight >= 0, offs_d < HEAD_DIM), other=1.0)
    q = q * w[None, :]
    bias = tl.load(GROUPS + group * 3, mask=group >= 0, other=1.0)
    delta = tl.load(GROUPS + group * 3 + 1, mask=group >= 0, other=1.0)
    g = tl.load(GAINS + gain * num_queries + rows, mask=when(gain >= 0, row_mask), other=1.0)  # [BLOCK_M]
    row_scale = scale * delta * g
    row_bias = scale * (bias - delta) * g * tl.sum(q * mu, 1)
    return q, row_scale, row_bias


@triton.jit
def attention_kernel(
    Q, K, V, OUT, LSE,
    SEGMENTS, QUERY_COS, QUERY_SIN, WEIGHTS, GROUPS, GAINS, MEANS, ROW_MEANS, KEY_MASK, SLOTS, SLOT_LEVEL,
    STATE, STATE_M, STATE_L,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    num_segments, num_queries, num_keys, num_tiles, heads, key_heads, num_groups, num_levels, scaled_keys,
    num_slots, continuous, cos_batch_stride, cos_variant_stride, groups_batch_stride, gains_batch_stride,
    mask_batch_stride, slots_batch_stride, level_batch_stride, half, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLOT_TILE: tl.constexpr, ROTATE: tl.constexpr, MODULATED: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all segments. num_slots is 0 where queries keep their order."""
    tile = tl.program_id(0) % num_tiles
    bh = tl.program_id(0) // num_tiles
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    kv_head = h // (heads // key_heads)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, level = offs_m, 0
    if MODULATED:
        slotted = tile * BLOCK_M < num_slots
        slot = tl.load(SLOTS + b * slots_batch_stride + offs_m, mask=offs_m < num_slots, other=-1)
        rows = tl.where(slotted, slot, offs_m)
        level = tl.load(SLOT_LEVEL + b * level_batch_stride + tile * BLOCK_M // SLOT_TILE, mask=slotted, other=0)
    row_mask = (rows >= 0) & (rows < num_queries)
    q_base = Q + b * stride_qb + h.to(tl.int64) * stride_qh
    k_base = K + b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_base = V + b * stride_vb + kv_head.to(tl.int64) * stride_vh
    mask_base = KEY_MASK
    if HAS_MASK:
        mask_base = KEY_MASK + b * mask_batch_stride
    cos, sin = QUERY_COS, QUERY_SIN
    if ROTATE:
        cos, sin = QUERY_COS + b * cos_batch_stride, QUERY_SIN + b * cos_batch_stride
    offs_d = tl.arange(0, BLOCK_D)
    log2_scale = scale * LOG2E

    if MODULATED:
        # Queries with a scale of their own arrive with the scaled segments done; others start from nothing.
        resumed = when(level < 0, row_mask)
        state = bh.to(tl.int64) * continuous + offs_m
        m_i = tl.load(STATE_M + state, mask=resumed, other=-float("inf"))
        l_i = tl.load(STATE_L + state, mask=resumed, other=0.0)
        acc = tl.load(
            STATE + state[:, None] * HEAD_DIM + offs_d[None, :],
            mask=resumed[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        for s in range(num_segments):
            row = SEGMENTS + s * SEGMENT_FIELDS
            start = tl.load(row + START)
            stop = tl.load(row + STOP)
            scaled = tl.load(row + SCALED) != 0
            skip = (scaled & (level < 0)) | (tl.max(rows) < 0)  # done by the patch kernel; a tile of padding
            stop = tl.where(skip, start, stop)
            if ROTATE:
                variant = tl.where(scaled & (level != 0), cos_variant_stride, 0)
                x = load_rotated(
                    q_base, cos + variant, sin + variant, rows, rows, row_mask, stride_qs, stride_qd, half, HEAD_DIM,
                    BLOCK_D,
                )  # fmt: skip
            else:
                x = load_rows(q_base, rows, row_mask, stride_qs, stride_qd, HEAD_DIM, BLOCK_D, True).to(tl.float32)
            group = tl.load(row + GROUP)
            means = ((b * key_heads + kv_head) * num_groups + group) * num_levels + tl.maximum(level, 0)
            mu = tl.load(
                MEANS + means * HEAD_DIM + offs_d, mask=when((group >= 0) & (level >= 0), offs_d < HEAD_DIM), other=0.0
            )[None, :]
            own = ((b * key_heads + kv_head) * num_groups + group) * continuous + offs_m
            mu += tl.load(
                ROW_MEANS + own.to(tl.int64)[:, None] * HEAD_DIM + offs_d[None, :],
                mask=when((group >= 0) & (level < 0), row_mask)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0,
            )  # fmt: skip
            x, row_scale, row_bias = segment_logits(
                x, row, rows, row_mask, mu, WEIGHTS, GROUPS + b * groups_batch_stride, GAINS + b * gains_batch_stride,
                num_queries, half, log2_scale, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            q = x.to(Q.dtype.element_ty)
            # The copy of a scaled key at level 0, r = 1, is the key itself in key order.
            copy = tl.load(row + LEVEL_BASE) + level * scaled_keys
            key_shift = tl.where(scaled & (level > 0), copy - start, 0)
            acc, l_i, m_i = attend_segment(
                acc, l_i, m_i, q, row_scale, row_bias,
                k_base, v_base, mask_base, start, stop, key_shift, stride_ks, stride_kd, stride_vs, stride_vd,
                HEAD_DIM, BLOCK_D, BLOCK_N, MODULATED, HAS_MASK, PRECISION,
            )  # fmt: skip
    else:
        m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        if ROTATE:
            x = load_rotated(
                q_base, cos, sin, rows, rows, row_mask, stride_qs, stride_qd, half, HEAD_DIM, BLOCK_D
            )  # fmt: skip
            q = x.to(Q.dtype.element_ty)
        else:
            q = load_rows(q_base, rows, row_mask, stride_qs, stride_qd, HEAD_DIM, BLOCK_D, True)
        acc, l_i, m_i = attend_segment(
            acc, l_i, m_i, q, log2_scale, 0.0,
            k_base, v_base, mask_base, 0, num_keys, 0, stride_ks, stride_kd, stride_vs, stride_vd,
            HEAD_DIM, BLOCK_D, BLOCK_N, MODULATED, HAS_MASK, PRECISION,
        )  # fmt: skip

    # No key left: zeros, and a log-sum-exp of -inf.
    out = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    lse = m_i * LN2 + tl.log(l_i)
    out_rows = (b * num_queries + rows) * heads + h
    tl.store(
        OUT + out_rows.to(tl.int64)[:, None] * HEAD_DIM + offs_d[None, :], out.to(OUT.dtype.element_ty),
        mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :],
    )  # fmt: skip
    tl.store(LSE + bh.to(tl.int64) * num_queries + rows, lse, mask=row_mask)


@dataclass(frozen=True)
class SegmentTables:
    """What a plan says of a modulated call, as device tensors. Batches ``Bx`` are 1 or B; None where unused.

    segments ``(n, 9)`` int32; weights ``(W, D/2)``, groups ``(Bx, G, 3)``, gains ``(Bx, N, Sq)`` float32; means
    ``(B, Hkv, G, 1 + L, D)`` of the groups per level and row_means ``(B, Hkv, G, C, D)`` per continuous slot, float32;
    slots ``(Bx, T * SLOT_TILE)`` and slot_level ``(Bx, T)`` int32; state: ``acc (B, H, C, D)``, ``m`` and
    ``l (B, H, C)`` float32, the online softmax of C continuous slots over the scaled segments.
    """

    segments: torch.Tensor
    weights: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    gains: torch.Tensor | None = None
    means: torch.Tensor | None = None
    row_means: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    slot_level: torch.Tensor | None = None
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    num_levels: int = 0
    scaled_keys: int = 0
    continuous: int = 0


SLOT_TILE = 128  # slots that share a level; every BLOCK_M divides it


def batch_stride(x: torch.Tensor | None) -> int:
    """Elements from one batch row to the next of a ``(1 or B, ...)`` table; 0 where the rows share it."""
    return x.stride(0) if x is not None and x.shape[0] > 1 else 0


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_keys: int,
    query_rotation: tuple[torch.Tensor, torch.Tensor] | None,
    half: bool,
    key_mask: torch.Tensor | None,
    tables: SegmentTables | None,
    scale: float,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in one launch.

    Args:
        q: ``(B, Sq, H, D)``, any strides.
        k: ``(B, Hkv, R, D)``, rotated; rows beyond ``num_keys`` are the scaled keys once per level. Any strides.
        v: ``(B, Hkv, Sk, D)``, any strides.
        query_rotation: cos and sin ``(Bx, variants, Sq, D/2)`` float32 that rotate q on its way in, or None.
        half: pairing ``(c, c + D/2)`` rather than ``(2c, 2c + 1)``.
        key_mask: ``(Bx, Sk)`` bool, or None.
        tables: modulations, or None for plain attention.
        scale: factor of the logits.

    Returns:
        out ``(B, Sq, H, D)`` in the dtype of q and lse ``(B, H, Sq)`` float32, natural log.
    """
    batch, num_queries, heads, dim = q.shape
    out = torch.empty((batch, num_queries, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, num_queries), dtype=torch.float32, device=q.device)
    t = tables or SegmentTables(lse)
    unused = lse  # a pointer of the right type for tables whose loads are all masked off
    state = t.state or (unused, unused, unused)
    cos, sin = query_rotation or (unused, unused)
    num_slots = t.slots.shape[1] if t.slots is not None else 0
    num_tiles = triton.cdiv(num_slots or num_queries, config.block_m)

    def or_unused(x, unused=unused):
        return unused if x is None else x

    attention_kernel[(num_tiles * batch * heads,)](
        q, k, v, out, lse,
        t.segments, cos, sin, or_unused(t.weights), or_unused(t.groups), or_unused(t.gains), or_unused(t.means),
        or_unused(t.row_means), or_unused(key_mask), or_unused(t.slots, t.segments),
        or_unused(t.slot_level, t.segments), *state,
        *q.stride(), *k.stride(), *v.stride(),
        t.segments.shape[0], num_queries, num_keys, num_tiles, heads, k.shape[1],
        t.groups.shape[1] if t.groups is not None else 0, 1 + t.num_levels, t.scaled_keys,
        num_slots, t.continuous, batch_stride(cos), cos.stride(1) if query_rotation else 0, batch_stride(t.groups),
        batch_stride(t.gains), batch_stride(key_mask), batch_stride(t.slots), batch_stride(t.slot_level),
        int(half), scale,
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SLOT_TILE=SLOT_TILE,
        ROTATE=query_rotation is not None, MODULATED=tables is not None, HAS_MASK=key_mask is not None,
        PRECISION=precision(q.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse
