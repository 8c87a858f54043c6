"""Packed rows: tokens gathered in another order and rotated, one pass over the keys for all levels."""

import torch
import triton
import triton.language as tl

from .common import load_rotated, load_rows
from .config import LaunchConfig


@triton.jit
def pack_kernel(
    X, OUT, SOURCE, COS, SIN,
    stride_xb, stride_xs, stride_xh, stride_xd,
    heads, num_rows, table_batch_stride, half,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """OUT[b, h, n] = R(phi[n]) X[b, SOURCE[n], h] for one block of rows of one head."""
    blocks = tl.cdiv(num_rows, BLOCK_N)
    block = tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = offs_n < num_rows
    source = tl.load(SOURCE + offs_n, mask=valid, other=0)
    base = X + b * stride_xb + h * stride_xh
    if ROTATE:
        cos, sin = COS + b * table_batch_stride, SIN + b * table_batch_stride
        x = load_rotated(base, cos, sin, source, offs_n, valid, stride_xs, stride_xd, half, HEAD_DIM, BLOCK_D)
    else:
        x = load_rows(base, source, valid, stride_xs, stride_xd, HEAD_DIM, BLOCK_D, True)
    offs_d = tl.arange(0, BLOCK_D)  # x: [BLOCK_N, BLOCK_D]
    out = OUT + (bh.to(tl.int64) * num_rows + offs_n.to(tl.int64))[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out, x.to(OUT.dtype.element_ty), mask=valid[:, None] & (offs_d < HEAD_DIM)[None, :])


def pack_rows(
    x: torch.Tensor,
    source: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    half: bool,
    config: LaunchConfig,
) -> torch.Tensor:
    """Gather and rotate tokens.

    Args:
        x: ``(B, S, H, D)``, any strides.
        source: ``(R,)`` int32, the token each packed row is made from.
        cos, sin: ``(1 or B, R, D/2)`` float32, or None to gather only.
        half: pairing ``(c, c + D/2)`` rather than ``(2c, 2c + 1)``.

    Returns:
        ``(B, H, R, D)``, contiguous, dtype of ``x``; rotated in float32 and rounded once.
    """
    batch, _, heads, dim = x.shape
    rows = source.shape[0]
    out = x.new_empty((batch, heads, rows, dim))
    table_stride = cos.stride(0) if cos is not None and cos.shape[0] > 1 else 0
    pack_kernel[(triton.cdiv(rows, config.block_n) * batch * heads,)](
        x, out, source, cos, sin, *x.stride(), heads, rows, table_stride, int(half),
        HEAD_DIM=dim, BLOCK_D=config.block_d, BLOCK_N=config.block_n, ROTATE=cos is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
