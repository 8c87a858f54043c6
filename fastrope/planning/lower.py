"""Resolved arguments lowered to typed tables. All work happens on the CPU; neutral modulations are gone already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..checks import require
from ..device import wide_on_cpu
from ..kernels.tables import AxisBlocks, KeyRuns, Polynomial
from ..rope import RoPE
from .axis_blocks import axis_blocks
from .lowered import Lowered
from .polynomial import polynomial
from .resolved import Group, Resolved
from .rotations import of_keys, of_queries, of_unmodulated
from .scales import find_buckets, scale_tables, sort_queries, unmodulated_queries
from .segments import (
    KeySignatures,
    Segment,
    distinct_sets,
    launch_passes,
    numbers_by_pass,
    numbers_of,
    runs_of,
    segment_keys,
)  # fmt: skip
from .tables import (
    BandTables,
    GroupTables,
    KeyBiasTables,
    KeyTables,
    PerQueryTables,
    ScaleTables,
    SortedQueries,
    UnmodulatedQueries,
    ValueTables,
    alike,
    weighted_rotation,
)  # fmt: skip


def lower(resolved: Resolved, num_queries: int | None, num_keys: int | None) -> Lowered:
    """Tables of a call over ``num_queries`` and ``num_keys`` tokens, None where any number will do.

    Raises:
        ValueError: batched arguments of different batches.
    """
    rope, key_rope = resolved.rope, resolved.key_rope or resolved.rope
    plain = Lowered(
        batch=_batch(resolved), num_queries=num_queries, num_keys=num_keys, pairs=rope and rope.pairs,
        pairing=rope.pairing if rope else "interleaved", queries_applied=rope is not None and rope.applied,
        keys_applied=key_rope is not None and key_rope.applied,
    )  # fmt: skip
    if num_keys is None:
        return plain
    signatures, weight_sets, gain_sets, bias_sets = _signatures(resolved, num_keys)
    segments, order = segment_keys(signatures)
    places = torch.arange(num_keys, device="cpu") if order is None else order
    bands = _bands(resolved, weight_sets)
    bias = resolved.key_bias
    bias = None if bias is None else KeyBiasTables.of(bias[:, places])
    scales, queries, unmodulated = _queries(resolved, bias)
    source, rotation = _packed_rows(resolved, places, scales), None
    if key_rope is not None and source is not None:
        rotation = of_keys(_angles(key_rope), key_rope.applied, source, scales)
    source = order if source is None else source
    blocks, key_runs, found, bounds = None, None, None, [(0, 0)] * len(segments)
    if scales is not None and queries is not None and queries.num_per_query:
        blocks, bounds, key_runs = _axis_blocks(resolved, places, segments)
        found = _polynomial(resolved, places, queries, scales)
    passes = launch_passes(segments, blocks is not None)
    unmasked = () if bias is None or bias.mask is None else tuple(row.nonzero().flatten().int() for row in bias.mask)
    constant = alike([m.b for m in resolved.biases])
    folds = unmodulated is not None or (resolved.scale is None and not resolved.gains and constant)
    keys = KeyTables(
        segments=_segment_table(segments, passes, bounds), order=order, source=None if source is None else source.int(),
        bias=bias, unmasked=unmasked, angles=key_rope and _angles(key_rope), rotation=rotation,
        weighted=weighted_rotation(rotation, bands, segments) if bands is not None and folds else None,
    )  # fmt: skip
    gains, biases = (
        PerQueryTables.of(
            rows, tuple(sets), tuple(numbers_by_pass(segments, passes, column)), column == "bias", alike(rows)
        )
        if rows else None
        for column, rows, sets in (
            ("gain", [m.g for m in resolved.gains], gain_sets), ("bias", [m.b for m in resolved.biases], bias_sets))
    )  # fmt: skip
    return replace(
        plain, segments=segments, passes=passes, keys=keys, bands=bands, gains=gains, biases=biases,
        queries=rope and of_queries(_angles(rope), rope.applied, scales),
        groups=_groups(resolved.key_groups, segments, resolved.present), values=_values(resolved, num_keys),
        scales=scales, sorted_queries=queries, unmodulated=unmodulated, axis_blocks=blocks, key_runs=key_runs,
        polynomial=found,
    )  # fmt: skip


def _batch(resolved: Resolved) -> int | None:
    """The batch every batched argument agrees on; None when nothing is batched."""
    sizes = []
    for name, r in (("rope.angles", resolved.rope), ("key_rope.angles", resolved.key_rope)):
        if r is not None and r.angles.ndim == 3:
            sizes.append((name, r.angles.shape[0]))
    if resolved.key_mask is not None:
        sizes.append(("key_mask", resolved.key_mask.shape[0]))
    if resolved.scale is not None:
        sizes.append(("QueryScale.scale", resolved.scale.r.shape[0]))
    for group in resolved.groups:
        sizes += [("BiasDelta.bias", len(group.bias)), ("BiasDelta.delta", len(group.delta))]
    sizes += [("LogitGain.gain", len(gain.g)) for gain in resolved.gains]
    sizes += [("LogitBias.bias", len(bias.b)) for bias in resolved.biases]
    sizes += [("KeyBias.bias", len(beta)) for beta in resolved.key_biases]
    sizes += [("ValueGain.gain", len(u)) for u in resolved.value_gains]
    batch = None
    for name, size in sizes:
        if size > 1:
            require(batch in (None, size), name, f"batch {batch}", size)
            batch = size
    return batch


# ---- keys ------------------------------------------------------------------------------------------------------------


def _signatures(resolved: Resolved, num_keys: int) -> tuple[KeySignatures, list, list, list]:
    """What covers each key, and the distinct sets of weights, gains and logit biases that some key has."""
    (weight_sets, weight), (gain_sets, gain), (bias_sets, bias) = (
        distinct_sets([m.keys for m in several], num_keys)
        for several in (resolved.weights, resolved.gains, resolved.biases)
    )
    scale = resolved.scale
    scaled = scale.keys if scale is not None else torch.zeros(num_keys, dtype=torch.bool, device="cpu")
    group = _membership(resolved.key_groups, num_keys)
    return KeySignatures(scaled, weight, group, gain, bias), weight_sets, gain_sets, bias_sets


def _membership(groups: Sequence[Group], num_keys: int) -> Tensor:
    """The group that each key is in, ``(Sk,)`` int64; -1: none."""
    group = torch.full((num_keys,), -1, dtype=torch.int64, device="cpu")
    for i, m in enumerate(groups):
        group[m.keys] = i
    return group


def _bands(resolved: Resolved, sets: list) -> BandTables | None:
    if not sets:
        return None
    return BandTables.of(
        torch.stack([torch.stack([resolved.weights[i].w for i in members]).prod(0) for members in sets])
    )


def _groups(groups: Sequence[Group], segments: Sequence[Segment], present: Tensor | None) -> GroupTables | None:
    """Tables of groups whose keys lie in ``segments``; ``present (Bx, Sk)`` bool, None: all keys."""
    if not groups:
        return None
    owner = np.array([s.group for s in segments])
    members = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[members], np.arange(len(groups) + 1))
    masks = [m.keys[None] if present is None else m.keys[None] & present for m in groups]
    counts = torch.stack([mask.sum(1).double() for mask in masks], dim=1)
    return GroupTables.of(groups, counts, *(torch.from_numpy(x).int() for x in (members, bounds)))


def _values(resolved: Resolved, num_keys: int) -> ValueTables | None:
    groups, gains = resolved.value_groups, torch.ones(1, num_keys, dtype=torch.float64, device="cpu")
    if not groups and not resolved.value_gains:
        return None
    for u in resolved.value_gains:
        gains = gains * u
    member, present = _membership(groups, num_keys), resolved.present
    tables, runs, bias = None, None, None
    if groups:
        segments = runs_of(member)
        tables = _groups(groups, segments, present)
        runs = _segment_table(segments, ((0, len(segments)),), [(0, 0)] * len(segments))
        if present is not None:
            bias = torch.zeros(present.shape, dtype=torch.float32, device="cpu").masked_fill(~present, -torch.inf)
    inside = (member >= 0).nonzero().flatten() if groups else None
    return ValueTables.of(gains, member.int(), inside, tables, runs, bias)


def _packed_rows(resolved: Resolved, places: Tensor, scales: ScaleTables | None) -> Tensor | None:
    """The key that each packed row is made from, ``(R,)``; None where no key is rotated.

    Args:
        places: ``(Sk,)`` the key in each place of the key order.
    """
    rope, scale = resolved.key_rope or resolved.rope, resolved.scale
    buckets = 0 if scales is None else len(scales.buckets)
    if rope is None or (rope.applied and not buckets):
        return None
    scaled = [] if scale is None else [places[scale.keys[places]]] * buckets
    return torch.cat([places, *scaled])


def _segment_table(
    segments: tuple[Segment, ...], passes: tuple[tuple[int, int], ...], block_bounds: list[tuple[int, int]]
) -> Tensor:
    """``(segments, len(abi.SEGMENT_COLUMNS))`` int32."""
    scaled_keys = sum(len(s) for s in segments if s.scaled)
    base = segments[-1].stop - scaled_keys
    rows, seen = [], 0
    for first, last in passes:
        here = segments[first:last]
        variants = list(dict.fromkeys(s.variant for s in here))
        known = {column: numbers_of(here, column) for column in ("gain", "bias", "group")}
        met = set()
        for s, (first_block, last_block) in zip(here, block_bounds[first:last], strict=True):
            gain, bias, group = (-1 if (n := getattr(s, c)) < 0 else known[c].index(n) for c in known)
            rows.append(
                [s.start, s.stop, base + seen if s.scaled else s.start, int(s.scaled), s.weight, s.group, gain, bias,
                 first_block, last_block, variants.index(s.variant), int(s.variant not in met), group]
            )  # fmt: skip
            met.add(s.variant)
            seen += len(s) if s.scaled else 0
    return torch.tensor(rows, dtype=torch.int32, device="cpu")


# ---- queries ---------------------------------------------------------------------------------------------------------


def _neutral_queries(resolved: Resolved) -> list[Tensor]:
    """Where scales and gains are 1 and logit biases 0, ``(B or 1, Sq)`` bool each."""
    scales = [] if resolved.scale is None else [resolved.scale.r]
    return [x == 1 for x in (*scales, *(m.g for m in resolved.gains))] + [m.b == 0 for m in resolved.biases]


def _queries(
    resolved: Resolved, bias: KeyBiasTables | None
) -> tuple[ScaleTables | None, SortedQueries | None, UnmodulatedQueries | None]:
    """Scales, and queries sorted by them; those that nothing modulates apart, where they are most. A finite key bias
    modulates all."""
    scale, rope = resolved.scale, resolved.rope
    alone = None if bias is not None and bias.finite is not None else unmodulated_queries(_neutral_queries(resolved))
    if scale is not None:
        r = scale.r
    elif alone is not None:
        r = torch.ones(1, len(alone), dtype=torch.float64, device="cpu")
    else:
        return None, None, None
    buckets, bucket = find_buckets(r)
    unmodulated = None
    if alone is not None:
        rows = alone.nonzero().flatten()
        unmodulated = of_unmodulated(None if rope is None or rope.applied else _angles(rope), rows)
    scales = None if scale is None else scale_tables(scale, buckets, bucket)
    return scales, sort_queries(bucket, r, alone), unmodulated


def _angles(rope: RoPE) -> Tensor:
    """``(Bx, S, P)`` float64."""
    angles = wide_on_cpu(rope.angles)
    return angles if angles.ndim == 3 else angles[None]


# ---- per-query scales ------------------------------------------------------------------------------------------------


def _axis_blocks(
    resolved: Resolved, places: Tensor, segments: tuple[Segment, ...]
) -> tuple[AxisBlocks, list[tuple[int, int]], KeyRuns | None]:
    rope, key_rope, scale = resolved.rope, resolved.key_rope or resolved.rope, resolved.scale
    assert rope is not None
    assert key_rope is not None
    assert scale is not None
    axis = rope.axis if rope.axis is not None else key_rope.axis
    axis = axis.cpu() if axis is not None else torch.zeros(rope.pairs, dtype=torch.int64, device="cpu")
    return axis_blocks(scale, _angles(key_rope)[:, places], scale.keys[places], axis, segments)


def _polynomial(resolved: Resolved, places: Tensor, queries: SortedQueries, scales: ScaleTables) -> Polynomial | None:
    key_rope, scale = resolved.key_rope or resolved.rope, resolved.scale
    assert key_rope is not None
    assert scale is not None
    rows = scale.keys[places].nonzero().flatten()
    counts = [row[0] for row in scales.counts]
    angles = _angles(key_rope)[:, places[rows]]
    return polynomial(scale, queries, counts, angles, rows, places[rows], key_rope.pairing, key_rope.applied)
