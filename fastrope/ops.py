"""torch.library ops, so that compilers, graphs and fake tensors see one opaque call.

``fastrope::planned_attention`` applies a lowered plan: its tensors and a string that says what they are. It returns
``(out, lse)``, ``lse`` empty unless asked for, and differentiates in q, k, v by recomputing through ``sdpa``. Its first
lines are the same checks as outside a graph, so a wrong shape raises while tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .backends import sdpa
from .dispatch import decide, execute
from .planning import Lowered
from .validation import check_call, scale_of


def observed(*tensors: Tensor) -> bool:
    """Whether something looks at a call that must see one op: a dispatch mode (fake tensors, ``make_fx``, counters), a
    functional transform, a tracer, a tensor subclass."""
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
    looked_at = _get_current_dispatch_mode() is not None or torch._C._are_functorch_transforms_active()
    # torch.jit.is_tracing is documented and left out of the module's __all__.
    return not plain or looked_at or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def refuse_eager(backend: str) -> None:
    """The reference reads the modulations as given, and an op carries only their lowered form.

    Raises:
        NotImplementedError: it is asked for.
    """
    if backend == "eager":
        raise NotImplementedError('backend="eager" cannot run a compiled plan: expected "sdpa", "triton" or "auto"')


def _outputs(q: Tensor, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    return out.contiguous(), q.new_empty(0, dtype=_wide(q)) if lse is None else lse.contiguous()


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


@torch.library.custom_op("fastrope::planned_attention", mutates_args=())
def planned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    spec: str,
    scale: float,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`fastrope.attention` of a plan given as ``list(plan.tensors)`` and ``plan.spec``."""
    lowered, scale = Lowered.unflatten(tensors, spec), scale_of(q, scale)
    refuse_eager(backend)
    with torch.no_grad():
        decision = decide(lowered, q, k, v, backend, return_lse, check=partial(check_call, q, k, v, lowered, backend))
        return _outputs(q, *execute(decision, lowered, q, k, v, scale, return_lse))


@planned_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: str, scale: float, return_lse: bool, backend: str
):
    scale_of(q, scale)
    check_call(q, k, v, Lowered.unflatten(tensors, spec), backend)
    refuse_eager(backend)
    batch, length, heads, _ = q.shape
    lse = q.new_empty((batch, heads, length) if return_lse else (0,), dtype=_wide(q))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("fastrope::planned_attention_backward", mutates_args=())
def planned_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    spec: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`planned_attention` in q, k, v."""
    lowered = Lowered.unflatten(tensors, spec)

    def forward(q: Tensor, k: Tensor, v: Tensor):
        out, lse = sdpa.run(q, k, v, lowered, scale, return_lse=grad_lse is not None)
        return (out,) if grad_lse is None else (out, lse)

    # Inside an op autograd's own recording is off whatever the grad mode; functional transforms still record.
    pull_back = torch.func.vjp(forward, q, k, v)[1]
    found = pull_back((grad_out,) if grad_lse is None else (grad_out, grad_lse))
    grad_q, grad_k, grad_v = (torch.empty_like(x).copy_(g) for x, g in zip((q, k, v), found, strict=True))
    return grad_q, grad_k, grad_v


@planned_attention_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _planned_setup(ctx: Any, inputs: tuple, output: Any):
    q, k, v, tensors, ctx.spec, ctx.scale, ctx.return_lse, _ = inputs
    ctx.save_for_backward(q, k, v, *tensors)


def _planned_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None):
    q, k, v, *tensors = ctx.saved_tensors
    grad_lse = grad_lse if ctx.return_lse else None
    grads = planned_attention_backward(grad_out, grad_lse, q, k, v, tensors, ctx.spec, ctx.scale)
    return *grads, [None] * len(tensors), None, None, None, None


planned_attention.register_autograd(_planned_backward, setup_context=_planned_setup)
