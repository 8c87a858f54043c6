"""Prepared rows: keys gathered and rotated once per level, queries rotated and weighted once per view.

One pass over k and one over q take all rotation and weighting out of the attention loop, whose tiles are then plain
loads.
"""

import torch
import triton
import triton.language as tl

from .common import (
    FIRST_OF_VIEW,
    GROUP,
    OWN_GROUP,
    SCALED,
    SEGMENT_FIELDS,
    VIEW,
    WEIGHT,
    load_rotated,
    load_rows,
    load_stream,
    pair_of,
    when,
)  # fmt: skip
from .config import LaunchConfig
from .streams import Streams, stream_arguments
from .tables import SLOT_TILE, SegmentTables, batch_stride

PACK_COUNTS = (
    "heads", "num_rows", "table_batch_stride", "half", "split", "head_rows", "token_rows",
)  # fmt: skip


@triton.jit(do_not_specialize=PACK_COUNTS)
def pack_kernel(
    X, X2, W, W2, OUT, SOURCE, COS, SIN,
    stride_xb, stride_xs, stride_xh, stride_xd,
    stride_yb, stride_ys, stride_yh, stride_yd,
    heads, num_rows, table_batch_stride, half, split, head_rows, token_rows, eps, eps2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, GATHER: tl.constexpr, ROTATE: tl.constexpr,
    STREAMS: tl.constexpr,
):  # fmt: skip
    """OUT[b, h, n] = R(phi[n]) X[b, SOURCE[n], h] for one block of rows of one head; X joined of streams if STREAMS,
    and normalised if it is rotated too. In OUT heads lie head_rows rows of HEAD_DIM apart and tokens token_rows."""
    blocks = tl.cdiv(num_rows, BLOCK_N)
    block = tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = offs_n < num_rows
    source = offs_n
    if GATHER:
        source = tl.load(SOURCE + offs_n, mask=valid, other=0)
    base = X + b * stride_xb + h * stride_xh
    if ROTATE:
        x = load_rotated(
            base, X2 + b * stride_yb + h * stride_yh, W, W2,
            COS + b * table_batch_stride, SIN + b * table_batch_stride, source, offs_n, valid, split, eps, eps2,
            stride_xs, stride_xd, stride_ys, stride_yd, half, HEAD_DIM, BLOCK_D, STREAMS,
        )  # fmt: skip
    elif STREAMS:
        channels = tl.arange(0, BLOCK_D)
        x = load_stream(
            base, X2 + b * stride_yb + h * stride_yh, source, channels, valid[:, None] & (channels < HEAD_DIM)[None, :],
            split, stride_xs, stride_xd, stride_ys, stride_yd, STREAMS,
        )  # fmt: skip
    else:
        x = load_rows(base, source, valid, stride_xs, stride_xd, HEAD_DIM, BLOCK_D)
    offs_d = tl.arange(0, BLOCK_D)  # x: [BLOCK_N, BLOCK_D]
    row = b * heads * num_rows + h * head_rows + offs_n.to(tl.int64) * token_rows
    out = OUT + row[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out, x.to(OUT.dtype.element_ty), mask=valid[:, None] & (offs_d < HEAD_DIM)[None, :])


def pack_rows(
    x: torch.Tensor | Streams,
    source: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    half: bool,
    config: LaunchConfig,
    tokens_first: bool = False,
) -> torch.Tensor:
    """Gather and rotate tokens.

    Args:
        x: ``(B, S, H, D)``, any strides, or streams, which are joined in the same pass, and normalised where ``cos`` is
            given.
        source: ``(R,)`` int32, the token each packed row is made from; None keeps all ``R = S`` where they are.
        cos, sin: ``(1 or B, R, D/2)`` float32, rows contiguous, or None to gather only.
        half: pairing ``(c, c + D/2)`` rather than ``(2c, 2c + 1)``.
        tokens_first: lay rows out as ``(B, R, H, D)`` in memory.

    Returns:
        ``(B, H, R, D)``, contiguous but for ``tokens_first``, dtype of ``x``; rotated in float32 and rounded once.
    """
    batch, tokens, heads, dim = x.shape
    rows = tokens if source is None else source.shape[0]
    lead, head_rows, token_rows = ((rows, heads), 1, heads) if tokens_first else ((heads, rows), rows, 1)
    out = torch.empty((batch, *lead, dim), dtype=x.dtype, device=x.device)
    pack_kernel[(triton.cdiv(rows, config.block_n) * batch * heads,)](
        OUT=out, SOURCE=out if source is None else source, COS=out if cos is None else cos,
        SIN=out if sin is None else sin, heads=heads, num_rows=rows, table_batch_stride=batch_stride(cos),
        half=int(half), head_rows=head_rows, token_rows=token_rows, **stream_arguments(x),
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_N=config.block_n,
        GATHER=source is not None, ROTATE=cos is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out.transpose(1, 2) if tokens_first else out


QUERIES_COUNTS = (
    "num_segments", "num_views", "num_rows", "num_slots", "heads", "key_heads", "num_groups", "num_levels",
    "own_groups", "continuous", "num_rest", "cos_batch_stride", "cos_variant_stride", "groups_batch_stride",
    "slots_batch_stride", "level_batch_stride", "half", "split",
)  # fmt: skip


@triton.jit(do_not_specialize=QUERIES_COUNTS)
def queries_kernel(
    X, X2, W, W2, OUT, REST, BIAS, SEGMENTS, COS, SIN, WEIGHTS, GROUPS, MEANS, ROW_MEANS, SLOTS, SLOT_LEVEL,
    stride_xb, stride_xs, stride_xh, stride_xd,
    stride_yb, stride_ys, stride_yh, stride_yd,
    num_segments, num_views, num_rows, num_slots, heads, key_heads, num_groups, num_levels,
    own_groups, continuous, num_rest, cos_batch_stride, cos_variant_stride, groups_batch_stride, slots_batch_stride,
    level_batch_stride, half, split, eps, eps2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SLOT_TILE: tl.constexpr,
    ROTATE: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """Queries of one block of rows (slots, where there are any) as every segment sees them.

    OUT[b, h, view, row] = w R(phi') q and BIAS[b, h, segment, row] = (lambda - delta) <w R(phi') q, mu>. REST, of the
    first num_rest rows, is what rounding left of OUT.
    """
    blocks = tl.cdiv(num_rows, BLOCK_M)
    block = tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    kv = b * key_heads + h // (heads // key_heads)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = offs_m < num_rows
    slot = tl.load(SLOTS + b * slots_batch_stride + offs_m, mask=offs_m < num_slots, other=-1)
    slotted = block * BLOCK_M < num_slots
    rows = tl.where(slotted, slot, offs_m)
    level = tl.load(SLOT_LEVEL + b * level_batch_stride + block * BLOCK_M // SLOT_TILE, mask=slotted, other=0)
    row_mask = (rows >= 0) & in_range
    base = X + b * stride_xb + h.to(tl.int64) * stride_xh
    base2 = X2 + b * stride_yb + h.to(tl.int64) * stride_yh
    offs_d = tl.arange(0, BLOCK_D)
    channel = offs_d < HEAD_DIM
    pair = pair_of(offs_d, half, HEAD_DIM // 2)
    groups = GROUPS + b * groups_batch_stride
    for s in range(num_segments):
        row = SEGMENTS + s * SEGMENT_FIELDS
        weight = tl.load(row + WEIGHT)
        group = tl.load(row + GROUP)
        view = tl.load(row + VIEW)
        if ROTATE:
            table = b * cos_batch_stride + tl.load(row + SCALED) * cos_variant_stride
            x = load_rotated(
                base, base2, W, W2, COS + table, SIN + table, rows, rows, row_mask, split, eps, eps2,
                stride_xs, stride_xd, stride_ys, stride_yd, half, HEAD_DIM, BLOCK_D, STREAMS,
            )  # fmt: skip
        else:
            x = load_rows(base, rows, row_mask, stride_xs, stride_xd, HEAD_DIM, BLOCK_D).to(tl.float32)
        w = tl.load(WEIGHTS + weight * (HEAD_DIM // 2) + pair, mask=when(weight >= 0, channel), other=1.0)
        x = x * w[None, :]  # [BLOCK_M, BLOCK_D]
        out = ((bh.to(tl.int64) * num_views + view) * num_rows + offs_m)[:, None] * HEAD_DIM + offs_d[None, :]
        first = tl.load(row + FIRST_OF_VIEW) != 0
        rounded = x.to(OUT.dtype.element_ty)
        tl.store(OUT + out, rounded, mask=when(first, in_range)[:, None] & channel[None, :])
        rest = ((bh.to(tl.int64) * num_views + view) * num_rest + offs_m)[:, None] * HEAD_DIM + offs_d[None, :]
        rest_mask = when(first, offs_m < num_rest)[:, None] & channel[None, :]
        tl.store(REST + rest, (x - rounded.to(tl.float32)).to(OUT.dtype.element_ty), mask=rest_mask)
        means = (kv * num_groups + group) * num_levels + tl.maximum(level, 0)
        mu = tl.load(MEANS + means * HEAD_DIM + offs_d, mask=when((group >= 0) & (level >= 0), channel), other=0.0)
        own_group = kv * own_groups + tl.load(row + OWN_GROUP)
        own = (own_group * continuous + offs_m)[:, None] * HEAD_DIM + offs_d[None, :]
        own_mask = when((group >= 0) & (level < 0), row_mask)[:, None] & channel[None, :]
        own_mu = tl.load(ROW_MEANS + own, mask=own_mask, other=0.0)
        shift = tl.load(groups + group * 3, mask=group >= 0, other=1.0)
        shift -= tl.load(groups + group * 3 + 1, mask=group >= 0, other=1.0)
        bias = shift * tl.sum(x * (mu[None, :] + own_mu), 1)
        tl.store(BIAS + (bh.to(tl.int64) * num_segments + s) * num_rows + offs_m, bias, mask=when(group >= 0, in_range))


def prepare_queries(
    q: torch.Tensor | Streams,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    half: bool,
    tables: SegmentTables,
    rest: bool,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries as every segment sees them, in slot order.

    Args:
        q: ``(B, Sq, H, D)``, any strides, or streams (with a rotation).
        rotation: cos and sin ``(Bx, variants, Sq, D/2)`` float32, or None.
        half: pairing ``(c, c + D/2)`` rather than ``(2c, 2c + 1)``.
        tables: the plan's tables, with the means of the groups.
        rest: also return what rounding left of the continuous slots.

    Returns:
        ``(B, H, views, N, D)`` in the dtype of q, ``N`` slots (``Sq`` where queries keep their order), the row bias
        ``(B, H, segments, N)`` float32, of segments in a group, and with ``rest`` ``(B, H, views, C, D)``, else None.
    """
    batch, num_queries, heads, dim = q.shape
    t = tables
    num_slots = t.slots.shape[1] if t.slots is not None else 0
    rows = num_slots or num_queries
    segments = t.segments.shape[0]
    out = torch.empty((batch, heads, t.num_views, rows, dim), dtype=q.dtype, device=q.device)
    bias = torch.empty((batch, heads, segments, rows), dtype=torch.float32, device=q.device)
    left = out.new_empty((batch, heads, t.num_views, t.continuous, dim)) if rest else None
    cos, sin = rotation or (bias, bias)
    groups, means, row_means = (bias if x is None else x for x in (t.groups, t.means, t.row_means))
    queries_kernel[(triton.cdiv(rows, config.block_m) * batch * heads,)](
        OUT=out, REST=out if left is None else left, BIAS=bias, SEGMENTS=t.segments, COS=cos, SIN=sin,
        WEIGHTS=bias if t.weights is None else t.weights,
        GROUPS=groups, MEANS=means, ROW_MEANS=row_means, SLOTS=t.segments if t.slots is None else t.slots,
        SLOT_LEVEL=t.segments if t.slots is None else t.slot_level, num_segments=segments, num_views=t.num_views,
        num_rows=rows, num_slots=num_slots, heads=heads, key_heads=t.key_heads,
        num_groups=0 if t.groups is None else t.groups.shape[1], num_levels=1 + t.num_levels,
        own_groups=0 if t.row_means is None else t.row_means.shape[2], continuous=t.continuous,
        num_rest=t.continuous if rest else 0, cos_batch_stride=batch_stride(rotation and cos),
        cos_variant_stride=cos.stride(1) if rotation and cos.shape[1] > 1 else 0,
        groups_batch_stride=batch_stride(t.groups), slots_batch_stride=batch_stride(t.slots),
        level_batch_stride=batch_stride(t.slot_level), half=int(half), **stream_arguments(q),
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_M=config.block_m, SLOT_TILE=SLOT_TILE, ROTATE=rotation is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, bias, left
