"""Modulated attention on torch's ``scaled_dot_product_attention``: any device, differentiable, no N x N tensor.

Everything a plan says of the keys goes into a copy of the keys, one per scale. What differs between segments on the
query side (its rotation, its gain) is a *query variant*: variants are laid side by side along the head dim and a key
carries zeros in all but one, so that one call computes ``<q_variant, k>`` for every segment::

    q = [ R(phi_i) q | R(r_i phi_i) q | g_i R(r_i phi_i) q ]       k_j = [ 0 | k_j | 0 ]

A gain belongs to the logits, and a query rounded once more for it would cost precision the specification does not. In
half precision such a variant is two: the product rounded, and its rounding residual. Biases are a few channels more
(``bias_channels.py``). Where segments have more variants than ``MAX_VARIANTS``, or more biases than ``MAX_BIASES``,
they are attended a few at a time, in float32, and merged.

Heads have nothing to do with each other. So copies that are wider than q and k are made for some of the heads at a
time: a large call with variants or biases takes no more memory than one that only rotates.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..planning.lowered import Lowered
from ..planning.segments import MAX_VARIANTS, Segment, split_passes
from ..rope import rotate
from .bias_channels import append_biases, bias_of
from .log_sum_exp import BLOCK_ROWS, log_sum_exp
from .lse_merge import Part, merge
from .values import modulated_values

MAX_BIASES = 8  # distinct biases of segments, a few channels each
WORTH = 1 << 20  # bytes of q; below, heads apart would take more time than memory is worth
COPY_KEYS = 4  # key copies alive at once for queries with per-query scales


@dataclass(frozen=True)
class Rows:
    """The part of a call one SDPA call computes: queries that share one scale.

    ``batch (B',)`` batch rows (None: all as they are), ``queries (B', n)`` or ``(1, n)`` query indices (None: all),
    ``r`` a scale that broadcasts over ``(B', tokens, pairs)`` (None: 1).
    """

    batch: Tensor | None = None
    queries: Tensor | None = None
    r: Tensor | None = None

    @staticmethod
    def of(queries: Tensor) -> Rows:
        """Queries ``(n,)`` int64 at a scale of 1, of all batch rows."""
        return Rows(None, queries[None])

    def of_batch(self, table: Tensor) -> Tensor:
        """Batch rows of a ``(B or 1, ...)`` table."""
        return table if self.batch is None or table.shape[0] == 1 else table[self.batch]

    def of_input(self, x: Tensor) -> Tensor:
        """Batch rows of ``(B, ...)``, one for each of ``batch`` even where B is 1."""
        if self.batch is None:
            return x
        return x.expand(len(self.batch), *x.shape[1:]) if x.shape[0] == 1 else x[self.batch]

    def of_queries(self, table: Tensor) -> Tensor:
        """Batch rows and queries of a ``(B or 1, Sq, ...)`` table."""
        if self.queries is None:
            return self.of_batch(table)
        if table.shape[0] == 1:
            return table[0, self.queries]
        if self.queries.shape[0] == 1:
            return self.of_batch(table)[:, self.queries[0]]
        return table[self.batch[:, None], self.queries]


def run(
    q: Tensor, k: Tensor, v: Tensor, lowered: Lowered, scale: float, return_lse: bool = False,
    without: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As :func:`fastrope.backends.reference.run`. ``lse`` costs a second pass over the logits, in blocks.

    Args:
        without: ``(n,)`` int64, queries at a scale of 1 to leave out, ``out (B, Sq - n, H, D)``.
    """
    key_heads, share = k.shape[2], q.shape[2] // k.shape[2]
    at_once = key_heads if q.nbytes < WORTH else -(-key_heads // _parts(lowered, q.dtype))
    outs, lses = [], []
    for first in range(0, key_heads, at_once):
        those = slice(first, first + at_once)
        mine = q[:, :, share * first : share * those.stop]
        out, lse = _run(mine, k[:, :, those], v[:, :, those], lowered, scale, return_lse, without)
        outs.append(out)
        lses.append(lse)
    return _joined(outs, dim=2), _joined(lses, dim=1) if return_lse else None


def _parts(lowered: Lowered, dtype: torch.dtype) -> int:
    """In how many parts the heads are attended, by what lies side by side for one of them."""

    def blocks(segments: Sequence[Segment]) -> int:
        biased = lowered.keys.biased or any(s.bias >= 0 for s in segments)
        return biased + sum(_blocks(variant, dtype) for variant in {(s.scaled, s.gain) for s in segments})

    widest = max((blocks(lowered.segments[slice(*bounds)]) for bounds in passes(lowered)), default=1)
    return 1 if widest <= 1 else 2 * widest


def _run(
    q: Tensor, k: Tensor, v: Tensor, lowered: Lowered, scale: float, return_lse: bool, without: Tensor | None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """:func:`run` of some heads."""
    dtype = q.dtype
    if len(passes(lowered)) > 1:  # parts are merged before they are rounded
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    k, v = in_key_order(k, v, lowered, dtype)
    if scale == 0:  # biases are added to logits of 0
        q, scale = q * 0, 1.0
    everyone = torch.arange(q.shape[0], device=q.device)
    if lowered.scales is None:
        queries = torch.arange(q.shape[1], device=q.device)
        rows = Rows() if without is None else Rows.of(others(without, queries, q.shape[1]))
        out, lse = _attend(q, k, v, lowered, scale, return_lse, rows)
    elif len(lowered.scales.counts) == 1:
        out, lse = _by_scale(q, k, v, lowered, scale, return_lse, everyone, 0, without)
    else:
        parts = [
            _by_scale(q, k, v, lowered, scale, return_lse, everyone[b : b + 1], b, without) for b in range(q.shape[0])
        ]
        lses = [lse for _, lse in parts if lse is not None]
        out, lse = torch.cat([out for out, _ in parts]), torch.cat(lses) if return_lse else None
    return out.to(dtype), None if lse is None else lse.to(torch.promote_types(dtype, torch.float32))


def others(some: Tensor, queries: Tensor, num_queries: int) -> Tensor:
    """``queries (m,)`` of ``num_queries`` without ``some (n,)`` of them, in their order, int64: sorted out, since the
    host would wait for the length of what a mask leaves."""
    out = torch.zeros(num_queries, dtype=torch.int32, device=queries.device).index_fill_(0, some, 1)
    return queries[out[queries].argsort(stable=True)[: len(queries) - len(some)]]


def in_key_order(k: Tensor, v: Tensor, lowered: Lowered, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as segments count them, values modulated and rounded to ``dtype``. What a masked key holds must
    not matter, not even a NaN: it is 0."""
    v = modulated_values(v, lowered, dtype)
    if lowered.keys.order is not None:
        k, v = k[:, lowered.keys.order], v[:, lowered.keys.order]
    if lowered.keys.masked is not None:
        masked = ~lowered.keys.masked[:, :, None, None]
        k, v = k.masked_fill(masked, 0), v.masked_fill(masked, 0)
    return k, v


def passes(lowered: Lowered) -> tuple[tuple[int, int], ...]:
    """Runs of segments whose query variants are laid side by side in one call."""
    return split_passes(lowered.segments, (lambda s: (s.scaled, s.gain), MAX_VARIANTS), (lambda s: s.bias, MAX_BIASES))


def _by_scale(
    q: Tensor, k: Tensor, v: Tensor, lowered: Lowered, scale: float, return_lse: bool, batch: Tensor, b: int,
    without: Tensor | None = None,
):  # fmt: skip
    """Attend scale by scale; queries with per-query scales in stacks of ``COPY_KEYS``."""
    scales = lowered.scales
    per_query, at_one, *buckets = scales.order[b].split(scales.counts[b])
    buckets = [at_one if without is None else others(without, at_one, q.shape[1]), *buckets]
    order = torch.cat([per_query, *buckets])
    outs, lses = [], []

    def attend(rows: Rows) -> None:
        out, lse = _attend(q, k, v, lowered, scale, return_lse, rows)
        stacked = len(out) // len(batch)  # queries that were laid out as batch rows
        outs.append(out.unflatten(0, (len(batch), stacked)).flatten(1, 2))
        if return_lse:
            lses.append(lse.unflatten(0, (len(batch), stacked)).transpose(1, 2).flatten(2, 3))

    for queries in per_query.split(COPY_KEYS):
        if len(queries):
            r = scales.r[b if scales.r.shape[0] > 1 else 0, queries]
            stack = batch.repeat_interleave(len(queries))
            attend(Rows(stack, queries.repeat(len(batch))[:, None], r.repeat(len(batch))[:, None, None]))
    for n, queries in enumerate(buckets):
        if len(queries):
            whole = None if len(batch) == q.shape[0] else batch
            attend(Rows(whole, queries[None], scales.buckets[n - 1] if n else None))
    inverse = order.argsort()
    return torch.cat(outs, dim=1)[:, inverse], torch.cat(lses, dim=2)[:, :, inverse] if return_lse else None


def _attend(q: Tensor, k: Tensor, v: Tensor, lowered: Lowered, scale: float, return_lse: bool, rows: Rows):
    """Attention of some queries against all keys: ``(B', n, H, D)``, ``(B', H, n)``."""
    q, k, v = rows.of_queries(q), rows.of_input(k), rows.of_input(v)
    mask = None if lowered.keys.masked is None else rows.of_batch(lowered.keys.masked)
    segments = lowered.segments or (Segment(0, k.shape[1]),)
    keys, bounds = modulated_keys(k, lowered, mask, rows, segments), passes(lowered)
    if len(bounds) == 1:
        return _attend_pass(q, keys, v, lowered, segments, mask, scale, return_lse, rows)

    def attend(first: int, last: int) -> Part:
        here = segments[first:last]
        tokens = slice(here[0].start, here[-1].stop)
        seen = None if mask is None else mask[:, tokens]
        return cast(Part, _attend_pass(q, keys[first:last], v[:, tokens], lowered, here, seen, scale, True, rows))

    return reduce(merge, itertools.starmap(attend, bounds))


def _attend_pass(
    q: Tensor,
    keys: list[Tensor],
    v: Tensor,
    lowered: Lowered,
    segments: Sequence[Segment],
    mask: Tensor | None,
    scale: float,
    return_lse: bool,
    rows: Rows,
):
    """Attention against ``keys``, one tensor ``(B', n, Hkv, D)`` for each of ``segments``."""
    variants = sorted({_variant(s, rows) for s in segments})
    queries = _joined([x for variant in variants for x in _query_variant(q, lowered, rows, variant)], dim=-1)
    laid = _lay_out(keys, segments, rows, variants)
    queries, laid, scale = append_biases(queries, laid, lowered, segments, scale, rows.of_queries, rows.of_batch)
    heads, key_heads, dim = q.shape[2], v.shape[2], v.shape[3]
    # Grouped heads become more rows of the same key head: no copy of the keys.
    queries = queries.unflatten(2, (key_heads, heads // key_heads)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    laid, values = laid.transpose(1, 2), v.transpose(1, 2)
    shown = None if mask is None else (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]
    out = _fused(queries, laid, values, shown, scale)[..., :dim]
    lse = log_sum_exp(queries, laid, shown, scale) if return_lse else None
    out = out.unflatten(2, (heads // key_heads, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    lse = lse.unflatten(2, (heads // key_heads, -1)).flatten(1, 2) if return_lse else None
    alive = _sees_a_key(lowered, segments, mask, rows)
    if alive is not None:
        out = out.masked_fill(~alive[:, :, None, None], 0)
        lse = lse.masked_fill(~alive[:, None], -torch.inf) if return_lse else None
    return out, lse


def _sees_a_key(lowered: Lowered, segments: Sequence[Segment], mask: Tensor | None, rows: Rows) -> Tensor | None:
    """Queries ``(1 or B', 1 or n)`` that see some key of ``segments``; None where all do."""
    if mask is None and any(s.bias < 0 for s in segments):
        return None
    first, found = segments[0].start, []
    for s in segments:
        seen = torch.ones(1, 1, dtype=torch.bool, device=lowered.keys.segments.device)
        if s.bias >= 0:
            seen = rows.of_queries(bias_of(lowered, s.bias)) > -torch.inf
        if mask is not None:
            seen = seen & mask[:, s.start - first : s.stop - first].any(dim=1, keepdim=True)
        found.append(seen)
    return torch.stack(torch.broadcast_tensors(*found)).any(dim=0)


def _variant(segment: Segment, rows: Rows) -> tuple[bool, int]:
    return segment.scaled and rows.r is not None, segment.gain


def _query_variant(q: Tensor, lowered: Lowered, rows: Rows, variant: tuple[bool, int]) -> list[Tensor]:
    """The query's columns of a variant: one block of ``D``, or two (see the top of this file)."""
    scaled, gain = variant
    if lowered.queries is not None:
        q = rotated(q, rows.of_queries(lowered.queries.angles), scaled, lowered, rows, lowered.queries_applied)
    if gain < 0:
        return [q]
    wide = torch.promote_types(q.dtype, torch.float32)
    gains = [rows.of_queries(lowered.gains.values[:, n]) for n in lowered.gains.sets[gain]]
    product = q.to(wide) * torch.stack(gains).prod(dim=0).to(wide)[:, :, None, None]
    rounded = product.to(q.dtype)
    return [rounded] if _blocks(variant, q.dtype) == 1 else [rounded, (product - rounded.to(wide)).to(q.dtype)]


def _blocks(variant: tuple[bool, int], dtype: torch.dtype) -> int:
    return 2 if variant[1] >= 0 and dtype.itemsize < 4 else 1


def modulated_keys(
    k: Tensor, lowered: Lowered, mask: Tensor | None, rows: Rows, segments: Sequence[Segment]
) -> list[Tensor]:
    """``ktt`` at this scale, ``(B', n, Hkv, D)`` for each segment."""
    tables = lowered.keys
    wide = torch.promote_types(k.dtype, torch.float32)
    parts = [k[:, s.start : s.stop] for s in segments]
    if tables.angles is not None:
        angles = tables.angles if tables.order is None else tables.angles[:, tables.order]
        angles = rows.of_batch(angles)
        turned = [s.scaled and rows.r is not None for s in segments]
        parts = [
            rotated(part, angles[:, s.start : s.stop], scaled, lowered, rows, lowered.keys_applied)
            for s, scaled, part in zip(segments, turned, parts, strict=True)
        ]
    sums: dict[int, Tensor] = {}
    for s, part in zip(segments, parts, strict=True):
        if s.group >= 0:
            member = part.to(wide) if mask is None else part.to(wide) * mask[:, s.start : s.stop, None, None]
            sums[s.group] = sums.get(s.group, 0) + member.sum(dim=1, keepdim=True)
    for n, s in enumerate(segments):
        if s.group >= 0:  # kt = lambda mu + delta (khat - mu)
            values = rows.of_batch(lowered.groups.values)[:, s.group, :, None, None, None]
            bias, delta, count = values.to(wide).unbind(1)
            mu = sums[s.group] / count.clamp(min=1)
            parts[n] = ((bias - delta) * mu + delta * parts[n].to(wide)).to(k.dtype)
        if s.weight >= 0:  # ktt = w_c kt
            w = lowered.bands.weights[s.weight].to(wide)
            w = w.repeat_interleave(2) if lowered.pairing == "interleaved" else torch.cat((w, w))
            parts[n] = (w * parts[n].to(wide)).to(k.dtype)
    return parts


def _lay_out(keys: list[Tensor], segments: Sequence[Segment], rows: Rows, variants: list[tuple[bool, int]]) -> Tensor:
    """Each key in the columns of its segment's variant: ``(B', n, Hkv, blocks * D)``."""
    laid = []
    for s, part in zip(segments, keys, strict=True):
        n, dim = variants.index(_variant(s, rows)), part.shape[3]
        blocks = _blocks(variants[n], part.dtype)
        before, after = (sum(_blocks(x, part.dtype) for x in some) for some in (variants[:n], variants[n + 1 :]))
        wide = _joined([part] * blocks, dim=-1)
        laid.append(F.pad(wide, (before * dim, after * dim)) if before + after else wide)
    return _joined(laid, dim=1)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Side by side; torch copies a single part, too."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def rotated(x: Tensor, angles: Tensor, scaled: bool, lowered: Lowered, rows: Rows, applied: bool) -> Tensor:
    """``R(phi') x`` less what is applied already."""
    if not scaled or rows.r is None:
        return x if applied else rotate(x, angles, lowered.pairing)
    factor = torch.where(lowered.scales.pairs, rows.r, 1.0)
    return rotate(x, angles * (factor - 1 if applied else factor), lowered.pairing)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """SDPA over ``(B, H, S, D)``, in blocks of queries where torch has no kernel that avoids the logits."""
    if q.device.type == "cpu":  # its flash kernel wants equal head dims
        v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        fused = True
    else:  # CUDA's kernels want head dims in eights
        fused = q.device.type == "cuda" and q.dtype != torch.float64
        q, k, v = (F.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v))
    blocks = [q] if fused else q.split(BLOCK_ROWS, dim=2)
    outs = [F.scaled_dot_product_attention(block, k, v, attn_mask=mask, scale=scale) for block in blocks]
    return _joined(outs, dim=2)
