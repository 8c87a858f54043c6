"""What can be said of q, k, v by themselves, and beside a plan."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from .checks import require, require_tensor
from .planning.lowered import Lowered
from .planning.resolve import same_device

BACKENDS = ("triton", "sdpa", "eager")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, backend: str) -> None:
    """What can be said of q, k, v without a plan: nothing that depends on their values."""
    for name, x, heads in (("q", q, "H"), ("k", k, "Hkv"), ("v", v, "Hkv")):
        require_tensor(name, x, (4,), f"(B, S, {heads}, D)")
    require(q.dtype in DTYPES, "q", "float64, float32, float16 or bfloat16", q.dtype)
    batch, _, heads, dim = q.shape
    require(min(q.shape) > 0, "q", "non-empty (B, Sq, H, D)", tuple(q.shape))
    require(dim % 2 == 0 and 16 <= dim <= 256, "q", "an even head dim from 16 to 256", dim)
    require(k.shape[0] == batch and k.shape[3] == dim, "k", f"({batch}, Sk, Hkv, {dim})", tuple(k.shape))
    require(min(k.shape) > 0, "k", "at least one key and head", tuple(k.shape))
    require(heads % k.shape[2] == 0, "k", f"a number of heads that divides H = {heads}", k.shape[2])
    require(v.shape == k.shape, "v", f"the shape of k, {tuple(k.shape)}", tuple(v.shape))
    for name, x in (("k", k), ("v", v)):
        require(x.dtype == q.dtype, name, f"the dtype of q, {q.dtype}", x.dtype)
        require(x.device == q.device, name, f"the device of q, {q.device}", x.device)
    require(backend in ("auto", *BACKENDS), "backend", f"one of {('auto', *BACKENDS)}", repr(backend))


def check_plan(q: Tensor, k: Tensor, lowered: Lowered) -> None:
    """That a plan was made for tensors like these."""
    for name, x, length in (("q", q, lowered.num_queries), ("k", k, lowered.num_keys)):
        require(length is None or x.shape[1] == length, name, f"{length} tokens (dim 1), as in the plan",
                x.shape[1])  # fmt: skip
    pairs, batch = lowered.pairs, lowered.batch
    require(pairs is None or q.shape[3] == 2 * pairs, "q", f"head dim {2 * (pairs or 0)}, two channels per RoPE pair",
            q.shape[3])  # fmt: skip
    require(batch is None or q.shape[0] == batch, "q", f"batch {batch}, as in the plan", q.shape[0])
    segments = lowered.keys.segments
    if segments is not None:
        same = same_device(segments.device, q.device)
        require(same, "plan", f"tensors on the device of q, {q.device}", segments.device)


def check_call(q: Tensor, k: Tensor, v: Tensor, lowered: Lowered, backend: str) -> None:
    """Both: what depends on dtypes, shapes, devices and the plan alone."""
    check_tensors(q, k, v, backend)
    check_plan(q, k, lowered)


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor of the logits, ``D ** -0.5`` where none is given."""
    require_tensor("q", q, (4,), "(B, S, H, D)")
    if scale is None:
        return q.shape[-1] ** -0.5
    require(isinstance(scale, Real) and not isinstance(scale, bool), "scale", "a number or None", repr(scale))
    require(-float("inf") < scale < float("inf"), "scale", "a finite number", scale)
    return float(scale)
