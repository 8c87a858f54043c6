"""Prepared rows: keys gathered and rotated once per scale bucket, queries rotated and weighted once per variant.

One pass over k and one over q take all rotation and weighting out of the attention loop, whose tiles are then plain
loads.
"""

from __future__ import annotations

from typing import Any

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
    load_known,
    load_members,
    load_stream_members,
    load_turns,
    norm_weights,
    normalised,
    store_members,
    stream_rows,
)  # fmt: skip
from .config import LaunchConfig
from .launch import Launch, Layout, batch_stride, launch
from .streams import Streams, stream_arguments, stream_facts, stream_tensors
from .tables import KernelTables, ValueFactors

PACK_COUNTS = (
    "heads", "num_rows", "table_rows", "split", "head_rows", "token_rows", "num_tokens", "num_groups",
    "factors_batch_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=PACK_COUNTS)
def pack_kernel(
    X, X2, W, W2, OUT, SOURCE, COS, SIN, FACTORS, MEMBER, MEANS,
    stride_xb, stride_xs, stride_xh, stride_yb, stride_ys, stride_yh, stride_d,
    heads, num_rows, table_rows, split, head_rows, token_rows, num_tokens, num_groups, factors_batch_stride, eps, eps2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr,
    GATHER: tl.constexpr, ROTATE: tl.constexpr, STREAMS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """OUT[b, h, n] = R(phi[n]) X[b, SOURCE[n], h] for one block of rows of one head; X joined of streams if STREAMS,
    and normalised if it is rotated too. Of VALUES it is u (delta X + (lambda - delta) nu). In OUT heads lie head_rows
    rows of HEAD_DIM apart and tokens token_rows."""
    block, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_n < num_rows)[:, None]
    offs_n = tl.minimum(offs_n, num_rows - 1)  # rows beyond are read, too, so that no load has a mask, and not stored
    source = offs_n
    if GATHER:
        source = tl.load(SOURCE + offs_n)
    x_rows, y_rows = stream_rows(
        X + b * stride_xb + h * stride_xh, X2 + b * stride_yb + h * stride_yh, source, split, stride_xs, stride_ys
    )
    in_first = (source < split)[:, None]
    row = b * heads * num_rows + h * head_rows + offs_n.to(tl.int64) * token_rows
    out = (OUT + row * HEAD_DIM)[:, None]
    if ROTATE:
        x, y = load_stream_members(x_rows, y_rows, in_first, stride_d, HEAD_DIM, BLOCK_D, INTERLEAVED, STREAMS)
        if STREAMS:
            w_x, w_y = norm_weights(W, W2, source, split, HEAD_DIM, BLOCK_D, INTERLEAVED)
            x, y = normalised(x, y, w_x, w_y, tl.where(source < split, eps, eps2), HEAD_DIM)
        first = b * table_rows * (HEAD_DIM // 2)
        cos, sin = load_turns(COS + first, SIN + first, offs_n, HEAD_DIM, BLOCK_D)
        store_members(out, x * cos - y * sin, y * cos + x * sin, mask, HEAD_DIM, BLOCK_D, INTERLEAVED)
    else:
        channel = tl.arange(0, BLOCK_D)[None, :]
        known = channel < HEAD_DIM
        if STREAMS:
            x = tl.load(x_rows + channel * stride_d, mask=known & in_first)
            y = tl.load(y_rows + channel * stride_d, mask=known & (in_first == 0))
            x = tl.where(in_first, x, y)
        else:
            x = load_known(x_rows + channel * stride_d, None, known, HEAD_DIM == BLOCK_D)
        if VALUES:
            factors = FACTORS + b * factors_batch_stride + source
            factor = tl.load(factors)[:, None]
            shift = tl.load(factors + num_tokens)[:, None]
            group = tl.load(MEMBER + source)[:, None]
            nu = MEANS + ((b * heads + h) * num_groups + group) * HEAD_DIM + channel
            x = x.to(tl.float32) * factor + shift * tl.load(nu, mask=known & (group >= 0), other=0.0)
        tl.store(out + channel, x.to(OUT.dtype.element_ty), mask=mask & known)


def pack_rows(
    x: torch.Tensor | Streams,
    source: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    config: LaunchConfig,
    tokens_first: bool = False,
    values: ValueFactors | None = None,
) -> torch.Tensor:
    """Gather and rotate tokens, or gather values and modulate them.

    Args:
        x: ``(B, S, H, D)``, any strides, or streams, which are joined in the same pass, and normalised where ``cos`` is
            given.
        source: ``(R,)`` int32, the token each packed row is made from; None keeps all ``R = S`` where they are.
        cos, sin: ``(1 or B, R, D/2)`` float32, rows contiguous, or None to gather only.
        interleaved: pairing ``(2c, 2c + 1)`` rather than ``(c, c + D/2)``.
        tokens_first: lay rows out as ``(B, R, H, D)`` in memory.
        values: what becomes of values; without ``cos``.

    Returns:
        ``(B, H, R, D)``, contiguous but for ``tokens_first``, dtype of ``x``; computed in float32 and rounded once.
    """
    batch, tokens, heads, dim = x.shape
    rows = tokens if source is None else source.shape[0]
    shape = (batch, rows, heads, dim) if tokens_first else (batch, heads, rows, dim)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    factors, member, means = (None,) * 3 if values is None else (values.factors, values.member, values.means)
    tensors = {
        **stream_tensors(x), "OUT": out, "SOURCE": source, "COS": cos, "SIN": sin, "FACTORS": factors,
        "MEMBER": member, "MEANS": means,
    }  # fmt: skip
    launch(_pack, tensors, tokens, tokens_first, interleaved and cos is not None, config, *stream_facts(x))
    return out.transpose(1, 2) if tokens_first else out


def _pack(
    at: dict[str, Layout | None], tokens: int, tokens_first: bool, interleaved: bool, config: LaunchConfig,
    *streams: Any,
) -> Launch:  # fmt: skip
    batch, rows, heads, dim = at["OUT"].shape
    means, factors = at["MEANS"], at["FACTORS"]
    if not tokens_first:
        heads, rows = rows, heads
    head_rows, token_rows = (1, heads) if tokens_first else (rows, 1)
    arguments = dict(
        **stream_arguments(at, *streams), heads=heads, num_rows=rows, table_rows=batch_stride(at["COS"]) // (dim // 2),
        head_rows=head_rows, token_rows=token_rows, HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_N=config.block_n,
        INTERLEAVED=interleaved, GATHER=at["SOURCE"] is not None, ROTATE=at["COS"] is not None,
        VALUES=factors is not None, num_tokens=tokens, num_groups=0 if means is None else means.shape[2],
        factors_batch_stride=batch_stride(factors), **config.options,
    )  # fmt: skip
    grid = (triton.cdiv(rows, config.block_n), heads, batch)
    return Launch(
        pack_kernel, grid, arguments, dict.fromkeys(("SOURCE", "COS", "SIN", "FACTORS", "MEMBER", "MEANS"), "OUT")
    )


SCATTER_COUNTS = ("rows", "num_queries")


@triton.jit(do_not_specialize=SCATTER_COUNTS)
def scatter_kernel(
    X, OUT, PLACES, rows, num_queries, width, BLOCK_N: tl.constexpr
):  # fmt: skip
    """OUT[b, PLACES[n]] = X[b, n], rows of ``width`` adjacent elements, one per program."""
    b, n = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows
    place = tl.load(PLACES + n)
    for start in range(0, width, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        x = tl.load(X + (b * rows + n) * width + offs, mask=offs < width)
        tl.store(OUT + (b * num_queries + place) * width + offs, x, mask=offs < width)


def scatter_rows(x: torch.Tensor, places: torch.Tensor, out: torch.Tensor, config: LaunchConfig) -> None:
    """``out[:, places] = x``: ``x (B, n, H, D)`` and ``out (B, S, H, D)``, contiguous; ``places (n,)`` int32, all
    different."""
    launch(_scatter, {"X": x, "OUT": out, "PLACES": places}, config)


def _scatter(at: dict[str, Layout], config: LaunchConfig) -> Launch:
    batch, rows, heads, dim = at["X"].shape
    arguments = dict(
        rows=rows, num_queries=at["OUT"].shape[1], width=heads * dim, BLOCK_N=config.block_n, **config.options
    )
    return Launch(scatter_kernel, (batch * rows,), arguments)


QUERIES_COUNTS = (
    "num_segments", "num_variants", "num_rows", "num_sorted", "heads", "key_heads", "num_groups",
    "num_buckets", "pass_groups", "num_per_query", "num_residual", "table_rows", "variant_rows", "groups_batch_stride",
    "sorted_batch_stride", "bucket_batch_stride", "split",
)  # fmt: skip


@triton.jit(do_not_specialize=QUERIES_COUNTS)
def queries_kernel(
    X, X2, W, W2, OUT, RESIDUAL, BIAS, SEGMENTS, COS, SIN, WEIGHTS, GROUPS, MEANS, PER_QUERY_MEANS,
    SORTED_QUERIES, TILE_BUCKET,
    stride_xb, stride_xs, stride_xh, stride_yb, stride_ys, stride_yh, stride_d,
    num_segments, num_variants, num_rows, num_sorted, heads, key_heads, heads_ratio, num_groups, num_buckets,
    pass_groups, num_per_query, num_residual, table_rows, variant_rows, groups_batch_stride,
    sorted_batch_stride, bucket_batch_stride, split, eps, eps2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, QUERY_TILE: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROTATE: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """Queries of one block of rows of one head as every segment sees them; rows are sorted queries where there are any.

    OUT[b, h, variant, row] = w R(phi') q, made once per variant, and BIAS[b, h, segment, row] = (lambda - delta)
    <w R(phi') q, mu>. RESIDUAL is what rounding left of the first num_residual rows of OUT.
    """
    block, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kv = b * key_heads + ((tl.program_id(1) + 0.5) * heads_ratio).to(tl.int32)  # shorter than a division
    bh = b * heads + h
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = offs_m < num_rows
    query = tl.load(SORTED_QUERIES + b * sorted_batch_stride + offs_m, mask=offs_m < num_sorted, other=-1)
    sorted_tile = block * BLOCK_M < num_sorted
    # Padding reads a row that is there: a load under a mask takes an instruction more for each of its registers.
    rows = tl.maximum(tl.where(sorted_tile, query, tl.minimum(offs_m, num_rows - 1)), 0)
    bucket = tl.load(TILE_BUCKET + b * bucket_batch_stride + block * BLOCK_M // QUERY_TILE, mask=sorted_tile, other=0)
    x_rows, y_rows = stream_rows(
        X + b * stride_xb + h * stride_xh, X2 + b * stride_yb + h * stride_yh, rows, split, stride_xs, stride_ys
    )
    in_first = (rows < split)[:, None]
    if ROTATE:  # read before the loop, so that memory answers while segments are looked at
        q_x, q_y = load_stream_members(x_rows, y_rows, in_first, stride_d, HEAD_DIM, BLOCK_D, INTERLEAVED, STREAMS)
    if STREAMS:
        w_x, w_y = norm_weights(W, W2, rows, split, HEAD_DIM, BLOCK_D, INTERLEAVED)
        q_x, q_y = normalised(q_x, q_y, w_x, w_y, tl.where(rows < split, eps, eps2), HEAD_DIM)
    pair = tl.arange(0, BLOCK_D // 2)
    groups = GROUPS + b * groups_batch_stride
    for s in tl.range(num_segments, disable_licm=True):
        segment = SEGMENTS + s * SEGMENT_FIELDS
        variant = tl.load(segment + VARIANT)
        if tl.load(segment + FIRST_OF_VARIANT) != 0:
            if ROTATE:
                table = (b * table_rows + tl.load(segment + SCALED) * variant_rows) * (HEAD_DIM // 2)
                cos, sin = load_turns(COS + table, SIN + table, rows, HEAD_DIM, BLOCK_D)
                x, y = q_x * cos - q_y * sin, q_y * cos + q_x * sin
            else:
                x, y = load_members(x_rows, None, stride_d, HEAD_DIM, BLOCK_D, INTERLEAVED)
            weight = tl.load(segment + WEIGHT)
            x, y = x.to(tl.float32), y.to(tl.float32)
            if weight >= 0:
                w = tl.load(WEIGHTS + weight * (HEAD_DIM // 2) + pair, mask=pair < HEAD_DIM // 2, other=1.0)[None, :]
                x, y = x * w, y * w
            of_variant = bh * num_variants + variant
            out = (OUT + of_variant * num_rows * HEAD_DIM + offs_m * HEAD_DIM)[:, None]
            store_members(out, x, y, in_range[:, None], HEAD_DIM, BLOCK_D, INTERLEAVED)
            if block * BLOCK_M < num_residual:  # whole tiles: QUERY_TILE divides num_residual
                left_x = x - x.to(OUT.dtype.element_ty).to(tl.float32)
                left_y = y - y.to(OUT.dtype.element_ty).to(tl.float32)
                left = (RESIDUAL + (of_variant * num_residual + offs_m) * HEAD_DIM)[:, None]
                store_members(left, left_x, left_y, in_range[:, None], HEAD_DIM, BLOCK_D, INTERLEAVED)
            for t in tl.range(s, num_segments, disable_licm=True):
                other = SEGMENTS + t * SEGMENT_FIELDS
                group = tl.load(other + GROUP)
                if (group >= 0) & (tl.load(other + VARIANT) == variant):
                    if bucket >= 0:  # one row for all, which a thread reads once
                        at = (kv * num_groups + group) * num_buckets + bucket
                        means = MEANS + at * HEAD_DIM + 0 * offs_m
                        mu_x, mu_y = load_members(means[:, None], None, 1, HEAD_DIM, BLOCK_D, INTERLEAVED)
                        product = tl.sum(x * mu_x + y * mu_y, 1)
                    else:
                        at = (kv * pass_groups + tl.load(other + PASS_GROUP)) * num_per_query
                        means = PER_QUERY_MEANS + (at * HEAD_DIM + offs_m * HEAD_DIM)
                        mu_x, mu_y = load_members(means[:, None], None, 1, HEAD_DIM, BLOCK_D, INTERLEAVED)
                        product = tl.sum(x * mu_x + y * mu_y, 1)
                    of_group = groups + group * GROUP_FIELDS
                    shift = tl.load(of_group + GROUP_BIAS) - tl.load(of_group + GROUP_DELTA)
                    tl.store(BIAS + (bh * num_segments + t) * num_rows + offs_m, shift * product, mask=in_range)


def prepare_queries(
    q: torch.Tensor | Streams,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    tables: KernelTables,
    means: tuple[torch.Tensor | None, torch.Tensor | None],
    residual: bool,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries as every segment sees them, in the order of ``tables.sorted_queries``.

    Args:
        q: ``(B, Sq, H, D)``, any strides, or streams (with a rotation).
        rotation: cos and sin ``(Bx, variants, Sq, D/2)`` float32, or None.
        interleaved: pairing ``(2c, 2c + 1)`` rather than ``(c, c + D/2)``.
        tables: the plan's tables.
        means: of the groups ``(B, Hkv, G, 1 + buckets, D)`` float32 at each scale bucket, and
            ``(B, Hkv, G', C, D)`` of the G' groups of the pass under per-query scales; None without any.
        residual: also return the rounding residual of queries with per-query scales.

    Returns:
        ``(B, H, variants, N, D)`` in the dtype of q, ``N`` rows (``Sq`` where queries keep their order), the row bias
        ``(B, H, segments, N)`` float32, of segments in a group (without a group it has the shape and no memory), and
        the residual ``(B, H, variants, C, D)`` or None.
    """
    batch, num_queries, heads, dim = q.shape
    t = tables
    num_sorted = t.sorted_queries.shape[1] if t.sorted_queries is not None else 0
    rows = num_sorted or num_queries
    segments = t.segments.shape[0]
    out = torch.empty((batch, heads, t.num_variants, rows, dim), dtype=q.dtype, device=q.device)
    of_rows = batch, heads, segments, rows
    bias = torch.empty(of_rows if t.groups is not None else 1, dtype=torch.float32, device=q.device).expand(of_rows)
    left = out.new_empty((batch, heads, t.num_variants, t.num_per_query, dim)) if residual else None
    cos, sin = rotation or (None, None)
    tensors = {
        **stream_tensors(q), "OUT": out, "RESIDUAL": left, "BIAS": bias, "SEGMENTS": t.segments, "COS": cos, "SIN": sin,
        "WEIGHTS": t.weights, "GROUPS": t.groups, "MEANS": means[0], "PER_QUERY_MEANS": means[1],
        "SORTED_QUERIES": t.sorted_queries, "TILE_BUCKET": t.tile_bucket,
    }  # fmt: skip
    facts = num_queries, t.num_buckets, t.num_per_query
    launch(_queries, tensors, facts, interleaved, config, *stream_facts(q))
    return out, bias, left


def _queries(
    at: dict[str, Layout | None], facts: tuple[int, ...], interleaved: bool, config: LaunchConfig, *streams: Any
) -> Launch:
    batch, heads, variants, rows, dim = at["OUT"].shape
    num_queries, num_buckets, num_per_query = facts
    segments, cos, groups, means, per_query_means, order = (
        at[name] for name in ("SEGMENTS", "COS", "GROUPS", "MEANS", "PER_QUERY_MEANS", "SORTED_QUERIES")
    )
    key_heads = heads if means is None else means.shape[1]
    arguments = dict(
        num_segments=segments.shape[0], num_variants=variants, num_rows=rows,
        num_sorted=0 if order is None else order.shape[1], heads=heads, key_heads=key_heads,
        heads_ratio=key_heads / heads,
        num_groups=0 if groups is None else groups.shape[1], num_buckets=1 + num_buckets,
        pass_groups=0 if per_query_means is None else per_query_means.shape[2], num_per_query=num_per_query,
        num_residual=0 if at["RESIDUAL"] is None else num_per_query, table_rows=batch_stride(cos) // (dim // 2),
        variant_rows=num_queries if cos is not None and cos.shape[1] > 1 else 0,
        groups_batch_stride=batch_stride(groups), sorted_batch_stride=batch_stride(order),
        bucket_batch_stride=batch_stride(at["TILE_BUCKET"]), **stream_arguments(at, *streams),
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_M=config.block_m, QUERY_TILE=abi.QUERY_TILE,
        INTERLEAVED=interleaved, ROTATE=cos is not None, **config.options,
    )  # fmt: skip
    stand_ins = {
        "RESIDUAL": "OUT", "SORTED_QUERIES": "SEGMENTS", "TILE_BUCKET": "SEGMENTS",
        **dict.fromkeys(("COS", "SIN", "WEIGHTS", "GROUPS", "MEANS", "PER_QUERY_MEANS"), "BIAS"),
    }  # fmt: skip
    return Launch(queries_kernel, (triton.cdiv(rows, config.block_m), heads, batch), arguments, stand_ins)
