"""Queries with per-query scales in the kernels: by a polynomial in 16 bits, by axis blocks elsewhere.

What a plan holds of them is made in ``planning/polynomial.py`` and ``planning/axis_blocks.py``; what the kernels do is
in the files of the same names there.
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


def against_polynomial(q: Projected, lowered: Lowered) -> str | None:
    """Why queries with per-query scales meet axis blocks instead of a polynomial, or None."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return str(q.dtype).removeprefix("torch.")
    if not devices.switched_on("FASTROPE_POLYNOMIAL", default=True):
        return "FASTROPE_POLYNOMIAL=0"
    arch = devices.architecture(q.device)
    if not kernels.ships("polynomial", arch, q.dtype, q.shape[3]):
        return f"no polynomial of {q.shape[3]} channels on {arch}: it spills"
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
    return kernels.order_keys(keys, p, config("order"))
