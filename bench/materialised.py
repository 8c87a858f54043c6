"""Attention the way the methods' authors publish it: every logit of every head in memory, once more per scale.

With many distinct scales, what their code does for a level is done for a query: its keys are rotated for it alone.
Logits are float32 rather than the authors' half precision, whose rounding the tolerance rule refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastrope as fr
from fastrope.rope import rotate

from .problem import Problem, Unsupported, key_mask

MAX_SCALES = 8  # a pass over all logits each
QUERIES = 16  # whose keys are in memory at once, where every query has its own
MAX_ELEMENTS = 2**36  # of all those keys together: seconds


def materialised(problem: Problem) -> Callable[[], torch.Tensor]:
    """``run() -> (B, Sq, H, D)``.

    Raises:
        Unsupported: keys per query that take more than a few seconds.
    """
    q, k, v, rope, key_rope = problem.q, problem.k, problem.v, problem.rope, problem.rotation_of_keys
    tokens, visible = k.shape[1], problem.key_mask

    def chosen(kind: type) -> list:
        return [(m, key_mask(m.keys, tokens, q.device)) for m in problem.modulations if isinstance(m, kind)]

    scaled, groups, gains = chosen(fr.QueryScale), chosen(fr.BiasDelta), chosen(fr.LogitGain)
    bands = [(m.weight.repeat_interleave(2), keys) for m, keys in chosen(fr.BandWeight)]
    apart = [(m.scale != 1).nonzero().flatten() for m, _ in scaled]
    distinct = [m.scale[rows].unique().tolist() for (m, _), rows in zip(scaled, apart, strict=True)]
    one_by_one = any(len(values) > MAX_SCALES for values in distinct)
    if one_by_one and len(apart[0]) * k.numel() > MAX_ELEMENTS:
        raise Unsupported(f"keys of {len(apart[0])} queries, {len(apart[0]) * k.numel():.1g} elements")

    def pairs(m: fr.QueryScale) -> torch.Tensor:
        return torch.where(torch.isin(rope.axis, torch.tensor(m.axes, device=q.device)), 1.0, 0.0)

    def mean(khat: torch.Tensor, keys: torch.Tensor, rows: slice) -> torch.Tensor:
        if visible is None:
            return khat[:, keys].float().mean(dim=1, keepdim=True)
        member = (visible[rows] & keys)[:, :, None, None]
        return (khat.float() * member).sum(dim=1, keepdim=True) / member.sum(dim=1, keepdim=True)

    def modulated(khat: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        for m, keys in groups:
            mu = mean(khat, keys, rows)
            kt = m.bias * mu + m.delta * (khat.float() - mu)
            khat = torch.where(keys[:, None, None], kt.to(k.dtype), khat)
        for w, keys in bands:
            khat = torch.where(keys[:, None, None], (w * khat.float()).to(k.dtype), khat)
        return khat

    def by_level(s, khat, m, keys, r, factor):
        turn = 1 + (r - 1) * factor
        kr = torch.where(keys[:, None, None], rotate(k, key_rope.angles * turn, rope.pairing), khat)
        part = _product(rotate(q, rope.angles * turn, rope.pairing), modulated(kr))
        return torch.where((m.scale == r)[:, None] & keys, part, s)

    def by_query(s, khat, m, keys, rows, factor) -> None:
        turn = 1 + (m.scale[rows, None] - 1) * factor  # (n, D/2)
        queries = rotate(q[:, rows], rope.angles[rows] * turn, rope.pairing)
        for b in range(len(q)):
            row = slice(b, b + 1)
            own = rotate(k[row].expand(len(rows), -1, -1, -1), key_rope.angles * turn[:, None], rope.pairing)
            kr = modulated(torch.where(keys[:, None, None], own, khat[row]), row)
            part = torch.einsum("nhd,njhd->hnj", queries[b].float(), kr.float())
            s[b, :, rows] = torch.where(keys, part, s[b, :, rows])

    def run() -> torch.Tensor:
        khat = rotate(k, key_rope.angles, rope.pairing)
        s = _product(rotate(q, rope.angles, rope.pairing), modulated(khat))
        for (m, keys), rows, values in zip(scaled, apart, distinct, strict=True):
            if one_by_one:
                for some in rows.split(QUERIES):
                    by_query(s, khat, m, keys, some, pairs(m))
                continue
            for r in values:
                s = by_level(s, khat, m, keys, r, pairs(m))
        s *= problem.scale
        for m, keys in gains:
            s *= torch.where(keys, m.gain[:, None], 1.0)
        if visible is not None:
            s.masked_fill_(~visible[:, None, None, :], -torch.inf)
        p = s.softmax(dim=-1).to(q.dtype)
        return (p @ v.transpose(1, 2)).transpose(1, 2).contiguous()

    return run


def _product(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``(B, H, Sq, Sk)`` float32."""
    q, k = q.transpose(1, 2), k.permute(0, 2, 3, 1)
    if not q.is_cuda or q.dtype == torch.float32:
        return q.float() @ k.float()
    return torch.bmm(q.flatten(0, 1), k.flatten(0, 1), out_dtype=torch.float32).unflatten(0, q.shape[:2])
