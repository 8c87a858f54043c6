"""Logit and key biases as further channels of queries and keys, for torch's attention: no matrix of queries by keys.

A bias of a segment's keys is ``b_i = <b_i, 1>``: a channel that holds ``b_i`` in the query, and 1 in the keys of the
segment alone. A key bias is ``<1, beta_j>``. Products and sums of attention are float32, and so is the bias: in 16 bits
it is spread over as many channels as its 24 bits need, each the rounding residual of the one before. (A merge of one
call per segment by log-sum-exp would do without channels, and would need the log-sum-exp, which costs torch a second
pass over the logits.)

A bias of ``-inf`` cannot be multiplied. Where a query does not see a segment, a channel subtracts more than any two
logits differ by: a bound from the norms of this call's queries and keys, and a margin below which every weight is
exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from ..planning.lowered import Lowered
from ..planning.segments import Segment

PARTS = {torch.float16: 2, torch.bfloat16: 3}  # channels of a bias; 1 in wider dtypes
MARGIN = {torch.float64: 800.0}  # exp(-800) is 0 in float64
MARGIN_32 = 120.0  # and exp(-120) in float32


def append_biases(
    queries: Tensor,
    keys: Tensor,
    lowered: Lowered,
    segments: Sequence[Segment],
    scale: float,
    of_queries: Callable[[Tensor], Tensor],
    of_batch: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, float]:
    """``queries (B, n, H, C)`` and ``keys (B, m, Hkv, C)`` of the tokens of ``segments``, with channels for biases; the
    third result is the factor of their logits.

    In float32 and wider, the queries are multiplied by the factor, which is then 1. Torch would multiply logits that
    hold the biases already, and round them once more than the reference does.

    Args:
        scale: factor of the logits, not 0.
        of_queries: from ``(1 or B, Sq)`` to the rows and queries at hand.
        of_batch: likewise, rows of ``(1 or B, Sk)``.
    """
    bias, sets = lowered.keys.bias, list(dict.fromkeys(s.bias for s in segments if s.bias >= 0))
    if not sets and (bias is None or bias.finite is None):
        return queries, keys, scale
    dtype, first = queries.dtype, segments[0].start
    if dtype not in PARTS:
        queries, scale = queries * scale, 1.0
    unit = 2.0 ** min(max(round(-math.log2(abs(scale))) + 4, -14), 15)  # what stands for 1, so that float16 holds both
    of_query, of_key, members, hidden = [], [], [], []
    for n in sets:
        b = of_queries(bias_of(lowered, n))
        member = torch.zeros(1, keys.shape[1], dtype=dtype, device=keys.device)
        for s in segments:
            if s.bias == n:
                member[:, s.start - first : s.stop - first] = 1.0
        members.append(member)
        hidden.append((b == -torch.inf).to(dtype))
        parts = _parts(b.masked_fill(b == -torch.inf, 0.0) / (scale * unit), dtype)
        of_query += parts
        of_key += [member * unit] * len(parts)
    if bias is not None and bias.finite is not None:
        parts = _parts(of_batch(bias.finite[:, first : segments[-1].stop]) / (scale * unit), dtype)
        of_key += parts
        of_query += [torch.full((1, queries.shape[1]), unit, dtype=dtype, device=queries.device)] * len(parts)
    queries, keys = _with_channels(queries, of_query), _with_channels(keys, of_key)
    if sets:
        enough = 2 * _largest_norm(queries) * _largest_norm(keys) + MARGIN.get(dtype, MARGIN_32) / abs(scale)
        root = (1.01 * enough.sqrt()).clamp(max=torch.finfo(dtype).max).to(dtype)
        queries = _with_channels(queries, [-math.copysign(1.0, scale) * root * x for x in hidden])
        keys = _with_channels(keys, [root * member for member in members])
    return queries, keys, scale


def bias_of(lowered: Lowered, n: int) -> Tensor:
    """``(1 or B, Sq)`` float64: what set ``n`` of logit biases adds. Rows are taken one by one: an index made of Python
    numbers is a copy from the host, for which it waits."""
    return reduce(torch.add, (lowered.biases.values[:, row] for row in lowered.biases.sets[n]))


def _parts(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """``x`` as a sum of tensors of ``dtype``. Beyond half the dtype's range it is cut: whatever such a bias is beside
    others, weights are 0 or 1."""
    most, found = torch.finfo(dtype).max / 2, []
    x = x.clamp(-most, most)
    for _ in range(PARTS.get(dtype, 1)):
        found.append(x.to(dtype))
        x = x - found[-1].to(x.dtype)
    return found


def _with_channels(x: Tensor, channels: list[Tensor]) -> Tensor:
    """``x (B, n, H, C)`` and channels ``(1 or B, n)``, the same for all heads."""
    columns = (c[:, :, None, None].expand(*x.shape[:3], 1) for c in channels)
    return torch.cat([x, *columns], dim=3)


def _largest_norm(x: Tensor) -> Tensor:
    """Of a token of a head; what is not finite shows in its own row."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=wide).nan_to_num(0.0, 0.0, 0.0).amax()
