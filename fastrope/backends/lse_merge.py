"""Attention over one set of keys and over another, made into attention over both."""

from __future__ import annotations

import itertools
from functools import reduce

import torch
from torch import Tensor

from ..planning.lowered import Lowered
from .bias_channels import bias_of
from .plain import Attend, Plain

MOST_RUNS = 8  # each reads the queries and writes an output once more; predicted to pay

Part = tuple[torch.Tensor, torch.Tensor]  # out (B, Sq, H, D), lse (B, H, Sq); a query without keys: zeros and -inf


def merge(first: Part, second: Part) -> Part:
    """``out = sum_p exp(lse_p - lse) out_p`` with ``lse = log sum_p exp(lse_p)``. Differentiable."""
    lse = torch.logaddexp(first[1], second[1])
    reference = lse.masked_fill(lse == -torch.inf, 0.0)
    shares = ((part[1] - reference).exp().to(part[0].dtype).transpose(1, 2)[..., None] for part in (first, second))
    out_first, out_second = (part[0] * share for part, share in zip((first, second), shares, strict=True))
    return out_first + out_second, lse


def runs(lowered: Lowered) -> list[tuple[slice, int]]:
    """Runs of keys under one set of logit biases, and the number of the set; -1: none."""
    found = []
    for n, several in itertools.groupby(lowered.segments, lambda s: s.bias):
        segments = list(several)
        found.append((slice(segments[0].start, segments[-1].stop), n))
    return found


def merges(lowered: Lowered) -> bool:
    """Whether all that a plan says can be said of q, k, v and of the log-sum-exps of :func:`runs`: each logit bias is
    the same for all queries and modulates all of them, and there is no mask."""
    keys, biases = lowered.keys, lowered.biases
    apart = lowered.scales is not None or lowered.gains is not None or keys.bias is not None
    weighs = biases is not None and biases.constant and lowered.unmodulated is None
    return weighs and not apart and len(runs(lowered)) <= MOST_RUNS


def by_runs(plain: Plain, lowered: Lowered) -> Attend:
    """Attention by a plain attention over each of :func:`runs`, which its bias weighs: ``lse_p + b_p``."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        def part(tokens: slice, n: int) -> Part:
            out, lse = plain.with_lse(q, k[:, tokens], v[:, tokens], scale)
            wide = torch.promote_types(out.dtype, torch.float32)
            return out.to(wide), lse if n < 0 else lse + bias_of(lowered, n)[:, :1, None]

        out, lse = reduce(merge, itertools.starmap(part, runs(lowered)))
        nothing = (lse == -torch.inf).transpose(1, 2)[..., None]  # one run alone is not merged: its output is as it was
        return out.masked_fill(nothing, 0.0).to(q.dtype)

    return attend
