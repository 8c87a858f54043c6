"""Lowering of resolved modulations into the tensors a backend reads. All work happens on the CPU.

Shapes use ``Bx`` for a batch that is 1 or B, ``P = D/2`` pairs, ``N`` query slots, ``R`` rows of the packed key buffer:
``Sk`` rows in key order at r = 1, then, per level, the scaled keys once more.
"""

from __future__ import annotations

import numpy as np
import torch

from . import lowering, series
from .checks import require
from .device import wide_on_cpu
from .lowering import Segment
from .planning import PlanSpec, gain_products, weighted_rotation
from .resolve import Group, Resolved
from .rope import RoPE

# Columns of tensors["segments"], read by the kernels.
SEGMENT_FIELDS = (
    "start", "stop", "level_base", "scaled", "weight", "group", "gain", "patch_start", "patch_stop", "view",
    "first_of_view", "own_group",
)  # fmt: skip


def lower(
    rope: RoPE | None,
    key_rope: RoPE | None,
    resolved: Resolved,
    key_mask: torch.Tensor | None,
    num_queries: int | None,
    num_keys: int | None,
) -> tuple[PlanSpec, dict[str, torch.Tensor]]:
    """Spec and tensors of a plan; neutral modulations are gone from ``resolved`` already."""
    fields = dict(
        batch=_batch(rope, key_rope, resolved, key_mask), num_queries=num_queries, num_keys=num_keys,
        pairs=rope and rope.pairs, pairing=rope.pairing if rope else "interleaved",
        queries_applied=rope is not None and rope.applied, keys_applied=key_rope is not None and key_rope.applied,
    )  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    if num_keys is not None:
        treatments, fields["gain_sets"] = _treat_keys(tensors, resolved, num_keys)
        segments, order = lowering.segment_keys(treatments)
        if order is not None:
            tensors["key_order"] = order
        if key_mask is not None:
            mask = key_mask.cpu()
            tensors["key_mask"] = mask if order is None else mask[:, order]
        if resolved.groups:
            _group_tables(tensors, resolved, key_mask, segments)
        fields.update(segments=segments, num_groups=len(resolved.groups))
        levels, query_fields = _query_tables(tensors, resolved, key_mask)
        fields |= query_fields
        if rope is not None:
            _rotation_tables(tensors, rope, key_rope, resolved, levels, segments)
        folds = key_mask is None and ("untouched" in tensors or not _per_query(resolved))
        if resolved.weights and folds:  # for all queries, or for those that nothing sets apart
            tensors.update(weighted_rotation(tensors, segments))
        if order is not None and "key_source" not in tensors:
            tensors["key_source"] = order.int()
        patch_bounds = [(0, 0)] * len(segments)
        if fields.get("continuous"):
            patch_bounds = _patch_tables(tensors, rope, key_rope, resolved, segments)
            counts = [row[0] for row in fields["level_counts"]]
            fields["reach"] = _series_tables(tensors, rope, key_rope, resolved, counts)
        passes = lowering.launch_passes(segments, bool(fields.get("continuous")))
        tensors["segments"] = _segment_table(segments, passes, patch_bounds)
        fields["passes"] = passes
        if resolved.gains and len(passes) == 1:
            tensors["kernel_gains"] = gain_products(tensors["gains"], fields["gain_sets"], segments)
    return PlanSpec(tensor_names=tuple(tensors), **fields), tensors


def _batch(rope, key_rope, resolved: Resolved, key_mask) -> int | None:
    """The batch every batched argument agrees on; None when nothing is batched."""
    sizes = []
    for name, r in (("rope.angles", rope), ("key_rope.angles", key_rope)):
        if r is not None and r.angles.ndim == 3:
            sizes.append((name, r.angles.shape[0]))
    if key_mask is not None:
        sizes.append(("key_mask", key_mask.shape[0]))
    if resolved.scale is not None:
        sizes.append(("QueryScale.scale", resolved.scale.r.shape[0]))
    for group in resolved.groups:
        sizes += [("BiasDelta.bias", len(group.bias)), ("BiasDelta.delta", len(group.delta))]
    sizes += [("LogitGain.gain", gain.g.shape[0]) for gain in resolved.gains]
    batch = None
    for name, size in sizes:
        if size > 1:
            require(batch in (None, size), name, f"batch {batch}", size)
            batch = size
    return batch


def _treat_keys(tensors, resolved: Resolved, num_keys: int) -> tuple[lowering.Treatments, tuple]:
    """Distinct products of weights ``weights (W, P)``, the gains ``gains (Bg, n, Sq)`` and the sets of them that are
    multiplied somewhere, and which key gets which."""
    weight_sets, weight = lowering.distinct_sets([m.keys for m in resolved.weights], num_keys)
    if weight_sets:
        rows = [torch.stack([resolved.weights[i].w for i in members]).prod(0) for members in weight_sets]
        tensors["weights"] = torch.stack(rows)
        tensors["kernel_weights"] = tensors["weights"].float()
    gain_sets, gain = lowering.distinct_sets([m.keys for m in resolved.gains], num_keys)
    if gain_sets:
        batch = max(m.g.shape[0] for m in resolved.gains)
        tensors["gains"] = torch.stack([m.g.expand(batch, -1) for m in resolved.gains], dim=1)
    group = torch.full((num_keys,), -1, dtype=torch.int64)
    for i, m in enumerate(resolved.groups):
        group[m.keys] = i
    scaled = resolved.scale.keys if resolved.scale is not None else torch.zeros(num_keys, dtype=torch.bool)
    return lowering.Treatments(scaled, weight, group, gain), tuple(gain_sets)


def _group_tables(tensors, resolved: Resolved, key_mask, segments) -> None:
    """``groups (Bg, G, 3)`` (see :func:`group_table`); the segments of group g are
    ``group_members[group_bounds[g] : group_bounds[g + 1]]``."""
    owner = np.array([s.group for s in segments])
    members = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[members], np.arange(len(resolved.groups) + 1))
    tensors["group_members"], tensors["group_bounds"] = (torch.from_numpy(x).int() for x in (members, bounds))
    counts = []
    for m in resolved.groups:
        mask = m.keys[None] if key_mask is None else m.keys[None] & key_mask.cpu()
        counts.append(mask.sum(1).double())
    tensors["groups"] = group_table(resolved.groups, torch.stack(counts, dim=1))
    tensors["kernel_groups"] = tensors["groups"].float()


def group_table(groups: tuple[Group, ...], counts: torch.Tensor) -> torch.Tensor:
    """``(Bg, G, 3)``: lambda, delta and the number of unmasked keys, the latter from ``counts (B or 1, G)``."""
    batch = max(len(counts), *(len(x) for m in groups for x in (m.bias, m.delta)))
    columns = [torch.stack([getattr(m, name).expand(batch) for m in groups], dim=1) for name in ("bias", "delta")]
    return torch.stack([*columns, counts.expand(batch, -1)], dim=2)


def _per_query(resolved: Resolved) -> list[torch.Tensor]:
    """Scales and gains, ``(B or 1, Sq)`` each."""
    scales = [] if resolved.scale is None else [resolved.scale.r]
    return scales + [m.g for m in resolved.gains]


def _query_tables(tensors, resolved: Resolved, key_mask) -> tuple[torch.Tensor, dict]:
    """Levels ``(L,)`` and fields of the spec. Tensors: ``scale (Bs, Sq)``, ``levels``, ``level_order (Bs, Sq)`` the
    queries sorted by level; for the kernels ``slots (Bs, N)``, ``slot_level (Bs, T)``, and ``untouched (n,)`` the
    queries that nothing sets apart, where they are most."""
    scale, fields = resolved.scale, {}
    untouched = None if key_mask is not None else lowering.untouched_queries(_per_query(resolved))
    if scale is None and untouched is None:
        return torch.empty(0, dtype=torch.float64), fields
    r = torch.ones(1, len(untouched), dtype=torch.float64) if scale is None else scale.r
    levels, level = lowering.find_levels(r)
    if scale is not None:
        tensors.update(scale=r, levels=levels, scaled_pairs=scale.pairs)
        tensors["level_order"] = level.argsort(dim=1, stable=True)
        classes = range(lowering.CONTINUOUS, len(levels) + 1)
        fields["level_counts"] = tuple(tuple(int((row == n).sum()) for n in classes) for row in level)
        fields.update(num_levels=len(levels), scaled_keys=int(scale.keys.sum()))
    slots, slot_level, fields["continuous"], fields["touched"] = lowering.query_slots(level, r, untouched)
    tensors.update(slots=slots, slot_level=slot_level)
    if untouched is not None:
        rows = untouched.nonzero().flatten()
        tensors.update(untouched=rows, untouched_source=rows.int())
    return levels, fields


def _rotation_tables(tensors, rope, key_rope, resolved, levels, segments) -> None:
    """Cosines and sines, from float64 angles: of the queries ``(Bx, 1 or 2, Sq, P)`` (at r = 1; at their own scale) and
    of the packed key rows ``(Bx, R, P)`` with the key ``key_source (R,)`` each is made from."""
    query, key = (_batched(r.angles) for r in (rope, key_rope))
    tensors["query_angles"], tensors["key_angles"] = query, key
    scale = resolved.scale
    plain = torch.zeros_like(query) if rope.applied else query
    variants = [plain]
    if scale is not None:
        factor = scale.r[..., None] - 1  # phase beyond r = 1
        variants = list(torch.broadcast_tensors(plain, plain + factor * query * scale.pairs))
    if not rope.applied or scale is not None:
        _store_rotation(tensors, "query", torch.stack(variants, dim=1))
    if "untouched" in tensors and not rope.applied:
        _store_rotation(tensors, "untouched", query[:, None, tensors["untouched"]])
    order = tensors.get("key_order", torch.arange(key.shape[1]))
    if key_rope.applied and not len(levels):
        return
    plain = torch.zeros_like(key) if key_rope.applied else key
    rows, source = [plain[:, order]], [order]
    if len(levels):
        scaled = order[scale.keys[order]]
        for r in levels:
            rows.append((plain + (r - 1) * key * scale.pairs)[:, scaled])
            source.append(scaled)
    _store_rotation(tensors, "key", torch.cat(rows, dim=1))
    tensors["key_source"] = torch.cat(source).int()


def _store_rotation(tensors, name: str, angles: torch.Tensor) -> None:
    tensors[f"{name}_cos"], tensors[f"{name}_sin"] = angles.cos().float(), angles.sin().float()


def _batched(angles: torch.Tensor) -> torch.Tensor:
    angles = wide_on_cpu(angles)
    return angles if angles.ndim == 3 else angles[None]


def _patch_tables(tensors, rope, key_rope, resolved, segments):
    """Patches of the scaled segments (see :class:`lowering.Patches`) with rows in key order, the phases they need, and
    the pair columns of each class. Phases and factors are split, so that the kernels' float32 holds their product
    however far apart the keys are. Returns the patches of each segment."""
    scale, key = resolved.scale, tensors["key_angles"]
    order = tensors.get("key_order", torch.arange(key.shape[1]))
    axis = rope.axis if rope.axis is not None else key_rope.axis
    axis = axis.cpu() if axis is not None else torch.zeros(rope.pairs, dtype=torch.int64)
    ordered = key[:, order]
    rows = scale.keys[order].nonzero().flatten()
    runs = [np.arange(s.start, s.stop) for s in segments if s.scaled]
    classes, found = lowering.arrange_keys(ordered, runs, axis, scale.pairs)
    bounds, count, arranged = [], 0, iter(found)
    for s in segments:
        size = len(next(arranged).keys) if s.scaled else 0
        bounds.append((count, count + size))
        count += size
    for name in ("keys", "a", "b", "c"):
        stacked = np.concatenate([getattr(p, name) for p in found])
        tensors[f"patch_{name}"] = torch.from_numpy(stacked).int()
    still = tuple((~scale.pairs).nonzero().flatten().tolist())
    for name, pairs in (("a", classes.a), ("b", classes.b), ("c", classes.c + still)):
        padding = [-1] * (-len(pairs) % lowering.PAIR_CHUNK)
        tensors[f"patch_columns_{name}"] = torch.tensor([*pairs, *padding], dtype=torch.int32)
    tensors["patch_phase"] = split(torch.where(scale.pairs, ordered * (2 / torch.pi), 0.0))
    tensors["patch_factor"] = split(1 - scale.r)
    if resolved.groups:
        _class_tables(tensors, ordered[:, rows], rows, classes, segments)
    return bounds


def _series_tables(tensors, rope, key_rope, resolved, counts: list[int]) -> float:
    """What :func:`fastrope.series.tables` says, if anything, with the scaled keys it is of: their rows among the packed
    keys, or unless they arrive rotated, among those packed for the series alone, with the token each is made from and
    the rotation of the pairs that no scale turns. Returns their reach."""
    scale, key = resolved.scale, tensors["key_angles"]
    order = tensors.get("key_order", torch.arange(key.shape[1]))
    rows = scale.keys[order].nonzero().flatten()
    angles, turned_by = key[:, order[rows]], 1 - scale.r if key_rope.applied else -scale.r
    found, reach = series.tables(turned_by, tensors["slots"], counts, angles, scale.pairs, rope.pairing)
    if found:
        found["series_origin"] = split(found["series_origin"])
        found["series_factor"] = split(turned_by)
        tensors.update(found, series_rows=rows)
        if not key_rope.applied:
            tensors["series_rows"] = torch.arange(len(rows))
            _store_rotation(tensors, "series", torch.where(scale.pairs, 0.0, angles))
            tensors["series_source"] = order[rows].int()
    return reach


def split(x: torch.Tensor) -> torch.Tensor:
    """``x (B, ...)`` float64 as the sum of two float32 numbers, ``(B, 2, ...)``, the first of at most 12 bits: products
    of two such are exact in float32."""
    mantissa, exponent = torch.frexp(x)
    leading = torch.ldexp((mantissa * 2**12).round(), exponent - 12)
    return torch.stack([leading, x - leading], dim=1).float()


def _class_tables(tensors, angles, rows, classes, segments) -> None:
    """For the means of groups under a continuous scale: the scaled rows and their group, and per pair class its pairs,
    the scaled keys sorted by their angles, how many keys share each, and the ``U`` distinct angles
    ``(Bk, U, pairs)``."""
    group = torch.full((segments[-1].stop,), -1, dtype=torch.int64)
    for s in segments:
        group[s.start : s.stop] = s.group
    tensors["scaled_rows"], tensors["scaled_group"] = rows, group[rows]
    for name in ("a", "b", "c"):
        pairs = torch.tensor(getattr(classes, name), dtype=torch.int64)
        ids, first = lowering.distinct_angles(angles, pairs)
        tensors[f"class_{name}_pairs"] = pairs
        tensors[f"class_{name}_order"] = torch.from_numpy(np.argsort(ids, kind="stable"))
        tensors[f"class_{name}_lengths"] = torch.from_numpy(np.bincount(ids))
        tensors[f"class_{name}_angles"] = angles[:, torch.from_numpy(first)][..., pairs]


def _segment_table(segments: tuple[Segment, ...], passes, patch_bounds) -> torch.Tensor:
    """``(segments, len(SEGMENT_FIELDS))``. A scaled key's row at level l is ``level_base + l * scaled_keys``; segments
    with one view read the same prepared queries. Views, gains and the groups of per-query means are numbered within a
    pass."""
    total = segments[-1].stop
    scaled_keys = sum(len(s) for s in segments if s.scaled)
    rows, seen = [], 0
    for first, last in passes:
        here = segments[first:last]
        views = list(dict.fromkeys(s.view for s in here))
        gains = list(dict.fromkeys(s.gain for s in here if s.gain >= 0))
        groups = list(dict.fromkeys(s.group for s in here if s.group >= 0))
        met = set()
        for s, (patch_start, patch_stop) in zip(here, patch_bounds[first:last], strict=True):
            level_base = total - scaled_keys + seen if s.scaled else s.start
            gain, group = (-1 if n < 0 else known.index(n) for n, known in ((s.gain, gains), (s.group, groups)))
            rows.append(
                [s.start, s.stop, level_base, int(s.scaled), s.weight, s.group, gain, patch_start, patch_stop,
                 views.index(s.view), int(s.view not in met), group]
            )  # fmt: skip
            met.add(s.view)
            seen += len(s) if s.scaled else 0
    return torch.tensor(rows, dtype=torch.int32)
