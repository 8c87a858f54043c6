"""Folded and split-off work for any plain attention, by torch's operations: any device, differentiable where that
attention is. Where our kernels run, ``folded.py`` and ``split_rows.py`` do the same.

It has one entry, :func:`run`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..planning.lowered import Lowered
from ..planning.segments import Segment
from . import sdpa
from .plain import Attend, each_row


def run(q: Tensor, k: Tensor, v: Tensor, lowered: Lowered, scale: float, plain: Attend, split: bool) -> Tensor:
    """``out (B, Sq, H, D)``: all queries of a plan that folds by ``plain``, or of one that is ``split`` the unmodulated
    ones; the others by torch's attention.

    Extra memory: a copy each of q, k and of v where values change; under a mask one more of k and v.
    """
    if not split:
        return _folded(q, k, v, lowered, scale, plain, sdpa.Rows())
    unmodulated = lowered.unmodulated.rows
    alone = _folded(q, k, v, lowered, scale, plain, sdpa.Rows.of(unmodulated))
    rest, _ = sdpa.run(q, k, v, lowered, scale, without=unmodulated)
    everyone = torch.arange(q.shape[1], device=q.device)
    places = torch.cat([unmodulated, sdpa.others(unmodulated, everyone, q.shape[1])])
    return torch.cat([alone, rest], dim=1)[:, places.argsort()]


def _folded(
    q: Tensor, k: Tensor, v: Tensor, lowered: Lowered, scale: float, plain: Attend, rows: sdpa.Rows
) -> Tensor:  # fmt: skip
    """Queries at a scale and gain of 1 and without a bias."""
    segments = lowered.segments or (Segment(0, k.shape[1]),)
    queries = rows.of_queries(q)
    if lowered.queries is not None:
        angles = rows.of_queries(lowered.queries.angles)
        queries = sdpa.rotated(queries, angles, False, lowered, rows, lowered.queries_applied)
    keys, values = sdpa.in_key_order(k, v, lowered, q.dtype)
    keys = torch.cat(sdpa.modulated_keys(keys, lowered, lowered.keys.masked, rows, segments), dim=1)
    return each_row(queries, keys, values, scale, lowered.keys.unmasked, plain, lambda x, places: x[:, places])
