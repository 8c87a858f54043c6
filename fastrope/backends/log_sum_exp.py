"""The log-sum-exp of logits, in blocks of queries: torch's attention returns none.

No N x N tensor is held, neither here nor in the derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import device as devices

BLOCK_ROWS = 256  # queries whose logits are held at a time


def log_sum_exp(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``lse (B, H, Sq)`` of ``q (B, H, Sq, D)`` over ``k (B, H, Sk, D)``, in the widest dtype of the device: weights of
    parts are its exponential, so its absolute error is their relative one, and float32 rounds 5 by 2e-7.

    ``mask`` is ``(B, 1, 1, Sk)`` bool, True where a key counts; None: all count.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    return _LogSumExp.apply(q.to(wide), k.to(wide), mask, scale)


class _LogSumExp(torch.autograd.Function):
    """:func:`log_sum_exp` and its derivatives, ``d lse_i = sum_j p_ij d s_ij``, both in blocks of queries."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return torch.cat([_of(s) for _, s in _blocks_of_logits(q, k, mask, scale)], dim=2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        q, k, mask, ctx.scale = inputs
        ctx.save_for_backward(q, k, mask)
        ctx.save_for_forward(q, k, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, mask = ctx.saved_tensors
        grad_q, grad_k = [], torch.zeros_like(k)
        for rows, s in _blocks_of_logits(q, k, mask, ctx.scale):
            grad_s = s.softmax(dim=-1) * (ctx.scale * grad[:, :, rows, None]).to(s.dtype)
            grad_q.append(grad_s @ k)
            grad_k = grad_k + grad_s.transpose(-1, -2) @ q[:, :, rows]
        return torch.cat(grad_q, dim=2), grad_k, None, None

    @staticmethod
    def jvp(ctx: Any, q_tangent: Tensor | None, k_tangent: Tensor | None, *_: Any) -> Tensor:
        q, k, mask = ctx.saved_tensors
        tangents = []
        for rows, s in _blocks_of_logits(q, k, mask, ctx.scale):
            change = torch.zeros_like(s)
            if q_tangent is not None:
                change = change + q_tangent[:, :, rows] @ k.transpose(-1, -2)
            if k_tangent is not None:
                change = change + q[:, :, rows] @ k_tangent.transpose(-1, -2)
            tangents.append((s.softmax(dim=-1) * change).sum(dim=-1) * ctx.scale)
        return torch.cat(tangents, dim=2).to(devices.widest_float(q.device))


def _of(s: Tensor) -> Tensor:
    """``s (B, H, n, Sk)`` to ``(B, H, n)``: sums as exact as ``s``, and then no further rounding."""
    wide = devices.widest_float(s.device)
    peak = s.amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(peak.isinf(), 0.0)
    return peak[..., 0].to(wide) + (s - peak).exp().sum(dim=-1).to(wide).log()


def _blocks_of_logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float):
    for start in range(0, q.shape[2], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        s = (q[:, :, rows] @ k.transpose(-1, -2)) * scale
        yield rows, s if mask is None else s.masked_fill(~mask, -torch.inf)
