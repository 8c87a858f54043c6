"""Quantised plain attention, simulated in float32 on a CPU: the rounding of a kernel in 8 bits, not its speed.

Both take what ``plain=`` takes, and return a log-sum-exp on request.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK, KEY_BLOCK = 128, 64  # tokens that share a scale
E4M3 = torch.finfo(torch.float8_e4m3fn).max


def int8(query: Tensor, key: Tensor, value: Tensor, scale: float, return_lse: bool = False, **_: object):
    """As SageAttention (arXiv 2410.02367): int8 products of q and k with a scale per block of tokens and head, after
    the mean over all keys is taken from every key; weights and values in float16, summed in float32."""
    q, k, v = _heads_first(query, key, value)
    mean = k.mean(dim=2, keepdim=True)
    s = _int8(q, QUERY_BLOCK) @ _int8(k - mean, KEY_BLOCK).mT
    p, total, lse = _softmax(s * scale)
    out = p.half().float() @ v.half().float() / total
    shift = (q @ mean.mT)[..., 0] * scale  # what the mean would have added to every logit of a query
    return _finished(out, lse + shift, query, return_lse)


def fp8(query: Tensor, key: Tensor, value: Tensor, scale: float, return_lse: bool = False, **_: object):
    """As FlashAttention-3 in fp8 (arXiv 2407.08608) without its rotation: q, k, v in e4m3 with a scale per head, and
    weights in e4m3; sums in float32."""
    q, k, v = (_fp8(x) for x in _heads_first(query, key, value))
    p, total, lse = _softmax(q @ k.mT * scale)
    out = (p * E4M3).to(torch.float8_e4m3fn).float() / E4M3 @ v / total
    return _finished(out, lse, query, return_lse)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).float() for x in tensors)


def _softmax(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights less their sum, the sum, and the log-sum-exp."""
    peak = s.amax(dim=-1, keepdim=True)
    p = (s - peak).exp()
    total = p.sum(dim=-1, keepdim=True)
    return p, total, (peak + total.log())[..., 0]


def _int8(x: Tensor, tokens: int) -> Tensor:
    """``x (B, H, S, D)`` rounded, with a scale per block."""
    blocks = []
    for block in x.split(tokens, dim=2):
        step = block.abs().amax(dim=(2, 3), keepdim=True).clamp(min=1e-20) / 127
        blocks.append((block / step).round() * step)
    return torch.cat(blocks, dim=2)


def _fp8(x: Tensor) -> Tensor:
    step = x.abs().amax(dim=(2, 3), keepdim=True).clamp(min=1e-20) / E4M3
    return (x / step).to(torch.float8_e4m3fn).float() * step


int8.returns_lse = fp8.returns_lse = True


def _finished(out: Tensor, lse: Tensor, query: Tensor, return_lse: bool):
    out = out.transpose(1, 2).to(query.dtype)
    return (out, lse) if return_lse else out
