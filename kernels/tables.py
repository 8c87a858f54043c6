"""What a modulated launch reads beside q, k and v."""

from dataclasses import dataclass

import torch

LOG2E = 1.4426950408889634  # the kernels' softmax runs in base 2


@dataclass(frozen=True)
class KernelTables:
    """What a plan says of a modulated call, for the segments of one pass, as device tensors. Batches ``Bx`` are 1 or B;
    None where a call has no such thing.

    Args:
        segments: ``(n, len(abi.SEGMENT_COLUMNS))`` int32.
        weights: ``(W, D/2)`` float32 band weights.
        groups: ``(Bx, G, 3)`` float32: lambda, delta, number of unmasked keys.
        gains: ``(Bx, N, Sq)`` float32, products of gains.
        biases: ``(Bx, N, Sq)`` float32, sums of logit biases, natural log units.
        sorted_queries: ``(Bx, T * QUERY_TILE)`` int32, query index or -1. Queries with per-query scales come first.
        tile_bucket: ``(Bx, T)`` int32, the scale bucket of each tile: 0 at r = 1, -1 for per-query scales.
        num_variants: query variants of the pass.
        num_buckets: scale buckets beside r = 1.
        scaled_keys: keys that a QueryScale covers.
        num_per_query: ``C``, the leading sorted queries that may have per-query scales.
    """

    segments: torch.Tensor
    weights: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    gains: torch.Tensor | None = None
    biases: torch.Tensor | None = None
    sorted_queries: torch.Tensor | None = None
    tile_bucket: torch.Tensor | None = None
    num_variants: int = 1
    num_buckets: int = 0
    scaled_keys: int = 0
    num_per_query: int = 0


@dataclass(frozen=True)
class ValueFactors:
    """What becomes of values: ``factor v_j + shift nu`` of the group that j is a member of.

    Args:
        factors: ``(Bx, 2, Sk)`` float32: factor and shift.
        member: ``(Sk,)`` int32, the group of each, or -1.
        means: ``(B, Hkv, G, 1, D)`` float32, ``nu`` of each group; None without groups.
    """

    factors: torch.Tensor
    member: torch.Tensor
    means: torch.Tensor | None = None


@dataclass(frozen=True)
class AxisBlocks:
    """Scaled keys arranged in blocks whose rows share the angles of pair class A, whose columns share those of class B,
    and which share those of class C: a per-query scale then turns a query per row and column, not per key.

    Args:
        keys: ``(N, AXIS_BLOCK, AXIS_BLOCK)`` int32, rows in key order, or -1.
        rows_a, rows_b: ``(N, AXIS_BLOCK)`` int32, a key that stands for each block row and column.
        rows_c: ``(N,)`` int32, a key that stands for the block.
        pairs_a, pairs_b, pairs_c: ``(n,)`` int32, the RoPE pairs of each class, padded with -1 to multiples of
            ``PAIR_CHUNK``; pairs that no scale covers are in C.
        phase: ``(Bx, 2, Sk, D/2)`` float32, angles of the keys in quarter turns, 0 on pairs that no scale covers:
            leading and trailing parts, see :func:`.common.sincos_of_product`.
        factor: ``(Bx, 2, Sq)`` float32, ``1 - r``, likewise.
    """

    keys: torch.Tensor
    rows_a: torch.Tensor
    rows_b: torch.Tensor
    rows_c: torch.Tensor
    pairs_a: torch.Tensor
    pairs_b: torch.Tensor
    pairs_c: torch.Tensor
    phase: torch.Tensor
    factor: torch.Tensor


@dataclass(frozen=True)
class KeyRuns:
    """Scaled keys by their angles, for group means under per-query scales: keys of a run share the angles of some
    pairs.

    Args:
        keys: ``(n,)`` int32, rows in key order, run after run; every class of pairs has all keys in it once.
        groups: ``(n,)`` int32, the plan's group of each, or -1.
        bounds: ``(U + 1,)`` int32, of the runs in ``keys``.
        pair_runs: ``(D/2, 2)`` int32, the runs ``[first, last)`` of each pair; none for pairs that no scale covers.
        phase: ``(Bx, 2, U, D/2)`` float32, the angles of each run in quarter turns: leading and trailing parts, see
            :func:`.common.sincos_of_product`.
    """

    keys: torch.Tensor
    groups: torch.Tensor
    bounds: torch.Tensor
    pair_runs: torch.Tensor
    phase: torch.Tensor


@dataclass(frozen=True)
class PolynomialTiles:
    """Sorted queries with per-query scales in tiles of similar scales, narrow enough for one dtype.

    Args:
        bounds: ``(Bx, T + 1)`` int32, of the tiles among the sorted queries.
        middle: ``(Bx, T, 2)`` float32, the factor in the middle of each tile, and how far its ends lie from it.
    """

    bounds: torch.Tensor
    middle: torch.Tensor


@dataclass(frozen=True)
class Polynomial:
    """What queries with per-query scales meet the scaled keys by, in 16 bits: see ``polynomial.py``.

    Args:
        columns: ``(2 P,)`` int32, the RoPE pairs by falling angle, or -1: first the P that reach furthest.
        share: ``(D/2,)`` float32, the largest angle of each pair over ``max_key_angle``.
        origin: ``(Bx, 2, D/2)`` float32, the middle angle of the scaled keys in quarter turns: leading and trailing
            parts, see :func:`.common.sincos_of_product`.
        factor: ``(Bx, 2, Sq)`` float32, ``1 - r`` where keys arrive rotated, else ``-r``, likewise.
        phase: ``(Bx, 2, n, P)`` float32, angles of the n scaled keys from the origin over ``max_key_angle``.
        max_key_angle: the largest angle of a scaled key from the origin, radians.
        float16, bfloat16: tiles of each dtype; None where these would be too empty, or angles too large for float32.
        channels: ``(2, 2 P)`` int32, the channels of the keys in the order of ``columns``.
        rows: ``(n,)`` int32, the scaled keys among the packed ones, or where ``source`` is given, among its own.
        source: ``(n,)`` int32, the token each scaled key is made from, unless keys arrive rotated.
        cos, sin: ``(Bx, n, D/2)`` float32, the rotation of the pairs that no scale turns, likewise.
    """

    columns: torch.Tensor
    share: torch.Tensor
    origin: torch.Tensor
    factor: torch.Tensor
    phase: torch.Tensor
    max_key_angle: float
    float16: PolynomialTiles | None
    bfloat16: PolynomialTiles | None
    channels: torch.Tensor
    rows: torch.Tensor
    source: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None

    def tiles(self, dtype: torch.dtype) -> PolynomialTiles | None:
        """Those for inputs of ``dtype``."""
        return {torch.float16: self.float16, torch.bfloat16: self.bfloat16}.get(dtype)
