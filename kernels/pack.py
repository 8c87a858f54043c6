"""Prepared rows: keys gathered and rotated once per scale bucket, queries rotated and weighted once per variant.

One pass over k and one over q take all rotation and weighting out of the attention loop, whose tiles are then plain
loads.
"""

import torch
import triton
import triton.language as tl

from . import abi
from .common import (
    FIRST_OF_VARIANT,
    GROUP,
    GROUP_BIAS,
    GROUP_DELTA,
    GROUP_FIELDS,
    PASS_GROUP,
    SCALED,
    SEGMENT_FIELDS,
    VARIANT,
    WEIGHT,
    load_rotated,
    load_rows,
    load_stream,
    pair_of,
    when,
)  # fmt: skip
from .config import LaunchConfig
from .streams import Streams, stream_arguments
from .tables import KernelTables, batch_stride

PACK_COUNTS = (
    "heads", "num_rows", "table_batch_stride", "interleaved", "split", "head_rows", "token_rows",
)  # fmt: skip


@triton.jit(do_not_specialize=PACK_COUNTS)
def pack_kernel(
    X, X2, W, W2, OUT, SOURCE, COS, SIN,
    stride_xb, stride_xs, stride_xh, stride_xd,
    stride_yb, stride_ys, stride_yh, stride_yd,
    heads, num_rows, table_batch_stride, interleaved, split, head_rows, token_rows, eps, eps2,
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
            stride_xs, stride_xd, stride_ys, stride_yd, interleaved, HEAD_DIM, BLOCK_D, STREAMS,
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
    interleaved: bool,
    config: LaunchConfig,
    tokens_first: bool = False,
) -> torch.Tensor:
    """Gather and rotate tokens.

    Args:
        x: ``(B, S, H, D)``, any strides, or streams, which are joined in the same pass, and normalised where ``cos`` is
            given.
        source: ``(R,)`` int32, the token each packed row is made from; None keeps all ``R = S`` where they are.
        cos, sin: ``(1 or B, R, D/2)`` float32, rows contiguous, or None to gather only.
        interleaved: pairing ``(2c, 2c + 1)`` rather than ``(c, c + D/2)``.
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
        interleaved=int(interleaved), head_rows=head_rows, token_rows=token_rows, **stream_arguments(x),
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_N=config.block_n,
        GATHER=source is not None, ROTATE=cos is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out.transpose(1, 2) if tokens_first else out


QUERIES_COUNTS = (
    "num_segments", "num_variants", "num_rows", "num_sorted", "heads", "key_heads", "num_groups", "num_buckets",
    "pass_groups", "num_per_query", "num_residual", "cos_batch_stride", "cos_variant_stride", "groups_batch_stride",
    "sorted_batch_stride", "bucket_batch_stride", "interleaved", "split",
)  # fmt: skip


@triton.jit(do_not_specialize=QUERIES_COUNTS)
def queries_kernel(
    X, X2, W, W2, OUT, RESIDUAL, BIAS, SEGMENTS, COS, SIN, WEIGHTS, GROUPS, MEANS, PER_QUERY_MEANS,
    SORTED_QUERIES, TILE_BUCKET,
    stride_xb, stride_xs, stride_xh, stride_xd,
    stride_yb, stride_ys, stride_yh, stride_yd,
    num_segments, num_variants, num_rows, num_sorted, heads, key_heads, num_groups, num_buckets,
    pass_groups, num_per_query, num_residual, cos_batch_stride, cos_variant_stride, groups_batch_stride,
    sorted_batch_stride, bucket_batch_stride, interleaved, split, eps, eps2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, QUERY_TILE: tl.constexpr,
    ROTATE: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """Queries of one block of rows as every segment sees them; rows are sorted queries where there are any.

    OUT[b, h, variant, row] = w R(phi') q and BIAS[b, h, segment, row] = (lambda - delta) <w R(phi') q, mu>. RESIDUAL
    is what rounding left of the first num_residual rows of OUT.
    """
    blocks = tl.cdiv(num_rows, BLOCK_M)
    block = tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    kv = b * key_heads + h // (heads // key_heads)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = offs_m < num_rows
    query = tl.load(SORTED_QUERIES + b * sorted_batch_stride + offs_m, mask=offs_m < num_sorted, other=-1)
    sorted_tile = block * BLOCK_M < num_sorted
    rows = tl.where(sorted_tile, query, offs_m)
    bucket = tl.load(TILE_BUCKET + b * bucket_batch_stride + block * BLOCK_M // QUERY_TILE, mask=sorted_tile, other=0)
    row_mask = (rows >= 0) & in_range
    base = X + b * stride_xb + h.to(tl.int64) * stride_xh
    base2 = X2 + b * stride_yb + h.to(tl.int64) * stride_yh
    offs_d = tl.arange(0, BLOCK_D)
    channel = offs_d < HEAD_DIM
    pair = pair_of(offs_d, interleaved, HEAD_DIM // 2)
    groups = GROUPS + b * groups_batch_stride
    for s in range(num_segments):
        row = SEGMENTS + s * SEGMENT_FIELDS
        weight = tl.load(row + WEIGHT)
        group = tl.load(row + GROUP)
        variant = tl.load(row + VARIANT)
        if ROTATE:
            table = b * cos_batch_stride + tl.load(row + SCALED) * cos_variant_stride
            x = load_rotated(
                base, base2, W, W2, COS + table, SIN + table, rows, rows, row_mask, split, eps, eps2,
                stride_xs, stride_xd, stride_ys, stride_yd, interleaved, HEAD_DIM, BLOCK_D, STREAMS,
            )  # fmt: skip
        else:
            x = load_rows(base, rows, row_mask, stride_xs, stride_xd, HEAD_DIM, BLOCK_D).to(tl.float32)
        w = tl.load(WEIGHTS + weight * (HEAD_DIM // 2) + pair, mask=when(weight >= 0, channel), other=1.0)
        x = x * w[None, :]  # [BLOCK_M, BLOCK_D]
        out = ((bh.to(tl.int64) * num_variants + variant) * num_rows + offs_m)[:, None] * HEAD_DIM + offs_d[None, :]
        first = tl.load(row + FIRST_OF_VARIANT) != 0
        rounded = x.to(OUT.dtype.element_ty)
        tl.store(OUT + out, rounded, mask=when(first, in_range)[:, None] & channel[None, :])
        residual = ((bh.to(tl.int64) * num_variants + variant) * num_residual + offs_m)[:, None] * HEAD_DIM + offs_d[
            None, :
        ]
        residual_mask = when(first, offs_m < num_residual)[:, None] & channel[None, :]
        tl.store(RESIDUAL + residual, (x - rounded.to(tl.float32)).to(OUT.dtype.element_ty), mask=residual_mask)
        means = (kv * num_groups + group) * num_buckets + tl.maximum(bucket, 0)
        mu = tl.load(MEANS + means * HEAD_DIM + offs_d, mask=when((group >= 0) & (bucket >= 0), channel), other=0.0)
        pass_group = kv * pass_groups + tl.load(row + PASS_GROUP)
        at = (pass_group * num_per_query + offs_m)[:, None] * HEAD_DIM + offs_d[None, :]
        at_mask = when((group >= 0) & (bucket < 0), row_mask)[:, None] & channel[None, :]
        query_mu = tl.load(PER_QUERY_MEANS + at, mask=at_mask, other=0.0)
        shift = tl.load(groups + group * GROUP_FIELDS + GROUP_BIAS, mask=group >= 0, other=1.0)
        shift -= tl.load(groups + group * GROUP_FIELDS + GROUP_DELTA, mask=group >= 0, other=1.0)
        bias = shift * tl.sum(x * (mu[None, :] + query_mu), 1)
        tl.store(BIAS + (bh.to(tl.int64) * num_segments + s) * num_rows + offs_m, bias, mask=when(group >= 0, in_range))


def prepare_queries(
    q: torch.Tensor | Streams,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    tables: KernelTables,
    residual: bool,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries as every segment sees them, in the order of ``tables.sorted_queries``.

    Args:
        q: ``(B, Sq, H, D)``, any strides, or streams (with a rotation).
        rotation: cos and sin ``(Bx, variants, Sq, D/2)`` float32, or None.
        interleaved: pairing ``(2c, 2c + 1)`` rather than ``(c, c + D/2)``.
        tables: the plan's tables, with the means of the groups.
        residual: also return the rounding residual of queries with per-query scales.

    Returns:
        ``(B, H, variants, N, D)`` in the dtype of q, ``N`` rows (``Sq`` where queries keep their order), the row bias
        ``(B, H, segments, N)`` float32, of segments in a group, and the residual
        ``(B, H, variants, C, D)`` or None.
    """
    batch, num_queries, heads, dim = q.shape
    t = tables
    num_sorted = t.sorted_queries.shape[1] if t.sorted_queries is not None else 0
    rows = num_sorted or num_queries
    segments = t.segments.shape[0]
    out = torch.empty((batch, heads, t.num_variants, rows, dim), dtype=q.dtype, device=q.device)
    bias = torch.empty((batch, heads, segments, rows), dtype=torch.float32, device=q.device)
    left = out.new_empty((batch, heads, t.num_variants, t.num_per_query, dim)) if residual else None
    cos, sin = rotation or (bias, bias)
    # A pointer stands in for a table that a call has not; its loads are masked off.
    weights, groups, means, per_query_means = (
        bias if x is None else x for x in (t.weights, t.groups, t.means, t.per_query_means)
    )
    queries_kernel[(triton.cdiv(rows, config.block_m) * batch * heads,)](
        OUT=out, RESIDUAL=out if left is None else left, BIAS=bias, SEGMENTS=t.segments, COS=cos, SIN=sin,
        WEIGHTS=weights, GROUPS=groups, MEANS=means, PER_QUERY_MEANS=per_query_means,
        SORTED_QUERIES=t.segments if t.sorted_queries is None else t.sorted_queries,
        TILE_BUCKET=t.segments if t.tile_bucket is None else t.tile_bucket,
        num_segments=segments, num_variants=t.num_variants, num_rows=rows, num_sorted=num_sorted, heads=heads,
        key_heads=t.key_heads, num_groups=0 if t.groups is None else t.groups.shape[1],
        num_buckets=1 + t.num_buckets, pass_groups=0 if t.per_query_means is None else t.per_query_means.shape[2],
        num_per_query=t.num_per_query, num_residual=t.num_per_query if residual else 0,
        cos_batch_stride=batch_stride(rotation and cos),
        cos_variant_stride=cos.stride(1) if rotation and cos.shape[1] > 1 else 0,
        groups_batch_stride=batch_stride(t.groups), sorted_batch_stride=batch_stride(t.sorted_queries),
        bucket_batch_stride=batch_stride(t.tile_bucket), interleaved=int(interleaved), **stream_arguments(q),
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_M=config.block_m, QUERY_TILE=abi.QUERY_TILE,
        ROTATE=rotation is not None, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, bias, left
