"""Attention over one set of keys and over another, made into attention over both."""

from __future__ import annotations

import torch

Part = tuple[torch.Tensor, torch.Tensor]  # out (B, Sq, H, D), lse (B, H, Sq); a query without keys: zeros and -inf


def merge(first: Part, second: Part) -> Part:
    """``out = sum_p exp(lse_p - lse) out_p`` with ``lse = log sum_p exp(lse_p)``. Differentiable."""
    lse = torch.logaddexp(first[1], second[1])
    reference = lse.masked_fill(lse == -torch.inf, 0.0)
    shares = ((part[1] - reference).exp().to(part[0].dtype).transpose(1, 2)[..., None] for part in (first, second))
    out_first, out_second = (part[0] * share for part, share in zip((first, second), shares, strict=True))
    return out_first + out_second, lse
