"""Tiles of keys and values through tensor descriptors (asynchronous copies on Hopper) or through pointers."""

import torch
import triton
import triton.language as tl

from .common import load_tile
from .launch import Layout


@triton.jit
def load_block(
    X, b, h, start, offs_n, valid, stride_s, stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + BLOCK_N) of one head -> [BLOCK_N, BLOCK_D]. X points at the head, and rows that are not
    valid are zero; or X is a descriptor of (B, H, rows, D), and rows outside the tensor are."""
    if TMA:
        block = tl.reshape(X.load([b, h, start, 0]), (BLOCK_N, BLOCK_D))
    else:
        block = load_tile(X, start, offs_n, valid, stride_s, stride_d, HEAD_DIM, BLOCK_D)
    return block


def describable(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can say where ``x (B, H, R, D)`` lies: unit channels, the rest in multiples of 16
    bytes, nothing expanded."""
    apart = [stride * x.element_size() for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    fits = all(0 < stride < 2**40 and stride % 16 == 0 for stride in apart)
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and fits


def tile(x: Layout, block_n: int, block_d: int) -> tuple[list[int], list[int], list[int]]:
    """Shape, strides and tile of a descriptor of ``x (B, H, R, D)`` in tiles of ``block_n`` rows; the free stride of an
    axis of length 1 is made a legal one."""
    row = -(-x.shape[3] * x.dtype.itemsize // 16) * 16 // x.dtype.itemsize
    strides = [stride if size > 1 else row for size, stride in zip(x.shape, x.strides, strict=True)]
    return list(x.shape), [*strides[:3], 1], [1, 1, block_n, block_d]
