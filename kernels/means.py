"""BiasDelta: means of rotated keys, one per key head, group and bucket; keys re-weighted around them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    BUCKET_BASE,
    GROUP,
    GROUP_BIAS,
    GROUP_COUNT,
    GROUP_DELTA,
    GROUP_FIELDS,
    SCALED,
    SEGMENT_FIELDS,
    START,
    STOP,
    WEIGHT,
    load_key_bias,
    pair_of,
    stream_rows,
    when,
)  # fmt: skip
from .config import LaunchConfig
from .launch import Launch, Layout, batch_stride, launch, strides
from .streams import Projected, Streams, stream_arguments, stream_tensors

MEANS_COUNTS = (
    "heads", "num_groups", "num_buckets", "scaled_keys", "groups_batch_stride", "key_bias_batch_stride", "split",
)  # fmt: skip


@triton.jit(do_not_specialize=MEANS_COUNTS)
def means_kernel(
    X, X2, OUT, SEGMENTS, GROUPS, MEMBERS, MEMBER_BOUNDS, KEY_BIAS,
    stride_xb, stride_xs, stride_xh, stride_yb, stride_ys, stride_yh, stride_d,
    heads, num_groups, num_buckets, scaled_keys, groups_batch_stride, key_bias_batch_stride, split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """OUT[b, h, g, l] = sum of the group's unmasked rows of X at bucket l / their number, for BLOCK_D channels. Every
    thread sums its own rows and channels; they are added up once, at the end."""
    d_blocks: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    d_block, rest = tl.program_id(0) % d_blocks, tl.program_id(0) // d_blocks
    bucket, rest = rest % num_buckets, rest // num_buckets
    g, bh = rest % num_groups, rest // num_groups
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    first, second = X + b * stride_xb + h * stride_xh, X2 + b * stride_yb + h * stride_yh
    offs_d = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for i in range(tl.load(MEMBER_BOUNDS + g), tl.load(MEMBER_BOUNDS + g + 1)):
        row = SEGMENTS + tl.load(MEMBERS + i) * SEGMENT_FIELDS
        start = tl.load(row + START)
        stop = tl.load(row + STOP)
        copy = tl.load(row + BUCKET_BASE) + bucket * scaled_keys
        shift = tl.where((tl.load(row + SCALED) != 0) & (bucket > 0), copy - start, 0)
        for start_n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            valid = offs_n < stop
            if HAS_KEY_BIAS:
                valid = load_key_bias(KEY_BIAS + b * key_bias_batch_stride, offs_n, valid) > -float("inf")
            x_rows, y_rows = stream_rows(first, second, offs_n + shift, split, stride_xs, stride_ys)
            mask, channels = valid[:, None] & (offs_d < HEAD_DIM)[None, :], offs_d[None, :] * stride_d
            if STREAMS:
                in_first = (offs_n + shift < split)[:, None]
                total += tl.load(y_rows + channels, mask=mask & (in_first == 0), other=0.0).to(tl.float32)
                mask = mask & in_first
            total += tl.load(x_rows + channels, mask=mask, other=0.0).to(tl.float32)
    count = tl.load(GROUPS + b * groups_batch_stride + g * GROUP_FIELDS + GROUP_COUNT)
    mean = tl.sum(total, 0) / tl.maximum(count, 1.0)
    out = OUT + ((bh.to(tl.int64) * num_groups + g) * num_buckets + bucket) * HEAD_DIM + offs_d
    tl.store(out, mean, mask=offs_d < HEAD_DIM)


def group_means(
    x: Projected,
    segments: torch.Tensor,
    groups: torch.Tensor,
    members: torch.Tensor,
    member_bounds: torch.Tensor,
    key_bias: torch.Tensor | None,
    num_buckets: int,
    scaled_keys: int,
    config: LaunchConfig,
) -> torch.Tensor:
    """Means of every BiasDelta group, of keys or of values.

    Args:
        x: ``(B, R, Hkv, D)`` rotated keys in key order, then the scaled keys once per bucket; or values, that may come
            in streams. Any strides.
        segments: the plan's table, int32.
        groups: ``(1 or B, G, 3)`` float32: lambda, delta, number of unmasked keys.
        members, member_bounds: ``(n,)`` and ``(G + 1,)`` int32: the segments of group g are
            ``members[member_bounds[g] : member_bounds[g + 1]]``.
        key_bias: ``(1 or B, Sk)`` float32, ``-inf`` where a key is masked; None: none is.
        num_buckets: buckets beside r = 1.

    Returns:
        ``(B, Hkv, G, 1 + num_buckets, D)`` float32.
    """
    batch, _, heads, dim = x.shape
    count = groups.shape[1]
    out = torch.empty((batch, heads, count, 1 + num_buckets, dim), dtype=torch.float32, device=x.device)
    parts = stream_tensors(x)
    tensors = {
        "X": parts["X"], "X2": parts["X2"], "OUT": out, "SEGMENTS": segments, "GROUPS": groups, "MEMBERS": members,
        "MEMBER_BOUNDS": member_bounds, "KEY_BIAS": key_bias,
    }  # fmt: skip
    launch(_means, tensors, isinstance(x, Streams), scaled_keys, config)
    return out


def _means(at: dict[str, Layout | None], streamed: bool, scaled_keys: int, config: LaunchConfig) -> Launch:
    batch, heads, groups, buckets, dim = at["OUT"].shape
    rows = {name: found for name, found in stream_arguments(at, streamed, (0.0,)).items() if not name.startswith("eps")}
    arguments = dict(
        **rows, heads=heads, num_groups=groups, num_buckets=buckets, scaled_keys=scaled_keys,
        groups_batch_stride=batch_stride(at["GROUPS"]), key_bias_batch_stride=batch_stride(at["KEY_BIAS"]),
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_N=config.block_n, STAGES=config.num_stages,
        HAS_KEY_BIAS=at["KEY_BIAS"] is not None, **config.options,
    )  # fmt: skip
    return Launch(means_kernel, (triton.cdiv(dim, config.block_d) * batch * heads * groups * buckets,), arguments)


REWEIGHT_COUNTS = ("heads", "num_segments", "num_keys", "num_groups", "groups_batch_stride")


@triton.jit(do_not_specialize=REWEIGHT_COUNTS)
def reweight_kernel(
    K, SEGMENTS, GROUPS, MEANS, WEIGHTS, stride_kb, stride_kh, stride_ks, stride_kd,
    heads, num_segments, num_keys, num_groups, groups_batch_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """K[b, h, n] = w ((lambda - delta) mu + delta K[b, h, n]) in place, for one block of keys of one head."""
    blocks = tl.cdiv(num_keys, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    bh = tl.program_id(0) // blocks
    b = (bh // heads).to(tl.int64)
    base = K + b * stride_kb + (bh % heads).to(tl.int64) * stride_kh
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    channel = offs_d < HEAD_DIM
    pair = pair_of(offs_d, INTERLEAVED, HEAD_DIM // 2)
    for s in range(num_segments):
        row = SEGMENTS + s * SEGMENT_FIELDS
        start, stop, group = tl.load(row + START), tl.load(row + STOP), tl.load(row + GROUP)
        if (group >= 0) & (start < first + BLOCK_N) & (stop > first):
            of_group = GROUPS + b * groups_batch_stride + group * GROUP_FIELDS
            delta = tl.load(of_group + GROUP_DELTA)
            mu = tl.load(MEANS + (bh.to(tl.int64) * num_groups + group) * HEAD_DIM + offs_d, mask=channel, other=0.0)
            weight = tl.load(row + WEIGHT)
            w = tl.load(WEIGHTS + weight * (HEAD_DIM // 2) + pair, mask=when(weight >= 0, channel), other=1.0)
            shift = w * (tl.load(of_group + GROUP_BIAS) - delta) * mu
            mask = ((offs_n >= start) & (offs_n < stop))[:, None]
            if HEAD_DIM != BLOCK_D:
                mask = mask & channel[None, :]
            keys = base + offs_n.to(tl.int64)[:, None] * stride_ks + offs_d[None, :] * stride_kd
            k = tl.load(keys, mask=mask, other=0.0).to(tl.float32)
            tl.store(keys, (shift[None, :] + k * (w * delta)[None, :]).to(K.dtype.element_ty), mask=mask)


def reweight_keys(
    keys: torch.Tensor,
    segments: torch.Tensor,
    groups: torch.Tensor,
    means: torch.Tensor,
    weights: torch.Tensor | None,
    interleaved: bool,
    config: LaunchConfig,
) -> None:
    """``kt = w ((lambda - delta) mu + delta khat)`` in the place of ``khat``, for the keys of BiasDelta groups: in
    float32, rounded once.

    Args:
        keys: ``(B, Hkv, Sk, D)`` rotated keys in key order, any strides; changed in place.
        segments, groups: as of :func:`group_means`.
        means: ``(B, Hkv, G, 1, D)`` float32.
        weights: ``(W, D/2)`` float32 band weights, or None.
        interleaved: pairing ``(2c, 2c + 1)`` rather than ``(c, c + D/2)``.
    """
    tensors = {"K": keys, "SEGMENTS": segments, "GROUPS": groups, "MEANS": means, "WEIGHTS": weights}
    launch(_reweight, tensors, interleaved, config)


def _reweight(at: dict[str, Layout | None], interleaved: bool, config: LaunchConfig) -> Launch:
    batch, heads, num_keys, dim = at["K"].shape
    arguments = dict(
        **strides("k", at["K"], "bhsd"), heads=heads, num_segments=at["SEGMENTS"].shape[0], num_keys=num_keys,
        num_groups=at["GROUPS"].shape[1], groups_batch_stride=batch_stride(at["GROUPS"]), HEAD_DIM=dim,
        BLOCK_D=config.block_d, BLOCK_N=config.block_n, INTERLEAVED=interleaved, **config.options,
    )  # fmt: skip
    grid = (triton.cdiv(num_keys, config.block_n) * batch * heads,)
    return Launch(reweight_kernel, grid, arguments, {"WEIGHTS": "MEANS"})
