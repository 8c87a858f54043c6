"""Attention over tokens a host projects apart: QK norm, concatenation, rotation and modulation in one prologue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import debug as debugging
from .api import attention, check_plan, check_tensors, choose, no_autocast
from .backends import triton
from .checks import require, require_tensor
from .planning import Plan


class Norm(NamedTuple):
    """RMS norm over the head dim: ``weight (D,) * x / sqrt(mean(x**2) + eps)``; None weighs all channels by 1."""

    weight: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x (..., D)`` normalised in float32 (float64 for such inputs), rounded once to its dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide if self.weight is None else wide * self.weight.to(wide.dtype)).to(x.dtype)


class Stream(NamedTuple):
    """Tokens projected together: ``q (B, S, H, D)``, ``k, v (B, S, Hkv, D)``, any strides, and the norms of q and k."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    norm_q: Norm | None = None
    norm_k: Norm | None = None


def join(streams: Sequence[Stream]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``q, k, v (B, S, heads, D)`` of all streams, normalised, in the order given."""
    parts = [(q if nq is None else nq(q), k if nk is None else nk(k), v) for q, k, v, nq, nk in streams]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(some, dim=1) for some in zip(*parts, strict=True))


def joint_attention(
    streams: Sequence[Stream],
    *,
    plan: Plan,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`fastrope.attention` of ``join(streams)``; where the fused kernels run, in fewer passes over q and k.

    There, one kernel reads each stream as the projections left it, normalises in float32, rotates, weighs, makes the
    key copies of all levels and writes the joint sequence, rounding once where separate steps round up to three times.
    Elsewhere the streams are joined first. What counts is that q and k of one or two streams are normalised, are not
    rotated yet, and that no query has a scale of its own (then its q is joined first).

    Args:
        streams: tokens of the joint sequence, in order, such as ``[text, image]``.
        plan: of the joint sequence, with a rope that is not ``applied`` where norms are given.
        scale, backend: as in :func:`fastrope.attention`.

    Returns:
        ``(B, S, H, D)`` in the dtype of v.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: the backend asked for cannot run this call.
    """
    _check(streams, plan)
    if torch.compiler.is_compiling() or not _fuses(streams, plan, backend):
        return attention(*join(streams), plan=plan, scale=scale, backend=backend)
    from .kernels import Streams

    def streamed(name: str) -> Streams:
        parts = tuple(getattr(s, name) for s in streams)
        norms = tuple(getattr(s, f"norm_{name}") for s in streams)
        weights = (x.new_ones(x.shape[3]) if n.weight is None else n.weight for x, n in zip(parts, norms, strict=True))
        return Streams(parts, tuple(w.contiguous() for w in weights), tuple(n.eps for n in norms))

    k, v = streamed("k"), torch.cat([s.v for s in streams], dim=1)
    q = torch.cat([s.norm_q(s.q) for s in streams], dim=1) if plan.spec.continuous else streamed("q")
    check_plan(q, k, plan)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    with no_autocast(v.device):
        return triton.run(q, k, v, plan, scale)[0]


def _check(streams: Sequence[Stream], plan: Plan) -> None:
    require(len(streams) > 0 and all(isinstance(s, Stream) for s in streams), "streams", "a list of Stream",
            [type(s).__name__ for s in streams])  # fmt: skip
    require(isinstance(plan, Plan), "plan", "a Plan of fastrope.plan()", type(plan).__name__)
    first = streams[0]
    for i, s in enumerate(streams):
        for name in ("q", "k", "v"):
            x, like = getattr(s, name), getattr(first, name)
            require_tensor(f"streams[{i}].{name}", x, (4,), "(B, S, heads, D)")
            same = (x.shape[0], *x.shape[2:], x.dtype, x.device) == (
                like.shape[0], *like.shape[2:], like.dtype, like.device
            )  # fmt: skip
            expected = f"batch, heads, D, dtype and device of streams[0].{name}, {tuple(like.shape)} {like.dtype} "
            require(
                same,
                f"streams[{i}].{name}",
                f"{expected}{like.device}",
                f"{tuple(x.shape)} {x.dtype} {x.device}",
            )
            require(x.shape[1] == s.q.shape[1], f"streams[{i}].{name}", f"{s.q.shape[1]} tokens, as in q", x.shape[1])
        for name, x in (("norm_q", s.q), ("norm_k", s.k)):
            norm = getattr(s, name)
            if norm is not None and norm.weight is not None:
                fits = norm.weight.shape == x.shape[3:] and norm.weight.device == x.device
                require(fits, f"streams[{i}].{name}.weight", f"({x.shape[3]},) on {x.device}",
                        f"{tuple(norm.weight.shape)} on {norm.weight.device}")  # fmt: skip
    normed = any(s.norm_q is not None or s.norm_k is not None for s in streams)
    applied = plan.spec.queries_applied or plan.spec.keys_applied
    require(not (normed and applied), "plan", "a rope not applied yet, as norms come before rotation", "applied=True")


def _fuses(streams: Sequence[Stream], plan: Plan, backend: str) -> bool:
    """Whether the fused prologue takes this call as it is."""
    normed = all(s.norm_q is not None and s.norm_k is not None for s in streams)
    if len(streams) > 2 or not normed or debugging.enabled(None) or "key_cos" not in plan.tensors:
        return False
    q, k, v = (_telling([getattr(s, name) for s in streams]) for name in ("q", "k", "v"))
    check_tensors(q, k, v, 1.0, backend)
    weights = [n.weight for s in streams for n in (s.norm_q, s.norm_k) if n.weight is not None]
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        return False
    return "query_cos" in plan.tensors and choose(q, k, v, plan, backend).backend == "triton"


def _telling(parts: list[torch.Tensor]) -> torch.Tensor:
    """A part to judge the call by: one that is differentiated, if any is."""
    return next((x for x in parts if x.requires_grad), parts[0])
