"""torch's fused attention kernels, called so that they return the log-sum-exp of the logits as well."""

from __future__ import annotations

from collections.abc import Callable

import torch

aten = torch.ops.aten
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def cudnn(q, k, v, scale: float, lse: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's. ``q (B, Sq, H, D)``, ``k, v (B, Sk, H, D)`` -> ``out (B, Sq, H, D)``, ``lse (B, H, Sq)`` natural log.

    Without ``lse`` the kernel is not asked for it, and what stands in its place means nothing.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, sums, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, lse, 0.0, False, False, scale=scale)
    return out.transpose(1, 2), _three(sums, q) if lse else sums


def flash(q, k, v, scale: float, lse: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-2's; on a CPU torch's flash kernel there. As :func:`cudnn`; ``lse`` comes in any case."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        out, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    else:
        out, sums, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return out.transpose(1, 2), _three(sums, q)


def _three(lse: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``(B, H, Sq)`` of what kernels return: with an axis of 1 behind, or rows padded beyond ``Sq``."""
    if lse.ndim == 4:
        lse = lse.squeeze(-1)
    return lse[:, :, : q.shape[2]]


def merge(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> torch.Tensor:
    """Attention over all keys from attention over parts of them: ``out (B, n, H, D)`` in float32.

    ``out = sum_p exp(lse_p - lse) out_p`` with ``lse = log sum_p exp(lse_p)``.
    """
    total = torch.stack(lses).logsumexp(dim=0)
    shares = [(lse - total).exp().transpose(1, 2)[..., None] for lse in lses]
    return sum(share * out.float() for share, out in zip(shares, outs, strict=True))
