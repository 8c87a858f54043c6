"""The band weights of Untwisting RoPE (arXiv 2602.05013), for one axis or for a whole head."""

from __future__ import annotations

import torch


def band_weights(channels: int, s_hf: float, s_lf: float, beta: float = 2.0) -> torch.Tensor:
    """``s_d = s_hf + (s_lf - s_hf) (d / (D/2 - 1)) ** beta`` over the pairs of one axis of ``D = channels``, highest
    frequency first; ``(channels // 2,)`` float64."""
    ramp = torch.linspace(0, 1, channels // 2, dtype=torch.float64)
    return s_hf + (s_lf - s_hf) * ramp**beta


def head_weights(axes_dim: tuple[int, ...], s_hf: float, s_lf: float, beta: float = 2.0) -> torch.Tensor:
    """:func:`band_weights` of every axis in turn, ``(D/2,)``; axis 0, the frame id without spatial meaning, is flat at
    ``s_lf``."""
    frame = torch.full((axes_dim[0] // 2,), s_lf, dtype=torch.float64)
    return torch.cat([frame, *(band_weights(dim, s_hf, s_lf, beta) for dim in axes_dim[1:])])
