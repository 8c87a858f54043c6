"""Attention the way the methods' authors publish it: every logit of every head in memory, once more per scale.

Logits are float32 rather than the authors' half precision, whose rounding the tolerance rule refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastrope as fr
from fastrope.rope import rotate

from .problem import Problem, Unsupported, key_mask

MAX_SCALES = 8  # a pass over all logits each


def materialised(problem: Problem) -> Callable[[], torch.Tensor]:
    """``run() -> (B, S, H, D)``.

    Raises:
        Unsupported: more than ``MAX_SCALES`` distinct scales.
    """
    q, k, v, rope = problem.q, problem.k, problem.v, problem.rope
    tokens = k.shape[1]

    def chosen(kind: type) -> list:
        return [m for m in problem.modulations if isinstance(m, kind)]

    scaled = [(m, key_mask(m.keys, tokens, q.device)) for m in chosen(fr.QueryScale)]
    groups = [(m, key_mask(m.keys, tokens, q.device)) for m in chosen(fr.BiasDelta)]
    bands = [(m.weight.repeat_interleave(2), key_mask(m.keys, tokens, q.device)) for m in chosen(fr.BandWeight)]
    gains = [(m.gain[:, None], key_mask(m.keys, tokens, q.device)) for m in chosen(fr.LogitGain)]
    scales = [r for m, _ in scaled for r in m.scale.unique().tolist() if r != 1]
    if len(scales) > MAX_SCALES:
        raise Unsupported(f"{len(scales)} passes over all logits")
    factors = [torch.where(torch.isin(rope.axis, torch.tensor(m.axes, device=q.device)), 1.0, 0.0) for m, _ in scaled]

    def modulated(khat: torch.Tensor) -> torch.Tensor:
        for m, keys in groups:
            mu = khat[:, keys].float().mean(dim=1, keepdim=True)
            kt = m.bias * mu + m.delta * (khat.float() - mu)
            khat = torch.where(keys[:, None, None], kt.to(k.dtype), khat)
        for w, keys in bands:
            khat = torch.where(keys[:, None, None], (w * khat.float()).to(k.dtype), khat)
        return khat

    def run() -> torch.Tensor:
        khat = rotate(k, rope.angles, rope.pairing)
        s = _product(rotate(q, rope.angles, rope.pairing), modulated(khat))
        for (m, keys), pairs in zip(scaled, factors, strict=True):
            for r in scales:
                angles = rope.angles * (1 + (r - 1) * pairs)
                kr = torch.where(keys[:, None, None], rotate(k, angles, rope.pairing), khat)
                pick = (m.scale == r)[:, None] & keys
                s = torch.where(pick, _product(rotate(q, angles, rope.pairing), modulated(kr)), s)
        s *= problem.scale
        for g, keys in gains:
            s *= torch.where(keys, g, 1.0)
        p = s.softmax(dim=-1).to(q.dtype)
        return (p @ v.transpose(1, 2)).transpose(1, 2).contiguous()

    return run


def _product(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``(B, H, S, S)`` float32."""
    q, k = q.transpose(1, 2), k.permute(0, 2, 3, 1)
    if not q.is_cuda or q.dtype == torch.float32:
        return q.float() @ k.float()
    return torch.bmm(q.flatten(0, 1), k.flatten(0, 1), out_dtype=torch.float32).unflatten(0, q.shape[:2])
