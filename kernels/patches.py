"""Exact attention of queries that each have a position scale of their own, against the scaled keys.

The score of a scaled pair is ``<R((r_i - 1)(phi_i - phi_j)) R(phi_i) q_i, R(phi_j) k_j>``. On a grid many keys share
``phi_j`` on an axis, so the query is turned once per coordinate rather than once per key: a patch holds 16 x 16 keys,
those of a row share the angles of pair class A, those of a column those of class B, all of them those of class C, and

    s[u, v] = <q_A turned for row u, k_A> + <q_B turned for column v, k_B> + <q_C turned for the patch, k_C>

is two batched products and a plain one. The running softmax is left for the fused loop to resume.
"""

import torch
import triton
import triton.language as tl

from .attention import SLOT_TILE, SegmentTables, batch_stride
from .common import (
    GAIN, GROUP, LOG2E, PATCH_START, PATCH_STOP, SEGMENT_FIELDS, WEIGHT, load_rotated, pair_of, softmax_step,
    when,
)  # fmt: skip
from .config import LaunchConfig, precision

PATCH = tl.constexpr(16)


@triton.jit
def query_pairs(
    Q, COS, SIN, PHASE, WEIGHTS, COLUMNS, rows, row_mask, weight, stride_s, stride_d, half,
    PAIRS: tl.constexpr, CLASS_PAIRS: tl.constexpr,
):  # fmt: skip
    """Both members of a class's query pairs at r = 1, times the segment's weights, and their phases: [M, CLASS_PAIRS].

    Returns also the pairs themselves and their two channels; padding is -1 and holds zeros.
    """
    pair = tl.load(COLUMNS + tl.arange(0, CLASS_PAIRS))
    mask = row_mask[:, None] & (pair >= 0)[None, :]
    first = tl.where(half != 0, pair, 2 * pair)
    second = tl.where(half != 0, pair + PAIRS, 2 * pair + 1)
    base = Q + rows.to(tl.int64)[:, None] * stride_s
    x = tl.load(base + first.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(base + second.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    table = rows.to(tl.int64)[:, None] * PAIRS + pair[None, :]
    cos = tl.load(COS + table, mask=mask, other=1.0)
    sin = tl.load(SIN + table, mask=mask, other=0.0)
    phase = tl.load(PHASE + table, mask=mask, other=0.0)
    w = tl.load(WEIGHTS + weight * PAIRS + pair, mask=when(weight >= 0, pair >= 0), other=1.0)[None, :]
    return (x * cos - y * sin) * w, (y * cos + x * sin) * w, phase, pair, first, second


@triton.jit
def turned_product(
    x, y, query_phase, factor, KEY_PHASE, K, representatives, keys, present, pair, first, second, stride_s, stride_d,
    PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one pair class in a patch, [U, M, N]: query turned once per representative, times U x N keys.

    representatives: [U] keys that stand for the coordinates; keys, present: [U, N].
    """
    phase = tl.load(
        KEY_PHASE + representatives.to(tl.int64)[:, None] * PAIRS + pair[None, :], mask=(pair >= 0)[None, :], other=0.0
    )  # [U, C]
    angle = factor[None, :, None] * (query_phase[None, :, :] - phase[:, None, :])  # [U, M, C]
    cos, sin = tl.cos(angle), tl.sin(angle)
    turned_x = (x[None, :, :] * cos - y[None, :, :] * sin).to(K.dtype.element_ty)
    turned_y = (y[None, :, :] * cos + x[None, :, :] * sin).to(K.dtype.element_ty)
    base = K + keys.to(tl.int64)[:, None, :] * stride_s
    mask = present[:, None, :] & (pair >= 0)[None, :, None]
    k_x = tl.load(base + first.to(tl.int64)[None, :, None] * stride_d, mask=mask, other=0.0)  # [U, C, N]
    k_y = tl.load(base + second.to(tl.int64)[None, :, None] * stride_d, mask=mask, other=0.0)
    s = tl.dot(turned_x, k_x, input_precision=PRECISION)
    return tl.dot(turned_y, k_y, s, input_precision=PRECISION)


@triton.jit
def patch_kernel(
    Q, K, V, STATE, STATE_M, STATE_L,
    SEGMENTS, PATCH_KEYS, PATCH_A, PATCH_B, PATCH_C, COLUMNS_A, COLUMNS_B, COLUMNS_C,
    QUERY_COS, QUERY_SIN, QUERY_PHASE, KEY_PHASE, SCALE, SCALED_PAIRS,
    WEIGHTS, GROUPS, GAINS, ROW_MEANS, KEY_MASK, SLOTS, SLOT_LEVEL,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    num_segments, num_queries, num_tiles, heads, key_heads, num_groups, continuous,
    cos_batch_stride, cos_variant_stride, query_phase_batch_stride, key_phase_batch_stride, scale_batch_stride,
    groups_batch_stride, gains_batch_stride, mask_batch_stride, slots_batch_stride, level_batch_stride, half, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SLOT_TILE: tl.constexpr,
    PAIRS_A: tl.constexpr, PAIRS_B: tl.constexpr, PAIRS_C: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of continuous queries of one head against the patches of all scaled segments."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    KEYS: tl.constexpr = PATCH * PATCH
    tile = tl.program_id(0) % num_tiles
    bh = tl.program_id(0) // num_tiles
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    kv_head = h // (heads // key_heads)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(SLOTS + b * slots_batch_stride + offs_m)
    level = tl.load(SLOT_LEVEL + b * level_batch_stride + tile * BLOCK_M // SLOT_TILE)
    row_mask = when(level < 0, rows >= 0)
    q_base = Q + b * stride_qb + h.to(tl.int64) * stride_qh
    k_base = K + b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_base = V + b * stride_vb + kv_head.to(tl.int64) * stride_vh
    cos, sin = QUERY_COS + b * cos_batch_stride, QUERY_SIN + b * cos_batch_stride
    query_phase = QUERY_PHASE + b * query_phase_batch_stride
    key_phase = KEY_PHASE + b * key_phase_batch_stride
    groups, gains = GROUPS + b * groups_batch_stride, GAINS + b * gains_batch_stride
    factor = tl.load(SCALE + b * scale_batch_stride + rows, mask=row_mask, other=1.0) - 1.0
    offs_d = tl.arange(0, BLOCK_D)
    offs_u = tl.arange(0, PATCH)
    log2_scale = scale * LOG2E

    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for s in range(num_segments):
        row = SEGMENTS + s * SEGMENT_FIELDS
        first_patch = tl.load(row + PATCH_START)
        last_patch = tl.load(row + PATCH_STOP)
        weight = tl.load(row + WEIGHT)
        group = tl.load(row + GROUP)
        gain = tl.load(row + GAIN)
        # Affine map of the logits, as in the fused loop.
        bias = tl.load(groups + group * 3, mask=group >= 0, other=1.0)
        delta = tl.load(groups + group * 3 + 1, mask=group >= 0, other=1.0)
        g = tl.load(gains + gain * num_queries + rows, mask=when(gain >= 0, row_mask), other=1.0)
        x = load_rotated(
            q_base, cos + cos_variant_stride, sin + cos_variant_stride, rows, rows, row_mask, stride_qs, stride_qd,
            half, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        w = tl.load(
            WEIGHTS + weight * PAIRS + pair_of(offs_d, half, PAIRS), mask=when(weight >= 0, offs_d < HEAD_DIM), other=1.0
        )
        own = ((b * key_heads + kv_head) * num_groups + group) * continuous + offs_m
        mu = tl.load(
            ROW_MEANS + own.to(tl.int64)[:, None] * HEAD_DIM + offs_d[None, :],
            mask=when(group >= 0, row_mask)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        row_scale = log2_scale * delta * g
        row_bias = log2_scale * (bias - delta) * g * tl.sum(x * w[None, :] * mu, 1)

        xa, ya, phase_a, pair_a, first_a, second_a = query_pairs(
            q_base, cos, sin, query_phase, WEIGHTS, COLUMNS_A, rows, row_mask, weight, stride_qs, stride_qd, half,
            PAIRS, PAIRS_A,
        )  # fmt: skip
        xb, yb, phase_b, pair_b, first_b, second_b = query_pairs(
            q_base, cos, sin, query_phase, WEIGHTS, COLUMNS_B, rows, row_mask, weight, stride_qs, stride_qd, half,
            PAIRS, PAIRS_B,
        )  # fmt: skip
        xc, yc, phase_c, pair_c, first_c, second_c = query_pairs(
            q_base, cos, sin, query_phase, WEIGHTS, COLUMNS_C, rows, row_mask, weight, stride_qs, stride_qd, half,
            PAIRS, PAIRS_C,
        )  # fmt: skip
        # Class C also holds the pairs no scale covers; they do not turn.
        turns = tl.load(SCALED_PAIRS + pair_c, mask=pair_c >= 0, other=0) != 0

        for patch in range(first_patch, last_patch):
            keys = tl.load(PATCH_KEYS + patch * KEYS + offs_u[:, None] * PATCH + offs_u[None, :])  # [U, N]
            present = keys >= 0
            if HAS_MASK:
                present = present & (tl.load(KEY_MASK + b * mask_batch_stride + keys, mask=present, other=0) != 0)
            row_key = tl.load(PATCH_A + patch * PATCH + offs_u)
            column_key = tl.load(PATCH_B + patch * PATCH + offs_u)
            patch_key = tl.load(PATCH_C + patch)
            qk = turned_product(
                xa, ya, phase_a, factor, key_phase, k_base, row_key, keys, present, pair_a, first_a, second_a,
                stride_ks, stride_kd, PAIRS, PRECISION,
            )  # [U, M, N]  # fmt: skip
            across = turned_product(
                xb, yb, phase_b, factor, key_phase, k_base, column_key, tl.trans(keys), tl.trans(present), pair_b,
                first_b, second_b, stride_ks, stride_kd, PAIRS, PRECISION,
            )  # [N, M, U]  # fmt: skip
            qk += tl.permute(across, (2, 1, 0))

            key = tl.reshape(keys, (KEYS,))
            flat = tl.reshape(present, (KEYS,))
            phase = tl.load(key_phase + patch_key.to(tl.int64) * PAIRS + pair_c, mask=pair_c >= 0, other=0.0)
            angle = tl.where(turns[None, :], factor[:, None] * (phase_c - phase[None, :]), 0.0)
            cos_c, sin_c = tl.cos(angle), tl.sin(angle)
            mask_c = (pair_c >= 0)[:, None] & flat[None, :]
            k_rows = k_base + key.to(tl.int64)[None, :] * stride_ks
            k_x = tl.load(k_rows + first_c.to(tl.int64)[:, None] * stride_kd, mask=mask_c, other=0.0)
            k_y = tl.load(k_rows + second_c.to(tl.int64)[:, None] * stride_kd, mask=mask_c, other=0.0)
            rest = tl.dot((xc * cos_c - yc * sin_c).to(k_x.dtype), k_x, input_precision=PRECISION)
            rest = tl.dot((yc * cos_c + xc * sin_c).to(k_y.dtype), k_y, rest, input_precision=PRECISION)

            qk = tl.reshape(tl.permute(qk, (1, 0, 2)), (BLOCK_M, KEYS)) + rest  # [BLOCK_M, KEYS]
            qk = tl.where(flat[None, :], qk * row_scale[:, None] + row_bias[:, None], -float("inf"))
            p, m_i, l_i, acc = softmax_step(qk, m_i, l_i, acc, HAS_MASK)
            v = tl.load(
                v_base + key.to(tl.int64)[:, None] * stride_vs + offs_d.to(tl.int64)[None, :] * stride_vd,
                mask=flat[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)

    state = bh.to(tl.int64) * continuous + offs_m
    tl.store(STATE_M + state, m_i, mask=row_mask)
    tl.store(STATE_L + state, l_i, mask=row_mask)
    tl.store(
        STATE + state[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    )


def patch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_rotation: tuple[torch.Tensor, torch.Tensor],
    half: bool,
    key_mask: torch.Tensor | None,
    tables: SegmentTables,
    patches: dict[str, torch.Tensor],
    scale: float,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Online softmax of the continuous slots over the scaled segments.

    Args:
        q, k, v, query_rotation, half, key_mask, tables, scale: as in :func:`fastrope.kernels.fused_attention`.
        patches: ``keys (P, 16, 16)``, ``a, b (P, 16)``, ``c (P,)`` int32 rows in key order; ``columns_a, columns_b,
            columns_c`` the pairs of each class padded with -1 to powers of two; ``query_phase (Bx, Sq, D/2)``,
            ``key_phase (Bx, Sk, D/2)``, ``scale (Bx, Sq)`` float32; ``scaled_pairs (D/2,)`` bool.

    Returns:
        ``acc (B, H, C, D)``, ``m`` and ``l (B, H, C)``, float32: unnormalised output, running maximum (base 2), sum.
    """
    batch, num_queries, heads, dim = q.shape
    slots = tables.continuous
    acc = torch.empty((batch, heads, slots, dim), dtype=torch.float32, device=q.device)
    m, l_sum = (torch.empty((batch, heads, slots), dtype=torch.float32, device=q.device) for _ in range(2))
    cos, sin = query_rotation
    num_tiles = slots // config.block_m

    def or_unused(x):
        return m if x is None else x

    t, p = tables, patches
    patch_kernel[(num_tiles * batch * heads,)](
        q, k, v, acc, m, l_sum,
        t.segments, p["keys"], p["a"], p["b"], p["c"], p["columns_a"], p["columns_b"], p["columns_c"],
        cos, sin, p["query_phase"], p["key_phase"], p["scale"], p["scaled_pairs"],
        or_unused(t.weights), or_unused(t.groups), or_unused(t.gains), or_unused(t.row_means), or_unused(key_mask),
        t.slots, t.slot_level,
        *q.stride(), *k.stride(), *v.stride(),
        t.segments.shape[0], num_queries, num_tiles, heads, k.shape[1],
        t.groups.shape[1] if t.groups is not None else 0, slots,
        batch_stride(cos), cos.stride(1), batch_stride(p["query_phase"]), batch_stride(p["key_phase"]),
        batch_stride(p["scale"]), batch_stride(t.groups), batch_stride(t.gains), batch_stride(key_mask),
        batch_stride(t.slots), batch_stride(t.slot_level), int(half), scale,
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_M=config.block_m, SLOT_TILE=SLOT_TILE,
        PAIRS_A=p["columns_a"].shape[0], PAIRS_B=p["columns_b"].shape[0], PAIRS_C=p["columns_c"].shape[0],
        HAS_MASK=key_mask is not None, PRECISION=precision(q.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return acc, m, l_sum
