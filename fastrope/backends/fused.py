"""The fused kernels of ``fastrope.kernels``, driven by a lowered plan.

A call packs the keys once (rotated, per scale bucket), takes the means of BiasDelta groups, lets queries with per-query
scales meet the scaled keys (``per_query.py``), and runs the fused loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from .. import device as devices
from .. import kernels
from ..kernels import abi
from ..kernels.config import LaunchConfig
from ..kernels.streams import Projected, Streams
from ..planning.lowered import Lowered
from ..planning.segments import numbers_of
from ..planning.tables import PerQueryTables
from . import per_query
from .lse_merge import merge


@dataclass(frozen=True)
class Launch:
    """How the kernels run a call.

    Args:
        packs: those of ``"q"``, ``"k"``, ``"v"`` that take a pass of their own before the loop.
        descriptors: whether the loop reads keys and values through tensor descriptors; ``loop`` says how, and why.
        polynomial: whether queries with per-query scales meet the scaled keys by a polynomial; ``per_query`` says by
            what, and why; None without any.
    """

    packs: tuple[str, ...]
    descriptors: bool
    loop: str
    polynomial: bool = False
    per_query: str | None = None

    @staticmethod
    def of(q: Projected, k: Projected, v: Projected, lowered: Lowered) -> Launch:
        """The launch of a call. ``q, k, v (B, S, H, D)`` are tensors, or :class:`fastrope.kernels.Streams`."""
        packs = _packs(q, k, v, lowered)
        descriptors, loop = _descriptors(q, k, v, lowered, packs)
        obstacle = per_query.against_polynomial(q, lowered)
        how = None
        if lowered.num_per_query:
            how = f"axis blocks, exact ({obstacle})" if obstacle else per_query.describe(q, lowered)
        return Launch(packs, descriptors, loop, how is not None and obstacle is None, how)


def run(
    q: Projected, k: Projected, v: Projected, lowered: Lowered, scale: float, launch: Launch
) -> tuple[Tensor, Tensor]:
    """``out (B, Sq, H, D)`` and ``lse (B, H, Sq)``; forward only.

    q and k may be streams where the plan rotates both (q: unless axis blocks read it), v wherever. Extra memory: the
    packed keys, at most ``1 + MAX_BUCKETS`` times k, at most ``MAX_VARIANTS`` copies of q, a copy of v where it is
    joined, sorted or masked. For queries with per-query scales float32 state, and for a polynomial up to three copies
    of the scaled keys and seven of these queries, per variant (two and four at a head dim of 128).
    """
    with launching_on(q.device):
        return attend(q, *pack(q, k, v, lowered, launch), k, lowered, scale, launch)


def launching_on(device: torch.device) -> contextlib.AbstractContextManager:
    """A context for launches: triton's go to the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def configs(q: Projected) -> Callable[..., LaunchConfig]:
    """Launch configurations for tensors like ``q``, by kernel."""
    arch = devices.architecture(q.device)
    return lambda kernel, masked=False: kernels.select(kernel, arch, q.dtype, q.shape[3], masked)


def key_bias(lowered: Lowered) -> Tensor | None:
    """``(Bx, Sk)`` float32 for the kernels: biases of keys, ``-inf`` of masked ones."""
    return lowered.keys.bias and lowered.keys.bias.for_kernels


# ---- how -------------------------------------------------------------------------------------------------------------


def _packs(q: Projected, k: Projected, v: Projected, lowered: Lowered) -> tuple[str, ...]:
    keys, queries = lowered.keys, lowered.queries
    rotates = queries is not None and queries.rotation is not None
    needs = {
        "q": lowered.modulated or rotates or isinstance(q, kernels.Streams) or _far_apart(q),
        "k": keys.source is not None or isinstance(k, kernels.Streams) or _far_apart(k),
        "v": keys.order is not None or lowered.values is not None or isinstance(v, kernels.Streams) or _far_apart(v),
    }
    return tuple(name for name, needed in needs.items() if needed)


def _descriptors(
    q: Projected, k: Projected, v: Projected, lowered: Lowered, packs: tuple[str, ...]
) -> tuple[bool, str]:
    """Whether the loop reads keys and values through tensor descriptors, and why not."""
    arch, dtype = devices.architecture(q.device), str(q.dtype).removeprefix("torch.")
    if not kernels.ships("attention_tma", arch, q.dtype, q.shape[3]):
        return False, f"pointers (no descriptors on {arch} in {dtype})"
    if not devices.switched_on("FASTROPE_TMA", default=True):
        return False, "pointers (FASTROPE_TMA=0)"
    if len(lowered.passes) > 1:
        return False, "pointers (parts of several passes are merged)"
    for name, x in (("k", k), ("v", v)):
        if name in packs:  # into a buffer of its own, however many rows that has
            fits = x.shape[3] * x.dtype.itemsize % 16 == 0
        elif name == "v" and lowered.keys.masked is not None:  # a copy in the order of its axes
            fits = kernels.describable(torch.empty_like(cast(Tensor, x).transpose(1, 2), device="meta"))
        else:
            fits = kernels.describable(cast(Tensor, x).transpose(1, 2))
        if not fits:
            why = "a descriptor wants adjacent channels, rows in steps of 16 bytes, nothing expanded"
            return False, f"pointers ({name}: {why})"
    return True, "tensor descriptors"


def _far_apart(x: Projected) -> bool:
    """Whether the rows of one head of ``(B, S, H, D)`` span more elements than the loops' int32 offsets reach."""
    if isinstance(x, Streams):
        return False
    return (x.shape[1] - 1) * x.stride(1) + (x.shape[3] - 1) * x.stride(3) >= 2**31


# ---- the steps of a call ---------------------------------------------------------------------------------------------


def pack(q: Projected, k: Projected, v: Projected, lowered: Lowered, launch: Launch) -> tuple[Tensor, Tensor]:
    """Keys ``(B, Hkv, R, D)`` and values ``(B, Hkv, Sk, D)`` as the loop reads them: joined, in key order, the keys
    rotated, and the scaled ones once more per scale bucket."""
    tables, interleaved, config = lowered.keys, lowered.pairing == "interleaved", configs(q)("pack")
    keys, values = k, v
    if "k" in launch.packs:
        rotation = tables.rotation and (tables.rotation.cos, tables.rotation.sin)
        keys = kernels.pack_rows(k, tables.source, *(rotation or (None, None)), interleaved, config)
    else:
        keys = cast(Tensor, k).transpose(1, 2)  # streams are packed
    if "v" in launch.packs:
        order = tables.source[: k.shape[1]] if tables.order is not None else None
        values = pack_values(v, order, lowered)
    else:
        values = cast(Tensor, v).transpose(1, 2)
    if tables.masked is not None and launch.descriptors:
        # A descriptor reads masked values too, and 0 x NaN of theirs would poison the sum: one pass over v (masked_fill
        # would copy first and fill the copy).
        values = torch.where(tables.masked[:, None, :, None], values, values.new_zeros(()))
    return keys, values


def pack_values(v: Projected, source: Tensor | None, lowered: Lowered) -> Tensor:
    """Values ``(B, Hkv, Sk, D)``, joined, gathered from ``source`` and modulated, in one pass; means take one more."""
    tables, config, modulated = lowered.values, configs(v), None
    if tables is not None:
        means = None
        if tables.groups is not None:
            means = kernels.group_means(
                v, tables.runs, tables.groups.for_kernels, tables.groups.members, tables.groups.bounds, tables.bias,
                0, 0, config("means"),
            )  # fmt: skip
        modulated = kernels.ValueFactors(tables.for_kernels, tables.member, means)
    return kernels.pack_rows(v, source, None, None, False, config("pack"), False, modulated)


def attend(
    q: Projected,
    keys: Tensor,
    values: Tensor,
    k: Projected,
    lowered: Lowered,
    scale: float,
    launch: Launch,
    modulated_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """``out (B, Sq, H, D)`` and ``lse (B, H, Sq)`` over what :func:`pack` made of keys and values.

    Args:
        k: the keys as they came.
        modulated_only: leave the rows of unmodulated queries undefined.
    """
    if not lowered.modulated:
        return _plain(q, keys, values, k.shape[1], lowered, scale, launch)
    tables, config = lowered.keys, configs(q)
    if not launch.polynomial and lowered.num_per_query and _far_apart(q):  # axis blocks read queries as they are
        q = cast(Tensor, q).transpose(1, 2).contiguous().transpose(1, 2)
    means = None
    if lowered.groups is not None:
        scaled_keys = 0 if lowered.scales is None else lowered.scales.scaled_keys
        means = kernels.group_means(
            keys.transpose(1, 2), tables.segments, lowered.groups.for_kernels, lowered.groups.members,
            lowered.groups.bounds, key_bias(lowered), lowered.num_buckets, scaled_keys, config("means"),
        )  # fmt: skip
    scaled = per_query.polynomial_keys(k, keys, lowered, config) if launch.polynomial else None
    places = lowered.sorted_queries.num_modulated if modulated_only else None
    run_pass = partial(_run_pass, q, keys, values, scaled, means, places, lowered, scale, launch)
    if len(lowered.passes) == 1:
        return run_pass(lowered.passes[0], q.dtype)
    result = None
    for bounds in lowered.passes:
        part = run_pass(bounds, torch.float32)
        result = part if result is None else merge(result, part)
    return result[0].to(q.dtype), result[1]


def _plain(
    q: Projected,
    keys: Tensor,
    values: Tensor,
    num_keys: int,
    lowered: Lowered,
    scale: float,
    launch: Launch,
):
    config, bias, queries = configs(q), key_bias(lowered), q
    if "q" in launch.packs:
        rotation = lowered.queries and lowered.queries.rotation
        cos, sin = (rotation.cos[:, 0], rotation.sin[:, 0]) if rotation else (None, None)
        queries = kernels.pack_rows(q, None, cos, sin, lowered.pairing == "interleaved", config("pack"))
    else:
        queries = cast(Tensor, q).transpose(1, 2)
    loop = "attention_tma" if launch.descriptors else "attention"
    return kernels.fused_attention(
        queries.unsqueeze(2), keys, values, q.shape[1], num_keys, bias, None, None, None, scale, q.dtype,
        config(loop, bias is not None),
    )  # fmt: skip


def _run_pass(
    q: Projected,
    keys: Tensor,
    values: Tensor,
    scaled: Tensor | None,
    means: Tensor | None,
    places: int | None,
    lowered: Lowered,
    scale: float,
    launch: Launch,
    bounds: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention over the segments of one pass: ``(B, Sq, H, D)`` in ``dtype``, ``(B, H, Sq)``.

    Args:
        q: ``(B, Sq, H, D)``; keys ``(B, Hkv, R, D)`` packed; values ``(B, Hkv, Sk, D)``.
        scaled: keys of the polynomial, or None.
        means: of the groups, or None.
        places: leading sorted queries; None: all.
    """
    config, of_keys, interleaved = configs(q), key_bias(lowered), lowered.pairing == "interleaved"
    tables = lowered.once(("tables", places, bounds), lambda: _tables(places, lowered, bounds))
    per_query_means = _per_query_means(keys, means, lowered, bounds, tables, config)
    rotation = lowered.queries and lowered.queries.rotation
    rotation = rotation and (rotation.cos, rotation.sin)
    queries, bias, residual = kernels.prepare_queries(
        q, rotation, interleaved, tables, (means, per_query_means), launch.polynomial, config("queries")
    )
    state, suffix = None, "_tma" if launch.descriptors else ""
    if launch.polynomial:
        state = kernels.polynomial_attention(
            queries, residual, scaled, values, interleaved, of_keys, tables, bias, lowered.polynomial, q.shape[1],
            scale, config(f"polynomial{suffix}"), config("terms"),
        )  # fmt: skip
    elif lowered.num_per_query:
        state = kernels.axis_block_attention(
            q,
            keys,
            values,
            rotation,
            interleaved,
            of_keys,
            tables,
            bias,
            lowered.axis_blocks,
            scale,
            config("axis_blocks"),
        )
    loop = f"attention_modulated{suffix}" if len(lowered.passes) == 1 else "attention_parts"
    return kernels.fused_attention(
        queries, keys, values, q.shape[1], values.shape[2], of_keys, tables, bias, state, scale, dtype,
        config(loop, of_keys is not None),
    )  # fmt: skip


def _tables(places: int | None, lowered: Lowered, bounds: tuple[int, int]) -> kernels.KernelTables:
    """The plan's tables for the segments of one pass."""
    here, table = lowered.segments[slice(*bounds)], lowered.keys.segments[slice(*bounds)]
    groups, queries = lowered.groups, lowered.sorted_queries
    before = [s for first, last in lowered.passes if last <= bounds[0] for s in [lowered.segments[first:last]]]

    def of_pass(per_query: PerQueryTables | None, column: str) -> Tensor | None:
        first = sum(len(numbers_of(segments, column)) for segments in before)
        return per_query and per_query.for_kernels[:, first : first + len(numbers_of(here, column))]

    rows, buckets = (None, None) if queries is None else (queries.queries, queries.tile_bucket)
    if places is not None:
        rows, buckets = rows[:, :places], buckets[:, : places // abi.QUERY_TILE]
    return kernels.KernelTables(
        segments=table, weights=lowered.bands and lowered.bands.for_kernels, groups=groups and groups.for_kernels,
        gains=of_pass(lowered.gains, "gain"), biases=of_pass(lowered.biases, "bias"), sorted_queries=rows,
        tile_bucket=buckets,
        num_variants=len({s.variant for s in here}), num_buckets=lowered.num_buckets,
        scaled_keys=0 if lowered.scales is None else lowered.scales.scaled_keys, num_per_query=lowered.num_per_query,
    )  # fmt: skip


def _per_query_means(
    keys: Tensor, means: Tensor | None, lowered: Lowered, bounds: tuple[int, int], tables: kernels.KernelTables,
    config: Callable[..., LaunchConfig],
) -> Tensor | None:  # fmt: skip
    """Of the groups of one pass; None without per-query scales or groups."""
    wanted = means is not None and lowered.key_runs is not None
    groups = numbers_of(lowered.segments[slice(*bounds)], "group") if wanted else ()
    if not groups:
        return None
    return kernels.per_query_means(
        keys, cast(Tensor, means), lowered.key_runs, tables.segments, lowered.groups.for_kernels, len(groups),
        lowered.sorted_queries.queries, lowered.axis_blocks.factor, lowered.num_per_query, key_bias(lowered),
        lowered.pairing == "interleaved", config("run_sums"), config("per_query_means"),
    )  # fmt: skip
