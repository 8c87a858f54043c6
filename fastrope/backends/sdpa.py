"""Modulated attention on torch's ``scaled_dot_product_attention``: any device, differentiable, no N x N tensor.

Everything a plan says of the keys goes into a copy of the keys, one per level. What differs between segments on the
query side (its rotation, its gain) is a *view*: views are laid side by side along the head dim and a key carries zeros
in all but its own, so that one call computes ``<q_view, k>`` for every segment::

    q = [ R(phi_i) q | R(r_i phi_i) q | g_i R(r_i phi_i) q ]       k_j = [ 0 | k_j | 0 ]

A gain belongs to the logits, and a query rounded once more for it would cost precision the specification does not. In
half precision such a view is two: the product rounded, and what the rounding left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..lowering import Segment
from ..planning import Plan
from ..rope import rotate

BLOCK_ROWS = 256  # query rows per step wherever logits must be materialised (lse, and devices without a fused kernel)
COPY_KEYS = 4  # key copies alive at once for queries with a scale of their own


@dataclass(frozen=True)
class _Rows:
    """The part of a call one SDPA call computes: queries that share their keys' treatment.

    ``batch (B',)`` batch rows (None: all as they are), ``queries (B', n)`` or ``(1, n)`` query indices (None: all),
    ``r`` a scale that broadcasts over ``(B', tokens, pairs)`` (None: 1).
    """

    batch: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    r: torch.Tensor | None = None

    def of_batch(self, table: torch.Tensor) -> torch.Tensor:
        """Batch rows of a ``(B or 1, ...)`` table."""
        return table if self.batch is None or table.shape[0] == 1 else table[self.batch]

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """Batch rows of ``(B, ...)``, one for each of ``batch`` even where B is 1."""
        if self.batch is None:
            return x
        return x.expand(len(self.batch), *x.shape[1:]) if x.shape[0] == 1 else x[self.batch]

    def of_queries(self, table: torch.Tensor) -> torch.Tensor:
        """Batch rows and queries of a ``(B or 1, Sq, ...)`` table."""
        if self.queries is None:
            return self.of_batch(table)
        if table.shape[0] == 1:
            return table[0, self.queries]
        if self.queries.shape[0] == 1:
            return self.of_batch(table)[:, self.queries[0]]
        return table[self.batch[:, None], self.queries]


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float, return_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`fastrope.backends.eager.run`. ``lse`` costs a second pass over the logits, in blocks."""
    t = plan.tensors
    if "key_order" in t:
        k, v = k[:, t["key_order"]], v[:, t["key_order"]]
    if "key_mask" in t:  # what a masked key holds must not matter, not even a NaN
        masked = ~t["key_mask"][:, :, None, None]
        k, v = k.masked_fill(masked, 0), v.masked_fill(masked, 0)
    if not plan.spec.level_counts:
        return _attend(q, k, v, plan, scale, return_lse, _Rows())
    everyone = torch.arange(q.shape[0], device=q.device)
    if len(plan.spec.level_counts) == 1:
        return _by_level(q, k, v, plan, scale, return_lse, everyone, 0)
    parts = [_by_level(q, k, v, plan, scale, return_lse, everyone[b : b + 1], b) for b in range(q.shape[0])]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts]) if return_lse else None


def _by_level(q, k, v, plan: Plan, scale, return_lse, batch: torch.Tensor, b: int):
    """Attend level by level; queries with a scale of their own in stacks of ``COPY_KEYS``."""
    t = plan.tensors
    order, counts = t["level_order"][b], plan.spec.level_counts[b]
    own, *levels = order.split(counts)
    outs, lses = [], []

    def attend(rows: _Rows) -> None:
        out, lse = _attend(q, k, v, plan, scale, return_lse, rows)
        stacked = len(out) // len(batch)  # queries that were laid out as batch rows
        outs.append(out.unflatten(0, (len(batch), stacked)).flatten(1, 2))
        if return_lse:
            lses.append(lse.unflatten(0, (len(batch), stacked)).transpose(1, 2).flatten(2, 3))

    for queries in own.split(COPY_KEYS):
        if len(queries):
            r = t["scale"][b if t["scale"].shape[0] > 1 else 0, queries]
            stack = batch.repeat_interleave(len(queries))
            attend(_Rows(stack, queries.repeat(len(batch))[:, None], r.repeat(len(batch))[:, None, None]))
    for n, queries in enumerate(levels):
        if len(queries):
            whole = None if len(batch) == q.shape[0] else batch
            attend(_Rows(whole, queries[None], t["levels"][n - 1] if n else None))
    inverse = order.argsort()
    return torch.cat(outs, dim=1)[:, inverse], torch.cat(lses, dim=2)[:, :, inverse] if return_lse else None


def _attend(q, k, v, plan: Plan, scale: float, return_lse: bool, rows: _Rows):
    """Attention of some queries against all keys: ``(B', n, H, D)``, ``(B', H, n)``."""
    q, k, v = rows.of_queries(q), rows.of_input(k), rows.of_input(v)
    mask = rows.of_batch(plan.tensors["key_mask"]) if "key_mask" in plan.tensors else None
    views = sorted({_view(s, rows) for s in plan.spec.segments}) or [(False, -1)]
    queries = torch.cat([x for view in views for x in _query_view(q, plan, rows, view)], dim=-1)
    keys = _keys(k, plan, mask, rows, views)
    heads, key_heads, dim = q.shape[2], k.shape[2], v.shape[3]
    # Grouped heads become more rows of the same key head: no copy of the keys.
    queries = queries.unflatten(2, (key_heads, heads // key_heads)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    keys, values = keys.transpose(1, 2), v.transpose(1, 2)
    alive = None if mask is None else mask.any(dim=1)
    bias = None if mask is None else (mask | ~alive[:, None])[:, None, None, :]
    out = _fused(queries, keys, values, bias, scale)[..., :dim]
    if alive is not None:
        out = out.masked_fill(~alive[:, None, None, None], 0)
    lse = _log_sum_exp(queries, keys, bias, scale, alive) if return_lse else None
    out = out.unflatten(2, (heads // key_heads, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out, lse.unflatten(2, (heads // key_heads, -1)).flatten(1, 2) if return_lse else None


def _view(segment: Segment, rows: _Rows) -> tuple[bool, int]:
    return segment.scaled and rows.r is not None, segment.gain


def _query_view(q, plan: Plan, rows: _Rows, view: tuple[bool, int]) -> list[torch.Tensor]:
    """The query's columns of a view: one block of ``D``, or two (see the top of this file)."""
    scaled, gain = view
    if "query_angles" in plan.tensors:
        q = _rotate(q, rows.of_queries(plan.tensors["query_angles"]), scaled, plan, rows, plan.spec.queries_applied)
    if gain < 0:
        return [q]
    wide = torch.promote_types(q.dtype, torch.float32)
    product = q.to(wide) * rows.of_queries(plan.tensors["gains"][:, gain]).to(wide)[:, :, None, None]
    rounded = product.to(q.dtype)
    return [rounded] if _blocks(view, q.dtype) == 1 else [rounded, (product - rounded.to(wide)).to(q.dtype)]


def _blocks(view: tuple[bool, int], dtype: torch.dtype) -> int:
    return 2 if view[1] >= 0 and dtype.itemsize < 4 else 1


def _keys(k, plan: Plan, mask, rows: _Rows, views) -> torch.Tensor:
    """``ktt`` at this level, each key in the columns of its segment's view: ``(B', Sk, Hkv, blocks * D)``."""
    t, spec, dim = plan.tensors, plan.spec, k.shape[3]
    wide = torch.promote_types(k.dtype, torch.float32)
    segments = spec.segments or (Segment(0, k.shape[1]),)
    parts = [k[:, s.start : s.stop] for s in segments]
    if "key_angles" in t:
        angles = t["key_angles"] if "key_order" not in t else t["key_angles"][:, t["key_order"]]
        angles = rows.of_batch(angles)
        parts = [
            _rotate(part, angles[:, s.start : s.stop], s.scaled and rows.r is not None, plan, rows, spec.keys_applied)
            for s, part in zip(segments, parts, strict=True)
        ]
    for g in range(spec.num_groups):  # kt = lambda mu + delta (khat - mu)
        bias, delta, count = rows.of_batch(t["groups"])[:, g].to(wide).unbind(1)
        total = 0
        for s, part in zip(segments, parts, strict=True):
            if s.group == g:
                member = part.to(wide) if mask is None else part.to(wide) * mask[:, s.start : s.stop, None, None]
                total = total + member.sum(dim=1, keepdim=True)
        mu = total / count.clamp(min=1)[:, None, None, None]
        shift = (bias - delta)[:, None, None, None] * mu
        parts = [
            (shift + delta[:, None, None, None] * part.to(wide)).to(k.dtype) if s.group == g else part
            for s, part in zip(segments, parts, strict=True)
        ]
    laid = []
    for s, part in zip(segments, parts, strict=True):
        if s.weight >= 0:  # ktt = w_c kt
            w = t["weights"][s.weight].to(wide)
            w = w.repeat_interleave(2) if spec.pairing == "interleaved" else torch.cat((w, w))
            part = (w * part.to(wide)).to(k.dtype)
        n = views.index(_view(s, rows))
        own = _blocks(views[n], k.dtype)
        before, after = (sum(_blocks(x, k.dtype) for x in some) for some in (views[:n], views[n + 1 :]))
        laid.append(F.pad(torch.cat([part] * own, dim=-1), (before * dim, after * dim)))
    return torch.cat(laid, dim=1)


def _rotate(x, angles, scaled: bool, plan: Plan, rows: _Rows, applied: bool) -> torch.Tensor:
    """``R(phi') x`` less what is applied already."""
    if not scaled:
        return x if applied else rotate(x, angles, plan.spec.pairing)
    factor = torch.where(plan.tensors["scaled_pairs"], rows.r, 1.0)
    return rotate(x, angles * (factor - 1 if applied else factor), plan.spec.pairing)


def _fused(q, k, v, mask, scale: float) -> torch.Tensor:
    """SDPA over ``(B, H, S, D)``, in blocks of queries where torch has no kernel that avoids the logits."""
    if q.device.type == "cpu":  # its flash kernel wants equal head dims
        v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        fused = True
    else:  # CUDA's kernels want head dims in eights
        fused = q.device.type == "cuda" and q.dtype != torch.float64
        q, k, v = (F.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v))
    blocks = [q] if fused else q.split(BLOCK_ROWS, dim=2)
    outs = [F.scaled_dot_product_attention(block, k, v, attn_mask=mask, scale=scale) for block in blocks]
    return torch.cat(outs, dim=2)


def _log_sum_exp(q, k, mask, scale: float, alive) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).transpose(-1, -2)
    blocks = []
    for block in q.split(BLOCK_ROWS, dim=2):
        s = (block.to(wide) @ keys) * scale
        blocks.append((s if mask is None else s.masked_fill(~mask, -torch.inf)).logsumexp(dim=-1))
    lse = torch.cat(blocks, dim=2)
    return lse if alive is None else lse.masked_fill(~alive[:, None, None], -torch.inf)
