"""The specification of anchor token matching, in plain torch on any device.

Noise is counter-based, so that a kernel draws the same numbers: token ``v`` of a row takes word ``v % 4`` of Philox
4x32-10 (Salmon et al., SC 2011) at counter ``(v // 4, position, 0, 0)`` with the row's 64-bit seed. Every step from
these bits to the perturbed logits is one rounded float32 operation, so all devices and backends agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
# A logit further below the maximum has probability 0 in float32. Hosts mask with -inf or with the smallest float.
LIMIT = 104.0
EPS = 1e-8  # smallest norm of a cosine
# (ln(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1], interpolated at Chebyshev points; the logarithm is
# within 8.2e-8 of the exact one, relatively.
LN_COEFFICIENTS = (
    0.333333313, -0.25000307, 0.200010449, -0.166412815, 0.142144963, -0.129981831, 0.126223192, -0.0790274367,
)  # fmt: skip
LN2 = 0.6931471805599453
SQRT_HALF_BITS = 0x3F3504F3


def _mul32(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``factor * x`` for ``x`` (int64) and ``factor`` below 2**32."""
    low = factor * (x & 0xFFFF)
    high = factor * (x >> 16)
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & MASK32


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four 32-bit words (as int64) for each counter ``(c0, c1, c2, c3)`` under an int64 seed."""
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        high0, low0 = _mul32(c0, 0xD2511F53)
        high2, low2 = _mul32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def uniform(words: Tensor) -> Tensor:
    """Float32 in (0, 1) of 32-bit words: ``u = (word + 1/2) 2^-32``, never 0 and never rounded up to 1."""
    return ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def ln(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32, from operations that round in the same way on all devices."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    p = torch.full_like(f, LN_COEFFICIENTS[-1])
    for c in LN_COEFFICIENTS[-2::-1]:
        p = p * f + c
    z = f * f
    return exponent.float() * LN2 + (f + (f * z * p - 0.5 * z))


def gumbel(words: Tensor) -> Tensor:
    """``g = -ln(-ln(1 - u))``. The inner logarithm corrects for what ``w = 1 - u`` loses of a small ``u``."""
    u = uniform(words)
    w = 1.0 - u
    return -ln(-(ln(w) + ((1.0 - w) - u)))


def noise(seeds: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Gumbel noise ``(B, vocab)`` float32 for seeds ``(B,)`` and positions ``(B,)``, both int64."""
    c0 = torch.arange((vocab + 3) // 4, device=seeds.device)[None, :].expand(len(seeds), -1)
    c1 = (position & MASK32)[:, None].expand_as(c0)
    zero = torch.zeros_like(c0)
    words = torch.stack(philox(c0, c1, zero, zero, seeds[:, None]), -1).flatten(1)
    return gumbel(words[:, :vocab])


def rows_of(tokens: Tensor, rows: Tensor) -> Tensor:
    """Codebook rows of vocabulary ids; -1 for ids without a row."""
    inside = (tokens >= 0) & (tokens < rows.shape[0])
    return torch.where(inside, rows[torch.where(inside, tokens, 0)].long(), -1)


def distances(candidates: Tensor, anchor: Tensor, metric: str) -> Tensor:
    """``s_k``, float32, of candidates ``(B, k, d)`` and anchors ``(B, d)``; infinite in place of NaN."""
    e, a = candidates.float(), anchor.float()[:, None, :]
    if metric == "l2":
        s = (e - a).square().sum(-1)
    else:
        norms = e.square().sum(-1).sqrt().clamp(min=EPS) * a.square().sum(-1).sqrt().clamp(min=EPS)
        s = 1.0 - (e * a).sum(-1) / norms
    return torch.where(s.isnan(), torch.inf, s.clamp(min=0.0))


def match(
    logits: Tensor,
    anchors: Tensor,
    position: Tensor,
    seeds: Tensor,
    active: Tensor | None,
    codebook: Tensor,
    rows: Tensor,
    windows: Tensor,
    candidates: int,
    tau: float,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Match one position of every row.

    Args:
        logits: ``(B, V)``, floating point, rounded to float32; NaN counts as -inf.
        anchors: ``(B,)`` int64, vocabulary ids.
        position: ``(B,)`` int64, clamped to the table of windows.
        seeds: ``(B,)`` int64.
        active: ``(B,)`` bool, False draws freely; None means True for all.
        codebook: ``(V_img, d)``.
        rows: ``(T,)`` int32, ``T <= V``, the codebook row of each vocabulary id; -1 for none.
        windows: ``(N,)`` int32, ``|W_i|`` of every position.
        candidates: K, no smaller than any window.
        tau, metric: see :class:`fastrope.ISLock`.

    Returns:
        tokens ``(B,)`` int64, distance ``(B,)`` float32, window ``(B,)`` int32, accepted ``(B,)`` bool; see
        :class:`fastrope.islock.Match`.
    """
    vocab = logits.shape[1]
    ids = torch.arange(vocab, device=logits.device)
    x = logits.float()
    x = torch.where(x.isnan(), -torch.inf, x)
    peak = x.amax(1, keepdim=True)
    likeliest = torch.where(x == peak, ids, vocab).amin(1)  # argmax p, the lowest id of equals

    # The draw: logits + Gumbel noise in descending order is sampling without replacement from softmax(logits).
    possible = (x >= peak - LIMIT) & (x > -torch.inf)
    perturbed = torch.where(x == peak, 0.0, x - peak) + noise(seeds, position, vocab)
    perturbed = torch.where(possible, perturbed, -torch.inf)
    order = perturbed.sort(dim=1, descending=True, stable=True).indices

    # The window: the first |W_i| of the draw.
    anchor_rows = rows_of(anchors, rows)
    free = anchor_rows < 0 if active is None else (anchor_rows < 0) | ~active
    window = windows[position.clamp(0, windows.shape[0] - 1)].long().minimum(possible.sum(1))
    window = torch.where(free, 0, window)
    drawn = order[:, :candidates]
    in_window = torch.arange(drawn.shape[1], device=logits.device) < window[:, None]

    # The nearest of the window. The anchor itself has distance 0 and wins ties; after it, the lowest id wins.
    drawn_rows = rows_of(drawn, rows)
    s = distances(codebook[drawn_rows.clamp(min=0)], codebook[anchor_rows.clamp(min=0)], metric)
    is_anchor = drawn == anchors[:, None]
    s = torch.where(is_anchor, 0.0, s)
    s = torch.where(in_window & (drawn_rows >= 0), s, torch.inf)
    distance = s.amin(1)
    rank = torch.where(is_anchor, -1, drawn)
    rank = torch.where(s == distance[:, None], rank, vocab).amin(1)
    nearest = torch.where(rank < 0, anchors, rank)

    # AdaCR: the nearest candidate if it is near enough, argmax p otherwise.
    accepted = (distance <= tau) & (distance < torch.inf)
    tokens = torch.where(free, order[:, 0], torch.where(accepted, nearest, likeliest))
    return tokens, distance, window.int(), accepted
