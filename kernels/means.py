"""Group means of rotated keys, for BiasDelta: one per key head, group and bucket."""

import torch
import triton
import triton.language as tl

from .common import BUCKET_BASE, GROUP_COUNT, GROUP_FIELDS, SCALED, SEGMENT_FIELDS, START, STOP
from .config import LaunchConfig
from .tables import batch_stride, strides

MEANS_COUNTS = (
    "heads", "num_groups", "num_buckets", "scaled_keys", "groups_batch_stride", "mask_batch_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=MEANS_COUNTS)
def means_kernel(
    K, OUT, SEGMENTS, GROUPS, MEMBERS, MEMBER_BOUNDS, KEY_MASK,
    stride_kb, stride_kh, stride_ks, stride_kd,
    heads, num_groups, num_buckets, scaled_keys, groups_batch_stride, mask_batch_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """OUT[b, h, g, l] = sum of the group's unmasked keys at bucket l / their number, for BLOCK_D channels."""
    d_blocks: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    d_block = tl.program_id(0) % d_blocks
    bh = tl.program_id(0) // d_blocks
    g = tl.program_id(1) // num_buckets
    bucket = tl.program_id(1) % num_buckets
    b = (bh // heads).to(tl.int64)
    base = K + b * stride_kb + (bh % heads).to(tl.int64) * stride_kh
    offs_d = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in range(tl.load(MEMBER_BOUNDS + g), tl.load(MEMBER_BOUNDS + g + 1)):
        row = SEGMENTS + tl.load(MEMBERS + i) * SEGMENT_FIELDS
        start = tl.load(row + START)
        stop = tl.load(row + STOP)
        copy = tl.load(row + BUCKET_BASE) + bucket * scaled_keys
        shift = tl.where((tl.load(row + SCALED) != 0) & (bucket > 0), copy - start, 0)
        for start_n in range(start, stop, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            valid = offs_n < stop
            if HAS_MASK:
                valid = valid & (tl.load(KEY_MASK + b * mask_batch_stride + offs_n, mask=valid, other=0) != 0)
            ptrs = base + (offs_n + shift).to(tl.int64)[:, None] * stride_ks + offs_d.to(tl.int64)[None, :] * stride_kd
            k = tl.load(ptrs, mask=valid[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
            total += tl.sum(k.to(tl.float32), 0)
    count = tl.load(GROUPS + b * groups_batch_stride + g * GROUP_FIELDS + GROUP_COUNT)
    mean = total / tl.maximum(count, 1.0)
    out = OUT + ((bh.to(tl.int64) * num_groups + g) * num_buckets + bucket) * HEAD_DIM + offs_d
    tl.store(out, mean, mask=offs_d < HEAD_DIM)


def group_means(
    keys: torch.Tensor,
    segments: torch.Tensor,
    groups: torch.Tensor,
    members: torch.Tensor,
    member_bounds: torch.Tensor,
    key_mask: torch.Tensor | None,
    num_buckets: int,
    scaled_keys: int,
    config: LaunchConfig,
) -> torch.Tensor:
    """Means of every BiasDelta group.

    Args:
        keys: ``(B, Hkv, R, D)`` rotated keys in key order, then the scaled keys once per bucket; any strides.
        segments: the plan's table, int32.
        groups: ``(1 or B, G, 3)`` float32: lambda, delta, number of unmasked keys.
        members, member_bounds: ``(n,)`` and ``(G + 1,)`` int32: the segments of group g are
            ``members[member_bounds[g] : member_bounds[g + 1]]``.
        key_mask: ``(1 or B, Sk)`` bool in key order, True = attend.
        num_buckets: buckets beside r = 1.

    Returns:
        ``(B, Hkv, G, 1 + num_buckets, D)`` float32.
    """
    batch, heads, _, dim = keys.shape
    count = groups.shape[1]
    out = torch.empty((batch, heads, count, 1 + num_buckets, dim), dtype=torch.float32, device=keys.device)
    grid = (triton.cdiv(dim, config.block_d) * batch * heads, count * (1 + num_buckets))
    means_kernel[grid](
        K=keys, OUT=out, SEGMENTS=segments, GROUPS=groups, MEMBERS=members, MEMBER_BOUNDS=member_bounds,
        KEY_MASK=key_mask, **strides("k", keys, "bhsd"), heads=heads, num_groups=count, num_buckets=1 + num_buckets,
        scaled_keys=scaled_keys, groups_batch_stride=batch_stride(groups), mask_batch_stride=batch_stride(key_mask),
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_N=config.block_n, HAS_MASK=key_mask is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
