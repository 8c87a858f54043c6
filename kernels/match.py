"""Anchor token matching in one launch: Gumbel noise, window, distances, argmin, threshold, fallback.

One program does one row: it walks the vocabulary twice (maximum, then noise), keeping what can be drawn at all, finds
the window's smallest key by bisection, and walks the window once for its distances. Keys are distinct 63-bit integers
in the order of the draw, so there is nothing to sort and no tie to break. The specification is
``fastrope/islock/reference.py``; the arithmetic of the noise is its, operation by operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .config import ARCHS
from .launch import Launch, Layout, launch

LIMIT = tl.constexpr(104.0)
EPS = tl.constexpr(1e-8)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
ID_BITS = tl.constexpr(31)
ID_MASK = tl.constexpr(0x7FFFFFFF)
LARGEST_KEY = tl.constexpr(2**63 - 1)


@dataclass(frozen=True)
class MatchConfig:
    """Vocabulary entries, candidates and codebook channels of one step, warps, and registers a thread may use (None
    leaves them to the compiler)."""

    block_v: int
    block_k: int
    block_d: int
    num_warps: int
    max_registers: int | None

    @property
    def options(self) -> dict[str, int | bool]:
        """Compiler options of the launch."""
        # A fused multiply-add rounds once where the reference rounds twice.
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": False}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


def select_match(arch: str, dim: int) -> MatchConfig:
    """The configuration for a codebook of ``dim`` channels on one of ``ARCHS``.

    Raises:
        ValueError: nothing ships for these.
    """
    if arch not in ARCHS or dim < 1:
        raise ValueError(f"launch: expected an architecture of {ARCHS} and a dim from 1, received {arch!r}, {dim}")
    block_d = min(128, 1 << (dim - 1).bit_length())
    block_k = min(128, 2048 // block_d)
    if arch.startswith("gfx"):
        return MatchConfig(4096, block_k, block_d, 8, None)
    # Left alone, ptxas spills to reach 64 registers, for an occupancy that a program per row never uses.
    return MatchConfig(4096, block_k, block_d, 16, 128)


@triton.jit
def ln(x):
    """Natural logarithm of positive normal float32: the coefficients of ``reference.LN_COEFFICIENTS``."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = f * -0.0790274367 + 0.126223192
    p = p * f - 0.129981831
    p = p * f + 0.142144963
    p = p * f - 0.166412815
    p = p * f + 0.200010449
    p = p * f - 0.25000307
    p = p * f + 0.333333313
    z = f * f
    return exponent.to(tl.float32) * 0.6931471805599453 + (f + (f * z * p - 0.5 * z))


@triton.jit
def gumbel(words):
    """``-ln(-ln(1 - u))`` of uint32 words, ``u`` in (0, 1); ``1 - w - u`` is what rounding takes from a small u."""
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    w = 1.0 - u
    return -ln(-(ln(w) + ((1.0 - w) - u)))


@triton.jit
def noise(seed, position, start, BLOCK_V: tl.constexpr):
    """Gumbel noise of tokens ``start ..``: token v has word v % 4 of Philox at counter (v // 4, position, 0, 0)."""
    counter = (start // 4 + tl.arange(0, BLOCK_V // 4)).to(tl.uint32)
    zero = counter * 0
    a, b, c, d = tl.philox(seed, counter, zero + position.to(tl.uint32), zero, zero)
    return gumbel(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))  # [BLOCK_V]


@triton.jit
def load_logits(X, offs_v, vocab, stride_v):
    """Logits in float32, NaN and what lies beyond the vocabulary as -inf."""
    x = tl.load(X + offs_v.to(tl.int64) * stride_v, mask=offs_v < vocab, other=-float("inf")).to(tl.float32)
    return tl.where(x == x, x, -float("inf"))


@triton.jit
def append(OUT, values, keep, count):
    """Store the values to keep behind the first ``count`` of OUT, in order."""
    kept = keep.to(tl.int32)
    tl.store(OUT + (count + tl.cumsum(kept, 0) - 1), values, mask=keep)
    return count + tl.sum(kept, 0)


@triton.jit
def find_peak(X, vocab, stride_v, BLOCK_V: tl.constexpr):
    """The largest logit and the lowest token that has it."""
    best = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    at = tl.arange(0, BLOCK_V)
    for start in range(0, vocab, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = load_logits(X, offs_v, vocab, stride_v)
        at = tl.where(x > best, offs_v, at)
        best = tl.maximum(best, x)
    peak = tl.max(best, 0)
    return peak, tl.min(tl.where(best == peak, at, vocab), 0)


@triton.jit
def draw(X, KEYS, peak, seed, position, vocab, stride_v, BLOCK_V: tl.constexpr):
    """Leave in KEYS the tokens that have probability: the perturbed logit's rank above, the id's below, so that a
    larger key is drawn earlier and the lower of two equal tokens first. Returns how many there are."""
    count = 0
    for start in range(0, vocab, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = load_logits(X, offs_v, vocab, stride_v)
        perturbed = tl.where(x == peak, 0.0, x - peak) + noise(seed, position, start, BLOCK_V)
        bits = perturbed.to(tl.int32, bitcast=True).to(tl.int64)
        rank = tl.where(bits >= 0, bits + 2147483648, -1 - bits)
        possible = (x >= peak - LIMIT) & (x > -float("inf"))
        count = append(KEYS, (rank << ID_BITS) | (ID_MASK - offs_v), possible, count)
    return count


@triton.jit
def window_threshold(KEYS, count, window, BLOCK_V: tl.constexpr):
    """A key that exactly ``window`` of the ``count`` distinct keys reach."""
    low = tl.full((), 0, tl.int64)
    high = tl.full((), LARGEST_KEY, tl.int64)
    found = count
    while found > window:
        middle = low + ((high - low) >> 1)
        reached = tl.zeros((BLOCK_V,), tl.int32)
        for start in range(0, count, BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            reached += (tl.load(KEYS + offs, mask=offs < count, other=-1) >= middle).to(tl.int32)
        n = tl.sum(reached, 0)
        enough = n >= window
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        found = tl.where(enough, n, found)
    return low


@triton.jit
def distances(
    CODEBOOK, rows, anchor_row, valid, dim, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, COSINE: tl.constexpr
):
    """``s`` of codebook rows to the anchor's, float32 [BLOCK_K]; not a number becomes infinite."""
    product = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    if COSINE:
        square, anchor_square = product, tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, dim, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        channel = offs_d < dim
        mask = valid[:, None] & channel[None, :]
        e = tl.load(CODEBOOK + rows[:, None] * dim + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        a = tl.load(CODEBOOK + anchor_row * dim + offs_d, mask=channel, other=0.0).to(tl.float32)
        if COSINE:
            product += e * a[None, :]
            square += e * e
            anchor_square += a * a
        else:
            product += (e - a[None, :]) * (e - a[None, :])
    s = tl.sum(product, 1)
    if COSINE:
        norms = tl.maximum(tl.sqrt_rn(tl.sum(square, 1)), EPS) * tl.maximum(tl.sqrt_rn(tl.sum(anchor_square, 0)), EPS)
        s = 1.0 - tl.div_rn(s, norms)
    return tl.where(s == s, tl.maximum(s, 0.0), float("inf"))


MATCH_COUNTS = ("row_stride", "anchor_stride", "position_stride", "vocab", "known", "steps", "dim", "candidates")
# Positions and logits are often slices, and nothing here is read faster for being aligned.
MATCH_SLICES = ("LOGITS", "ANCHORS", "POSITION", "SEEDS", "ACTIVE")


@triton.jit(do_not_specialize=MATCH_COUNTS, do_not_specialize_on_alignment=MATCH_SLICES)
def match_kernel(
    LOGITS, ANCHORS, POSITION, SEEDS, ACTIVE, CODEBOOK, ROWS, WINDOWS, KEYS, TOKENS, DISTANCE, WINDOW, ACCEPTED,
    row_stride, stride_lv, anchor_stride, position_stride, vocab, known, steps, dim, candidates, tau,
    BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, COSINE: tl.constexpr, HAS_ACTIVE: tl.constexpr,
):  # fmt: skip
    """One row: the token nearest to its anchor in the window, the likeliest where that is further than tau."""
    b = tl.program_id(0).to(tl.int64)
    logits = LOGITS + b * row_stride
    drawn = KEYS + b * (vocab + candidates)
    picked = drawn + vocab
    seed = tl.load(SEEDS + b)
    position = tl.load(POSITION + b * position_stride)

    peak, likeliest = find_peak(logits, vocab, stride_lv, BLOCK_V)
    count = draw(logits, drawn, peak, seed, position, vocab, stride_lv, BLOCK_V)
    tl.debug_barrier()  # keys travel between threads through memory

    anchor = tl.load(ANCHORS + b * anchor_stride)
    anchor_row = tl.load(ROWS + anchor, mask=(anchor >= 0) & (anchor < known), other=-1).to(tl.int64)
    free = anchor_row < 0
    if HAS_ACTIVE:
        free = free | (tl.load(ACTIVE + b) == 0)
    window = tl.load(WINDOWS + tl.minimum(tl.maximum(position, 0), steps - 1))
    window = tl.minimum(tl.where(free, 1, window), count)  # a free row takes the first of the draw

    threshold = window_threshold(drawn, count, window, BLOCK_V)
    picks = 0
    for start in range(0, count, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        keys = tl.load(drawn + offs, mask=offs < count, other=-1)
        picks = append(picked, keys, keys >= threshold, picks)
    tl.debug_barrier()

    nearest = tl.full((), LARGEST_KEY, tl.int64)
    for start in range(0, tl.where(free, 0, window), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        valid = offs_k < window
        ids = ID_MASK - (tl.load(picked + offs_k, mask=valid, other=0) & ID_MASK)
        rows = tl.load(ROWS + ids, mask=valid & (ids < known), other=-1).to(tl.int64)
        s = distances(CODEBOOK, rows, anchor_row, rows >= 0, dim, BLOCK_K, BLOCK_D, COSINE)
        s = tl.where(ids == anchor, 0.0, tl.where(rows >= 0, s, float("inf")))
        # Distances are not negative, so their bits sort; below them the anchor itself, then the lowest id.
        tie = tl.where(ids == anchor, 0, ids + 1)
        key = (s.to(tl.int32, bitcast=True).to(tl.int64) << 32) | tie
        nearest = tl.minimum(nearest, tl.min(tl.where(valid, key, LARGEST_KEY), 0))

    distance = (nearest >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    distance = tl.where(distance == distance, distance, float("inf"))  # nothing was compared
    tie = nearest & 0xFFFFFFFF
    accepted = (distance <= tau) & (distance < float("inf"))
    first = ID_MASK - (tl.load(picked, mask=free & (count > 0), other=0) & ID_MASK)
    token = tl.where(accepted, tl.where(tie == 0, anchor, tie - 1), likeliest)
    tl.store(TOKENS + b, tl.where(free & (count > 0), first, token))
    tl.store(DISTANCE + b, distance)
    tl.store(WINDOW + b, tl.where(free, 0, window))
    tl.store(ACCEPTED + b, accepted)


def match_anchors(
    logits: torch.Tensor,
    anchors: torch.Tensor,
    position: torch.Tensor,
    seeds: torch.Tensor,
    active: torch.Tensor | None,
    codebook: torch.Tensor,
    rows: torch.Tensor,
    windows: torch.Tensor,
    candidates: int,
    tau: float,
    metric: str,
    config: MatchConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments and results of :func:`fastrope.islock.reference.match`; a vocabulary below 2**31.

    ``logits``, ``anchors`` (a column of ``(B, N)``) and ``position`` may have any strides; ``codebook``, ``rows`` and
    ``windows`` are contiguous. Scratch memory is 8 bytes per row and vocabulary entry.
    """
    batch, vocab = logits.shape
    candidates = min(candidates, vocab)
    tokens, distance, window, accepted = (
        torch.empty(batch, dtype=dtype, device=logits.device)
        for dtype in (torch.int64, torch.float32, torch.int32, torch.bool)
    )
    keys = torch.empty((batch, vocab + candidates), dtype=torch.int64, device=logits.device)
    tensors = {
        "LOGITS": logits, "ANCHORS": anchors, "POSITION": position, "SEEDS": seeds.contiguous(),
        "ACTIVE": None if active is None else active.contiguous(), "CODEBOOK": codebook, "ROWS": rows,
        "WINDOWS": windows, "KEYS": keys, "TOKENS": tokens, "DISTANCE": distance, "WINDOW": window,
        "ACCEPTED": accepted,
    }  # fmt: skip
    launch(_match, tensors, candidates, tau, metric == "cosine", config)
    return tokens, distance, window, accepted


def _match(at: dict[str, Layout | None], candidates: int, tau: float, cosine: bool, config: MatchConfig) -> Launch:
    (batch, vocab), (row_stride, stride_lv) = at["LOGITS"].shape, at["LOGITS"].strides
    arguments = dict(
        row_stride=row_stride, stride_lv=stride_lv, anchor_stride=at["ANCHORS"].strides[0],
        position_stride=at["POSITION"].strides[0], vocab=vocab, known=at["ROWS"].shape[0],
        steps=at["WINDOWS"].shape[0], dim=at["CODEBOOK"].shape[1], candidates=candidates, tau=tau,
        BLOCK_V=config.block_v, BLOCK_K=config.block_k, BLOCK_D=config.block_d, COSINE=cosine,
        HAS_ACTIVE=at["ACTIVE"] is not None, **config.options,
    )  # fmt: skip
    return Launch(match_kernel, (batch,), arguments, {"ACTIVE": "ANCHORS"})
