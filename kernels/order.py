"""Keys with their channels in the order in which the polynomial reads them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import LaunchConfig
from .launch import Launch, Layout, launch, strides
from .tables import Polynomial

ORDER_COUNTS = ("num_rows",)


@triton.jit(do_not_specialize=ORDER_COUNTS)
def order_kernel(
    K, OUT, ROWS, CHANNELS, stride_kb, stride_kh, stride_ks, stride_kd, num_rows,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT[b, 2 h + half, n, c] = K[b, h, ROWS[n], CHANNELS[half, c]], for a block of rows of one half of one head."""
    half, h, b = tl.program_id(1) % 2, (tl.program_id(1) // 2).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_n < num_rows)[:, None]
    offs_n = tl.minimum(offs_n, num_rows - 1)  # rows beyond are read, too, so that no load has a mask, and not stored
    channel = tl.arange(0, WIDTH)
    rows = tl.load(ROWS + offs_n).to(tl.int64)
    channels = tl.load(CHANNELS + half * WIDTH + channel)
    x = tl.load((K + b * stride_kb + h * stride_kh + rows * stride_ks)[:, None] + channels[None, :] * stride_kd)
    out = (b * tl.num_programs(1) + tl.program_id(1)) * num_rows + offs_n
    tl.store((OUT + out * WIDTH)[:, None] + channel[None, :], x, mask=mask)


def order_keys(keys: torch.Tensor, p: Polynomial, config: LaunchConfig) -> torch.Tensor:
    """Rows ``p.rows`` and channels ``p.channels`` of keys ``(B, Hkv, R, D)``, any strides: ``(B, 2 Hkv, n, channels)``,
    the two halves of a head's channels as heads of their own."""
    batch, heads = keys.shape[:2]
    out = keys.new_empty((batch, 2 * heads, len(p.rows), p.channels.shape[1]))
    launch(_order, {"K": keys, "OUT": out, "ROWS": p.rows, "CHANNELS": p.channels}, config)
    return out


def _order(at: dict[str, Layout], config: LaunchConfig) -> Launch:
    batch, heads, rows, width = at["OUT"].shape
    arguments = dict(
        **strides("k", at["K"], "bhsd"), num_rows=rows, WIDTH=width, BLOCK_N=config.block_n, **config.options
    )
    return Launch(order_kernel, (triton.cdiv(rows, config.block_n), heads, batch), arguments)
