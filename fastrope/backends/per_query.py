"""Queries with per-query scales in the kernels: by a polynomial in 16 bits, by axis blocks elsewhere.

Nothing has measured either on a GPU. What a plan holds of them is made in ``planning/polynomial.py`` and
``planning/axis_blocks.py``; what the kernels do is in the files of the same names there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import device as devices
from .. import kernels
from ..kernels.config import LaunchConfig
from ..kernels.streams import Projected
from ..planning.lowered import Lowered

MEAN_BLOCK = 2**21  # elements of the float64 tables of one block of queries


def against_polynomial(q: Projected, lowered: Lowered) -> str | None:
    """Why queries with per-query scales meet axis blocks instead of a polynomial, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return str(q.dtype).removeprefix("torch.")
    if not devices.switched_on("FASTROPE_POLYNOMIAL", default=True):
        return "FASTROPE_POLYNOMIAL=0"
    if not kernels.ships("polynomial", devices.architecture(q.device), q.dtype, q.shape[3]):
        return "a polynomial of more than 128 channels spills"
    if lowered.polynomial is None or lowered.polynomial.tiles(q.dtype) is None:
        return "too few queries of similar scales to fill tiles, or keys too far apart"
    return None


def describe(q: Projected, lowered: Lowered) -> str:
    """What the polynomial does with tensors like ``q``."""
    tiles = lowered.polynomial.tiles(q.dtype)
    return f"a polynomial, in {tiles.bounds.shape[1] - 1} tiles of similar scales"


def polynomial_keys(k: Projected, keys: Tensor, lowered: Lowered, config: Callable[..., LaunchConfig]) -> Tensor:
    """The scaled keys with their channels in the order of the polynomial, ``(B, 2 Hkv, n, channels)``: as they arrive,
    but for pairs that no scale turns, so that a key is rounded once, after its turn.

    Args:
        k: the keys as they came, or streams of them.
        keys: ``(B, Hkv, R, D)`` packed.
    """
    p = lowered.polynomial
    if p.source is not None:
        keys = kernels.pack_rows(k, p.source, p.cos, p.sin, lowered.pairing == "interleaved", config("pack"))
    return keys[:, :, p.rows[None, :, None], p.channels[:, None, :]].flatten(1, 2)


def group_means(keys: Tensor, lowered: Lowered, means: Tensor, groups: list[int]) -> Tensor:
    """``mu_i`` of queries that each turn the scaled keys by a per-query scale: ``(B, Hkv, groups, C, D)`` float32.

    ``mu_i = mu + sum_j (R((r_i - 1) phi_j) - 1) k_j / count`` over the group's scaled keys. Keys that share ``phi_j``
    on a pair class are summed first, so the work is (queries x coordinates), not (queries x keys). In float64, which no
    TF32 setting touches, and in blocks of queries, so that memory does not grow with both.

    Args:
        keys: ``(B, Hkv, R, D)`` packed.
        means: ``(B, Hkv, G, 1 + buckets, D)`` of all groups at the buckets.
        groups: those wanted.
    """
    made, count, mask = lowered.per_query_means, lowered.num_per_query, lowered.keys.mask
    places = lowered.sorted_queries.queries[:, :count].long()
    scale = lowered.scales.r.expand(places.shape[0], -1)
    r = torch.where(places >= 0, scale.gather(1, places.clamp(min=0)), 1.0)  # (Bs, C)
    channels = _channels(lowered.pairing, keys.shape[3] // 2, keys.device)
    out = means[:, :, groups, :1].repeat(1, 1, 1, count, 1)
    scaled = keys[:, :, made.rows]  # (B, Hkv, n, D)
    if mask is not None:  # zero rather than multiply: a masked key may hold NaN
        scaled = scaled.masked_fill(~mask[:, None, made.rows, None], 0.0)
    members = lowered.groups.values[:, :, 2].clamp(min=1)
    for each in (made.a, made.b, made.c):
        if not len(each.pairs):
            continue
        first, second = (x[each.pairs] for x in channels)
        for n, g in enumerate(groups):
            member = (made.group == g)[each.order, None, None, None]
            x, y = (
                torch.segment_reduce(
                    torch.where(member, scaled[:, :, each.order][..., part].permute(2, 0, 1, 3).double(), 0.0),
                    "sum", lengths=each.lengths, axis=0, unsafe=True,
                ).permute(1, 2, 0, 3) / members[:, g, None, None, None]
                for part in (first, second)
            )  # (B, Hkv, U, pairs)  # fmt: skip
            for i in range(0, count, step := max(1, MEAN_BLOCK // each.angles.shape[1:].numel())):
                turn = (r[:, i : i + step, None, None] - 1) * each.angles[:, None]  # (Bx, queries, U, pairs)
                turn = turn.expand(len(x), -1, -1, -1)
                cos, sin = turn.cos() - 1, turn.sin()
                turned_x = torch.einsum("biuc,bhuc->bhic", cos, x) - torch.einsum("biuc,bhuc->bhic", sin, y)
                turned_y = torch.einsum("biuc,bhuc->bhic", cos, y) + torch.einsum("biuc,bhuc->bhic", sin, x)
                out[:, :, n, i : i + step, first] += turned_x.float()
                out[:, :, n, i : i + step, second] += turned_y.float()
    return out


def _channels(pairing: str, pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and second channel of every pair."""
    pair = torch.arange(pairs, device=device)
    return (2 * pair, 2 * pair + 1) if pairing == "interleaved" else (pair, pair + pairs)
