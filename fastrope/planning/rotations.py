"""Rotations of queries and keys: made with a plan, and made again for other angles."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .lowered import Lowered
from .tables import QueryTables, Rotation, ScaleTables, UnmodulatedQueries, weighted_rotation


def of_queries(angles: Tensor, applied: bool, scales: ScaleTables | None) -> QueryTables:
    """At r = 1, and at the query's scale.

    Args:
        angles: ``(Bx, Sq, P)`` float64.
        applied: queries arrive rotated.
    """
    plain = torch.zeros_like(angles) if applied else angles
    variants = [plain]
    if scales is not None:
        factor = scales.r[..., None] - 1  # phase beyond r = 1
        variants = list(torch.broadcast_tensors(plain, plain + factor * angles * scales.pairs))
    rotates = not applied or scales is not None
    return QueryTables(angles, Rotation.of(torch.stack(variants, dim=1)) if rotates else None)


def of_unmodulated(angles: Tensor | None, rows: Tensor) -> UnmodulatedQueries:
    """Of the queries ``rows (n,)`` int64, from ``angles (Bx, Sq, P)``; None where they arrive rotated."""
    return UnmodulatedQueries(rows, rows.int(), None if angles is None else Rotation.of(angles[:, None, rows]))


def of_keys(angles: Tensor, applied: bool, source: Tensor, scales: ScaleTables | None) -> Rotation:
    """Of the packed rows.

    Args:
        angles: ``(Bx, Sk, P)`` float64.
        applied: keys arrive rotated.
        source: ``(R,)`` the key of each row: all of them at r = 1, then the scaled ones once per scale bucket.
    """
    rows = angles[:, source]
    plain = torch.zeros_like(rows) if applied else rows
    if scales is None or not len(scales.buckets):
        return Rotation.of(plain)
    r = scales.buckets.repeat_interleave(scales.scaled_keys, output_size=len(scales.buckets) * scales.scaled_keys)
    r = torch.cat([r.new_ones(len(source) - len(r)), r])
    return Rotation.of(plain + (r - 1)[:, None] * rows * scales.pairs)


def turned(lowered: Lowered, queries: Tensor, keys: Tensor | None = None) -> Lowered:
    """The same plan for other angles ``(Bx, S, P)`` float64, without per-query scales; ``keys`` where these are other
    tokens. What does not depend on angles is shared; so is the rotation of queries and keys that are the same tokens.
    """
    keys = queries if keys is None else keys
    tables, alone = lowered.keys, lowered.unmodulated
    of_query = of_queries(queries, lowered.queries_applied, lowered.scales)
    rotation = tables.rotation
    if rotation is not None and keys is queries and tables.order is None and lowered.scales is None:
        rotation = Rotation(of_query.rotation.cos[:, 0], of_query.rotation.sin[:, 0])
    elif rotation is not None:
        rotation = of_keys(keys, lowered.keys_applied, tables.source.long(), lowered.scales)
    tables = replace(tables, angles=keys, rotation=rotation)
    if tables.weighted is not None and lowered.bands is not None:
        tables = replace(tables, weighted=weighted_rotation(rotation, lowered.bands, lowered.segments))
    if alone is not None:
        alone = of_unmodulated(None if lowered.queries_applied else queries, alone.rows)
    return replace(lowered, keys=tables, queries=of_query, unmodulated=alone)
