"""Attention weights and smooth fields, made with the public op alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastrope as fr


def attention_weights(q: torch.Tensor, k: torch.Tensor, chunk: int = 8, **arguments) -> torch.Tensor:
    """The weights ``softmax_j(s_ij)`` themselves, read through :func:`fastrope.attention`.

    The output of attention is its weights when the values are unit vectors. One head reads ``D`` keys, so the call is
    repeated over as many heads as cover all keys, ``chunk`` heads at a time.

    Args:
        q: ``(B, Sq, D)``; k: ``(B, Sk, D)``: a single head.
        arguments: of :func:`fastrope.attention`.

    Returns:
        ``(B, Sq, Sk)`` in the dtype of ``q``.
    """
    batch, keys, dim = k.shape
    heads = -(-keys // dim)
    parts = []
    for first in range(0, heads, chunk):
        size = min(chunk, heads - first)
        values = torch.zeros(keys, size * dim, dtype=k.dtype, device=k.device)
        rows = torch.arange(first * dim, min((first + size) * dim, keys), device=k.device)
        values[rows, rows - first * dim] = 1
        values = values.view(1, keys, size, dim).expand(batch, -1, -1, -1)
        out = fr.attention(
            q[:, :, None].expand(-1, -1, size, -1), k[:, :, None].expand(-1, -1, size, -1), values, **arguments
        )  # (B, Sq, size, D)
        parts.append(out.flatten(2))
    return torch.cat(parts, dim=2)[..., :keys]


def chosen_backend(device: torch.device) -> str:
    """What ``backend="auto"`` runs for a modulated float32 call on ``device``."""
    x = torch.zeros(1, 16, 1, 16, device=device)
    rope = fr.RoPE(torch.zeros(16, 8, device=device))
    return fr.explain(x, x, x, rope=rope, modulations=[fr.BiasDelta(delta=1.1)]).backend


def smooth_noise(shape: tuple[int, ...], sigma: float, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise ``(C, h, w)`` blurred by ``sigma`` cells, unit variance. CPU float32, whatever the device, so that
    a seed means the same picture everywhere."""
    radius = max(1, round(3 * sigma))
    x = torch.randn(shape[0], 1, shape[1] + 2 * radius, shape[2] + 2 * radius, generator=generator)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.square().sum().sqrt()
    return F.conv2d(F.conv2d(x, kernel[None, None, :, None]), kernel[None, None, None, :])[:, 0]


def grid_positions(height: int, width: int, frame: int = 0) -> torch.Tensor:
    """``(height * width, 3)`` positions (frame, row, column) of a grid in reading order."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, frame), rows, columns], dim=-1).flatten(0, 1)
