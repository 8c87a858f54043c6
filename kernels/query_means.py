"""Group means of keys that a per-query scale turns, for BiasDelta: one per key head, group and query.

Query i turns the scaled keys of a group by ``(r_i - 1) phi_j``, so its mean differs from the mean at r = 1 by

    sum over j of (R((r_i - 1) phi_j) - 1) k_j / count

On a grid many keys share ``phi_j`` on a pair. Such keys are summed first (a run each, :func:`run_sums_kernel`), and a
query then turns one sum per run and not every key (:func:`per_query_means_kernel`): work grows with queries x runs.
All of it is float32, and so are the products, which never become TF32.
"""

import torch
import triton
import triton.language as tl

from .common import (
    GROUP,
    GROUP_COUNT,
    GROUP_FIELDS,
    PASS_GROUP,
    SEGMENT_FIELDS,
    load_key_bias,
    pair_of,
    sincos_of_product,
)  # fmt: skip
from .config import LaunchConfig
from .launch import Launch, Layout, batch_stride, launch, strides
from .tables import KeyRuns

BLOCK_U = tl.constexpr(16)  # runs turned at once: the least a dot product takes


@triton.jit
def plan_group(PASS, g, pass_segments):
    """The plan's number of the pass's group ``g``, a number or a block of them."""
    found = g * 0
    for s in range(pass_segments):
        row = PASS + s * SEGMENT_FIELDS
        found = tl.where(g == tl.load(row + PASS_GROUP), tl.load(row + GROUP), found)
    return found


RUN_SUMS_COUNTS = (
    "pass_segments", "num_runs", "heads", "pass_groups", "groups_batch_stride", "key_bias_batch_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=RUN_SUMS_COUNTS)
def run_sums_kernel(
    K, OUT, PASS, GROUPS, RUN_KEYS, RUN_GROUPS, BOUNDS, PAIR_RUNS, KEY_BIAS, stride_kb, stride_kh, stride_ks, stride_kd,
    pass_segments, num_runs, heads, pass_groups, groups_batch_stride, key_bias_batch_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
):  # fmt: skip
    """OUT[b, run, channel, h, g] = sum of the run's unmasked keys of group g / the group's number of keys, in the
    channels of the run's own pairs. PASS are the segments whose groups are wanted."""
    run = tl.program_id(0) % num_runs
    bh = tl.program_id(0) // num_runs
    b, h = (bh // heads).to(tl.int64), bh % heads
    base = K + b * stride_kb + h.to(tl.int64) * stride_kh
    offs_d = tl.arange(0, BLOCK_D)
    pair = pair_of(offs_d, INTERLEAVED, HEAD_DIM // 2)
    channel = offs_d < HEAD_DIM
    first = tl.load(PAIR_RUNS + 2 * pair, mask=channel, other=0)
    last = tl.load(PAIR_RUNS + 2 * pair + 1, mask=channel, other=0)
    own = (run >= first) & (run < last)
    begin, end = tl.load(BOUNDS + run), tl.load(BOUNDS + run + 1)
    columns = heads * pass_groups
    for g in range(pass_groups):
        total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        group = plan_group(PASS, g, pass_segments)
        for n in range(begin, end, BLOCK_N):
            at = n + tl.arange(0, BLOCK_N)
            key = tl.load(RUN_KEYS + at, mask=at < end, other=-1)
            valid = (key >= 0) & (tl.load(RUN_GROUPS + at, mask=key >= 0, other=-1) == group)
            if HAS_KEY_BIAS:
                valid = load_key_bias(KEY_BIAS + b * key_bias_batch_stride, key, valid) > -float("inf")
            ptrs = base + key.to(tl.int64)[:, None] * stride_ks + offs_d.to(tl.int64)[None, :] * stride_kd
            total += tl.load(ptrs, mask=valid[:, None] & own[None, :], other=0.0).to(tl.float32)
        count = tl.load(GROUPS + b * groups_batch_stride + group * GROUP_FIELDS + GROUP_COUNT)
        out = OUT + ((b * num_runs + run) * HEAD_DIM + offs_d) * columns + h * pass_groups + g
        tl.store(out, tl.sum(total, 0) / tl.maximum(count, 1.0), mask=channel)


PER_QUERY_MEANS_COUNTS = (
    "pass_segments", "num_runs", "num_queries", "num_per_query", "heads", "pass_groups", "num_groups", "num_buckets",
    "sorted_batch_stride", "factor_batch_stride", "phase_batch_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=PER_QUERY_MEANS_COUNTS)
def per_query_means_kernel(
    SUMS, MEANS, OUT, PASS, SORTED_QUERIES, FACTOR, PHASE, PAIR_RUNS,
    pass_segments, num_runs, num_queries, num_per_query, heads, pass_groups, num_groups, num_buckets,
    sorted_batch_stride, factor_batch_stride, phase_batch_stride,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """OUT[b, h, g, i] of one RoPE pair, for a block of sorted queries i and a block of columns (h, g)."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    columns = heads * pass_groups
    blocks, column_blocks = tl.cdiv(num_per_query, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    pair = tl.program_id(0) % PAIRS
    block = tl.program_id(0) // PAIRS % blocks
    column_block = tl.program_id(0) // (PAIRS * blocks) % column_blocks
    b = (tl.program_id(0) // (PAIRS * blocks * column_blocks)).to(tl.int64)
    first = 2 * pair if INTERLEAVED else pair
    second = 2 * pair + 1 if INTERLEAVED else pair + PAIRS
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = tl.load(SORTED_QUERIES + b * sorted_batch_stride + offs_m, mask=offs_m < num_per_query, other=-1)
    row_mask = query >= 0
    factors = FACTOR + b * factor_batch_stride + query
    factor = tl.load(factors, mask=row_mask, other=0.0)
    factor_low = tl.load(factors + num_queries, mask=row_mask, other=0.0)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    known = column < columns
    h, g = column // pass_groups, column % pass_groups
    group = plan_group(PASS, g, pass_segments)
    mean = MEANS + (((b * heads + h) * num_groups + group) * num_buckets) * HEAD_DIM
    x = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    x += tl.load(mean + first, mask=known, other=0.0)[None, :]
    y += tl.load(mean + second, mask=known, other=0.0)[None, :]
    last_run = tl.load(PAIR_RUNS + 2 * pair + 1)
    for u in range(tl.load(PAIR_RUNS + 2 * pair), last_run, BLOCK_U):
        run = u + tl.arange(0, BLOCK_U)
        there = run < last_run
        phases = PHASE + b * phase_batch_stride + run * PAIRS + pair
        phase = tl.load(phases, mask=there, other=0.0)
        phase_low = tl.load(phases + num_runs * PAIRS, mask=there, other=0.0)
        sin, cos = sincos_of_product(factor[:, None], factor_low[:, None], phase[None, :], phase_low[None, :])
        cos -= 1.0  # of (1 - r) phi: the turn is by its inverse
        sums = SUMS + ((b * num_runs + run) * HEAD_DIM)[:, None] * columns + column[None, :]
        mask = there[:, None] & known[None, :]
        sum_x = tl.load(sums + first * columns, mask=mask, other=0.0)
        sum_y = tl.load(sums + second * columns, mask=mask, other=0.0)
        x = tl.dot(cos, sum_x, x, input_precision="ieee")
        x = tl.dot(sin, sum_y, x, input_precision="ieee")
        y = tl.dot(cos, sum_y, y, input_precision="ieee")
        y = tl.dot(-sin, sum_x, y, input_precision="ieee")
    out = OUT + (((b * heads + h) * pass_groups + g)[None, :] * num_per_query + offs_m[:, None]) * HEAD_DIM
    mask = (offs_m < num_per_query)[:, None] & known[None, :]
    tl.store(out + first, x, mask=mask)
    tl.store(out + second, y, mask=mask)


def per_query_means(
    keys: torch.Tensor,
    means: torch.Tensor,
    runs: KeyRuns,
    segments: torch.Tensor,
    groups: torch.Tensor,
    pass_groups: int,
    sorted_queries: torch.Tensor,
    factor: torch.Tensor,
    num_per_query: int,
    key_bias: torch.Tensor | None,
    interleaved: bool,
    sums_config: LaunchConfig,
    config: LaunchConfig,
) -> torch.Tensor:
    """Means of the groups of one pass for every query with a per-query scale.

    Args:
        keys: ``(B, Hkv, R, D)`` rotated keys in key order, any strides.
        means: ``(B, Hkv, G, 1 + buckets, D)`` float32 of :func:`group_means`.
        runs: the scaled keys by their angles.
        segments: ``(n, len(abi.SEGMENT_COLUMNS))`` int32, of the pass, with ``pass_groups`` groups.
        groups: ``(1 or B, G, 3)`` float32.
        sorted_queries: ``(1 or B, N)`` int32, the first ``num_per_query`` of which are taken.
        factor: ``(1 or B, 2, Sq)`` float32, ``1 - r`` in two parts, see :func:`.common.sincos_of_product`.
        key_bias: ``(1 or B, Sk)`` float32 in key order, ``-inf`` where a key is masked; None: none is.
        interleaved: pairing ``(2c, 2c + 1)`` rather than ``(c, c + D/2)``.

    Returns:
        ``(B, Hkv, pass_groups, num_per_query, D)`` float32.
    """
    batch, heads, _, dim = keys.shape
    count, columns = runs.bounds.shape[0] - 1, heads * pass_groups
    sums = torch.empty((batch, count, dim, columns), dtype=torch.float32, device=keys.device)
    tensors = {
        "K": keys, "OUT": sums, "PASS": segments, "GROUPS": groups, "RUN_KEYS": runs.keys, "RUN_GROUPS": runs.groups,
        "BOUNDS": runs.bounds, "PAIR_RUNS": runs.pair_runs, "KEY_BIAS": key_bias,
    }  # fmt: skip
    launch(_run_sums, tensors, pass_groups, interleaved, sums_config)
    out = torch.empty((batch, heads, pass_groups, num_per_query, dim), dtype=torch.float32, device=keys.device)
    tensors = {
        "SUMS": sums, "MEANS": means, "OUT": out, "PASS": segments, "SORTED_QUERIES": sorted_queries, "FACTOR": factor,
        "PHASE": runs.phase, "PAIR_RUNS": runs.pair_runs,
    }  # fmt: skip
    launch(_per_query_means, tensors, interleaved, config)
    return out


def _run_sums(at: dict[str, Layout | None], pass_groups: int, interleaved: bool, config: LaunchConfig) -> Launch:
    (batch, count, dim, columns), key_bias = at["OUT"].shape, at["KEY_BIAS"]
    arguments = dict(
        **strides("k", at["K"], "bhsd"), pass_segments=at["PASS"].shape[0], num_runs=count,
        heads=columns // pass_groups, pass_groups=pass_groups, groups_batch_stride=batch_stride(at["GROUPS"]),
        key_bias_batch_stride=batch_stride(key_bias), HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_N=config.block_n,
        INTERLEAVED=interleaved, HAS_KEY_BIAS=key_bias is not None, **config.options,
    )  # fmt: skip
    return Launch(run_sums_kernel, (count * batch * columns // pass_groups,), arguments)


def _per_query_means(at: dict[str, Layout], interleaved: bool, config: LaunchConfig) -> Launch:
    batch, heads, pass_groups, count, dim = at["OUT"].shape
    blocks = triton.cdiv(count, config.block_m) * triton.cdiv(heads * pass_groups, config.block_n)
    arguments = dict(
        pass_segments=at["PASS"].shape[0], num_runs=at["SUMS"].shape[1], num_queries=at["FACTOR"].shape[2],
        num_per_query=count, heads=heads, pass_groups=pass_groups, num_groups=at["MEANS"].shape[2],
        num_buckets=at["MEANS"].shape[3], sorted_batch_stride=batch_stride(at["SORTED_QUERIES"]),
        factor_batch_stride=batch_stride(at["FACTOR"]), phase_batch_stride=batch_stride(at["PHASE"]), HEAD_DIM=dim,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, INTERLEAVED=interleaved, **config.options,
    )  # fmt: skip
    return Launch(per_query_means_kernel, (dim // 2 * blocks * batch,), arguments)
