"""Attention over tokens a host projects apart: QK norm, concatenation, rotation and modulation in one prologue."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import debug as debugging
from . import ops
from .api import attention
from .backends.plain import Plain
from .backends.plain import chosen as chosen_plain
from .checks import require, require_tensor
from .dispatch import Decision, by_torch, choose, decide, differentiated, execute, may_differentiate
from .kernels.streams import Projected, Streams, joined, rms_norm
from .planning import Lowered, Plan
from .validation import check_plan, check_tensors, scale_of


class Norm(NamedTuple):
    """RMS norm over the head dim: ``weight (D,) * x / sqrt(mean(x**2) + eps)``; None weighs all channels by 1."""

    weight: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """``x (..., D)`` normalised in float32 (float64 for such inputs), rounded once to its dtype."""
        return rms_norm(x, self.weight, self.eps)


class Stream(NamedTuple):
    """Tokens projected together: ``q (B, S, H, D)``, ``k, v (B, S, Hkv, D)``, any strides, and the norms of q and k.

    :func:`joint_attention` takes a :class:`Norm` or None for these; the processors of bindings take any function.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: Callable[[Tensor], Tensor] | None = None
    norm_k: Callable[[Tensor], Tensor] | None = None


def join(streams: Sequence[Stream]) -> tuple[Tensor, Tensor, Tensor]:
    """``q, k, v (B, S, heads, D)`` of all streams, normalised, in the order given."""
    q = [s.q if s.norm_q is None else s.norm_q(s.q) for s in streams]
    k = [s.k if s.norm_k is None else s.norm_k(s.k) for s in streams]
    return _cat(q), _cat(k), _cat([s.v for s in streams])


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """Joined along the tokens; a single part as it is, since ``torch.cat`` would copy it."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def joint_attention(
    streams: Sequence[Stream],
    *,
    plan: Plan,
    scale: float | None = None,
    backend: str = "auto",
    plain: str | Callable | None = None,
) -> Tensor:
    """:func:`fastrope.attention` of ``join(streams)``; where the fused kernels run, in fewer passes over q and k.

    There, one kernel reads each stream as the projections left it, normalises in float32, rotates, weighs, makes the
    key copies of all scale buckets and writes the joint sequence, rounding once where separate steps round up to three
    times. Elsewhere the streams are joined first: for more than two streams, streams without norms, inputs or weights
    that are differentiated, and in debug mode. Queries that meet axis blocks are joined first, too; their keys are not.

    Args:
        streams: tokens of the joint sequence, in order, such as ``[text, image]``; one without tokens counts for
            nothing.
        plan: of the joint sequence, with a rope that is not ``applied`` where norms are given.
        scale, backend, plain: as in :func:`fastrope.attention`.

    Returns:
        ``(B, S, H, D)`` in the dtype of v, contiguous.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: the backend asked for cannot run this call.
    """
    streams, scale = _checked(streams, plan, scale)
    chosen = chosen_plain(plain, backend)
    if not _readable(streams, plan.lowered, backend):
        return attention(*join(streams), plan=plan, scale=scale, backend=backend, plain=plain)
    return _run(*_decide(streams, plan, scale, backend, chosen), streams, plan, scale, backend)


def fused_joint_attention(
    streams: Sequence[Stream], plan: Plan, backend: str, scale: float | None = None
) -> Tensor | None:
    """:func:`joint_attention` if our kernels run, else None: a host then takes its own steps to q, k and v."""
    streams, scale = _checked(streams, plan, scale)
    if not _readable(streams, plan.lowered, backend):
        return None
    decision, call = _decide(streams, plan, scale, backend, chosen_plain(None, backend))
    return _run(decision, call, streams, plan, scale, backend) if decision is None or decision.kernels else None


Call = tuple[Projected, Projected, Projected]  # q, k and v


def _decide(
    streams: Sequence[Stream], plan: Plan, scale: float, backend: str, plain: Plain | None
) -> tuple[Decision | None, Call | None]:  # fmt: skip
    """How the call runs, and on what. None if the op decides when it runs: in compiled code, and if something that must
    see one op watches our kernels."""
    if torch.compiler.is_compiling():
        return None, None
    q, k, v, norms = _unzip(streams)
    check, call = partial(_check_parts, q, k, v, plan.lowered, scale, backend), _streams(q, k, v, norms)
    if not ops.observed(*q, *k, *v, *(n.weight for n in norms if n.weight is not None)):
        return decide(plan.lowered, *call, backend, False, plain, check), call
    check()
    decision = by_torch(choose(plan.lowered, *call, backend, False, plain))
    return None if decision.kernels else decision, call


def _run(
    decision: Decision | None, call: Call | None, streams: Sequence[Stream], plan: Plan, scale: float, backend: str
) -> Tensor:
    if decision is not None and call is not None:
        return _execute(decision, plan.lowered, call, scale)
    q, k, v, norms = _unzip(streams)
    weights, eps = [n.weight for n in norms], [float(n.eps) for n in norms]
    return streamed_attention(q, k, v, weights, eps, list(plan.tensors), plan.spec, scale, backend)


def _checked(streams: Sequence[Stream], plan: Plan, scale: float | None) -> tuple[Sequence[Stream], float]:
    """Streams with tokens, or the first if none has any, and the factor of the logits."""
    _check(streams, plan)
    return [s for s in streams if s.q.shape[1]] or streams[:1], scale_of(streams[0].q, scale)


def _readable(streams: Sequence[Stream], lowered: Lowered, backend: str) -> bool:
    """Whether our kernels could read these streams."""
    norms = [norm for s in streams for norm in (s.norm_q, s.norm_k) if isinstance(norm, Norm)]
    rotates = lowered.queries is not None and lowered.queries.rotation is not None and lowered.keys.rotation is not None
    if len(streams) > 2 or len(norms) < 2 * len(streams) or not rotates or backend == "eager":
        return False
    tensors = [x for s in streams for x in (s.q, s.k, s.v)] + [n.weight for n in norms if n.weight is not None]
    if torch.compiler.is_compiling():  # which knows no tangents
        return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    return not debugging.enabled(None) and not (may_differentiate() and any(map(differentiated, tensors)))


@torch.library.custom_op("fastrope::joint_attention", mutates_args=())
def streamed_attention(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: Sequence[float],
    tensors: Sequence[Tensor],
    spec: str,
    scale: float,
    backend: str,
) -> Tensor:
    """:func:`joint_attention` of one or two streams. ``weights`` and ``eps`` are those of the norms of all q, then of
    all k; the plan comes as ``list(plan.tensors)`` and ``plan.spec``. Forward only."""
    lowered = Lowered.unflatten(tensors, spec)
    _check_parts(q, k, v, lowered, scale, backend)
    ops.refuse_eager(backend)
    norms = [Norm(*each) for each in zip(list(weights), eps, strict=True)]
    with torch.no_grad():
        call = _streams(q, k, v, norms)
        return _execute(decide(lowered, *call, backend), lowered, call, scale)


@streamed_attention.register_fake
def _(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: Sequence[float],
    tensors: Sequence[Tensor],
    spec: str,
    scale: float,
    backend: str,
):
    _check_parts(q, k, v, Lowered.unflatten(tensors, spec), scale, backend)
    ops.refuse_eager(backend)
    batch, _, heads, dim = q[0].shape
    return q[0].new_empty((batch, sum(x.shape[1] for x in q), heads, dim))


def _execute(decision: Decision, lowered: Lowered, call: Call, scale: float) -> Tensor:
    queries, keys, values = call
    if not decision.kernels:
        queries, keys, values = map(joined, call)
    elif decision.launch is not None and lowered.num_per_query and not decision.launch.polynomial:
        queries = joined(queries)  # axis blocks read them as they are
    return execute(decision, lowered, queries, keys, values, scale)[0]


def _unzip(streams: Sequence[Stream]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Norm]]:
    q, k, v, norms_q, norms_k = map(list, zip(*streams, strict=True))
    return q, k, v, norms_q + norms_k


def _streams(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], norms: Sequence[Norm]
) -> tuple[Projected, Projected, Projected]:
    """What the kernels read in the place of a joint sequence; values have no norms."""

    def streams(parts: Sequence[Tensor], norms: Sequence[Norm]) -> Streams:
        weights = (x.new_ones(x.shape[3]) if n.weight is None else n.weight for x, n in zip(parts, norms, strict=True))
        return Streams(tuple(parts), tuple(w.contiguous() for w in weights), tuple(float(n.eps) for n in norms))

    values = Streams(tuple(v)) if len(v) > 1 else v[0]
    return streams(q, norms[: len(q)]), streams(k, norms[len(q) :]), values


# ---- validation -----------------------------------------------------------------------------------------------------


def _check(streams: Sequence[Stream], plan: Plan) -> None:
    known = isinstance(streams, (list, tuple)) and len(streams) > 0 and all(isinstance(s, Stream) for s in streams)
    if not known:
        several = isinstance(streams, (list, tuple)) and not isinstance(streams, Stream)
        received = [type(s).__name__ for s in streams] if several else type(streams).__name__
        require(False, "streams", "a list of fastrope.Stream, at least one", received)
    require(isinstance(plan, Plan), "plan", "a Plan of fastrope.plan()", type(plan).__name__)
    first = next(iter(streams))
    for i, s in enumerate(streams):
        for name, x, like in (("q", s.q, first.q), ("k", s.k, first.k), ("v", s.v, first.v)):
            name = f"streams[{i}].{name}"
            require_tensor(name, x, (4,), "(B, S, heads, D)")
            if _kind(x) != _kind(like):
                expected = f"batch, heads, D, dtype and device of streams[0], {tuple(like.shape)} {like.dtype} "
                require(False, name, f"{expected}{like.device}", f"{tuple(x.shape)} {x.dtype} {x.device}")
            require(x.shape[1] == s.q.shape[1], name, f"{s.q.shape[1]} tokens, as in q", x.shape[1])
        _check_norm(f"streams[{i}].norm_q", s.norm_q, s.q)
        _check_norm(f"streams[{i}].norm_k", s.norm_k, s.k)
    normed = any(s.norm_q is not None or s.norm_k is not None for s in streams)
    applied = plan.lowered.queries_applied or plan.lowered.keys_applied
    require(not (normed and applied), "plan", "a rope not applied yet, as norms come before rotation", "applied=True")


def _kind(x: Tensor) -> tuple:
    return x.shape[0], x.shape[2], x.shape[3], x.dtype, x.device


def _check_norm(name: str, norm: Any, x: Tensor) -> None:
    if norm is None:
        return
    require(isinstance(norm, Norm), name, "a fastrope.Norm or None", type(norm).__name__)
    eps, weight = norm.eps, norm.weight
    ok = isinstance(eps, Real) and not isinstance(eps, bool) and 0 <= float(eps) < math.inf
    require(ok, f"{name}.eps", "a finite number, not negative", repr(eps))
    if weight is None:
        return
    require_tensor(f"{name}.weight", weight, (1,), "(D,)")
    if weight.shape[0] != x.shape[3] or weight.device != x.device or not weight.is_floating_point():
        received = f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
        require(False, f"{name}.weight", f"({x.shape[3]},) floating point on {x.device}", received)


def _check_parts(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], lowered: Lowered, scale: float, backend: str
) -> None:
    """What can be said of the streams beside a plan; an op checks it again, as a graph may be handed other tensors."""
    scale_of(q[0], scale)
    check_tensors(q[0], k[0], v[0], backend)
    queries, keys = (parts[0][:, :1].expand(-1, sum(x.shape[1] for x in parts), -1, -1) for parts in (q, k))
    check_plan(queries, keys, lowered)
