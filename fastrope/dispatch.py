"""Which backend runs a call, and running it: one decision, one execution.

:func:`decide` says all there is to choose, :func:`fastrope.explain` prints it, :func:`execute` does it. Every call goes
through both once: :func:`fastrope.attention`, :func:`fastrope.joint_attention` and the ops that compilers see.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn, cast

import torch
from torch import Tensor

from . import device as devices
from . import ran, rules, verification
from .backends import folded, fused, hand_over, lse_merge, reference, sdpa, split_rows
from .backends.plain import Plain
from .kernels.streams import Projected, Streams, joined
from .planning.lowered import Lowered
from .planning.resolved import Resolved
from .sample import Kind, disagreement, draw

Tensors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Decision:
    """How a call runs, and why.

    Args:
        backend: one of ``BACKENDS``; ``reason`` says why, ``rejected`` has ``(name, why not)`` of the others.
        warning: what the user should know, if anything.
        folded: ``sdpa`` on keys that our kernels prepare, see :mod:`fastrope.backends.folded`.
        split: ``triton`` for modulated queries, torch's attention for the others, see
            :mod:`fastrope.backends.split_rows`.
        passes: runs over the keys, merged by their log-sum-exps.
        packs: those of ``"q"``, ``"k"``, ``"v"`` that take a pass of our kernels before attention.
        prepares: those that take one before torch's attention.
        launch: how the fused loop runs; None where it does not.
        plain: the attention that folded or split-off work is handed to; None: torch's.
        merges: it takes ``passes`` runs of keys, each under one bias, see :mod:`fastrope.backends.lse_merge`.
        trusted: kernels that nobody asked for by name run on a GPU; ``kind`` is what has to be verified before, None
            where nothing has, see :mod:`fastrope.verification`.
    """

    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    warning: str | None = None
    folded: bool = False
    split: bool = False
    passes: int = 1
    packs: tuple[str, ...] = ()
    prepares: tuple[str, ...] = ()
    launch: fused.Launch | None = None
    plain: Plain | None = None
    merges: bool = False
    trusted: bool = False
    kind: Kind | None = None

    @property
    def kernels(self) -> bool:
        """Whether our kernels run, forward only."""
        return self.backend == "triton" or self.folded


# ---- decision --------------------------------------------------------------------------------------------------------


def decide(
    lowered: Lowered, q: Projected, k: Projected, v: Projected, backend: str, return_lse: bool = False,
    plain: Plain | None = None, check: Callable[[], object] = lambda: None,
) -> Decision:  # fmt: skip
    """How a call runs. A backend that is asked for runs or raises; ``auto`` never changes the mathematics. Decided once
    for tensors of one layout, and remembered with the plan.

    Args:
        q, k, v: ``(B, S, H, D)`` tensors, or :class:`fastrope.kernels.Streams` of them.
        backend: one of ``BACKENDS``, or ``"auto"``.
        plain: the attention for work that folds or splits off; None: torch's, where that is faster.
        check: called before a decision is made: what it checks must depend on nothing else.

    Raises:
        NotImplementedError: the backend asked for cannot run this call.
    """

    # Anybody's function may hold a model, and must not live as long as the plan.
    known = None if plain is None else replace(plain, function=_unknown)

    def make() -> Decision:
        check()
        return _decide(lowered, q, k, v, backend, return_lse, known)

    key = backend, return_lse, known, _differentiates(q, k, v), devices.switches(), *map(_layout, (q, k, v))
    chosen = lowered.once(("decision", key), make)
    if chosen.plain is not None:
        chosen = replace(chosen, plain=plain)
    if chosen.kind is not None and verification.failed(chosen.kind, q.device):
        return _without_kernels(chosen, lowered)
    return chosen


def _unknown(*_: object, **__: object) -> NoReturn:
    """In the place of a plain attention that a decision knows by its name."""
    raise AssertionError("a decision without its plain attention")


def _layout(x: Projected) -> tuple:
    """All that a decision reads of a tensor, or of streams."""
    if isinstance(x, Streams):
        return tuple(map(_layout, x.parts))
    if not hasattr(x, "data_ptr"):
        return (type(x),)  # no tensor, which the check refuses
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16


def _decide(
    lowered: Lowered, q: Projected, k: Projected, v: Projected, backend: str, return_lse: bool,
    plain: Plain | None,
) -> Decision:  # fmt: skip
    chosen = _completed(choose(lowered, q, k, v, backend, return_lse, plain), lowered, q, k, v)
    if backend == "triton" or not (chosen.kernels and devices.on_gpu(q)):  # who names the kernels has them
        return chosen
    kind = _kind(chosen, lowered, q, k) if verification.needed(q.device) else None
    return replace(chosen, trusted=True, kind=kind)


def by_route(route: str, lowered: Lowered, q: Projected, k: Projected, v: Projected) -> Decision:
    """How a call on a GPU runs by a route of its family, see :mod:`fastrope.rules`; what measurements compare."""
    backend, split = rules.ROUTES[route]
    folds = backend == "sdpa" and folded.takes(q, lowered)
    return _completed(Decision(backend, "asked for", split=split, folded=folds), lowered, q, k, v)


def _kind(decision: Decision, lowered: Lowered, q: Projected, k: Projected) -> Kind:
    launch, per_query = decision.launch, ""
    if launch is not None and lowered.num_per_query:
        per_query = "polynomial" if launch.polynomial else "axis blocks"
    features = (name for name in lowered.features if not (decision.merges and name == "LogitBias"))
    return Kind(
        "sdpa" if decision.folded else "split" if decision.split else "loop", tuple(features), per_query,
        launch is not None and launch.descriptors, launch is not None and decision.passes > 1, isinstance(k, Streams),
        q.shape[2] != k.shape[2], lowered.pairing, q.dtype, q.shape[3],
    )  # fmt: skip


def _without_kernels(decision: Decision, lowered: Lowered) -> Decision:
    """The same call where the kernels that it would take are wrong."""
    why = "fails its check against the reference on this card"
    rejected = (("triton", why), decision.rejected[-1]) if decision.rejected else ()
    plain, merges = decision.plain, decision.merges
    split = decision.split and plain is not None
    passes = decision.passes if merges else len(sdpa.passes(lowered))
    reason = f"our kernels: {why}"
    return Decision("sdpa", reason, rejected, split=split, passes=passes, plain=plain, merges=merges)


def _completed(chosen: Decision, lowered: Lowered, q: Projected, k: Projected, v: Projected) -> Decision:
    """The rest of a decision, which reads strides."""
    prepares, packs = (), set()
    if chosen.folded or chosen.split:
        prepares = folded.prepares(q, k, v, lowered)
        packs = {*prepares, *(() if lowered.keys.masked is None else ("k", "v"))}  # under a mask these are gathered
    if chosen.backend == "triton":
        launch = fused.Launch.of(q, k, v, lowered)
        chosen = replace(chosen, passes=max(len(lowered.passes), 1), launch=launch)
        packs |= {*launch.packs}
    elif not (chosen.folded or chosen.merges) and chosen.backend == "sdpa":
        chosen = replace(chosen, passes=len(sdpa.passes(lowered)))
    return replace(chosen, prepares=prepares, packs=tuple(name for name in "qkv" if name in packs))


def choose(
    lowered: Lowered, q: Projected, k: Projected, v: Projected, backend: str, return_lse: bool = False,
    plain: Plain | None = None,
) -> Decision:  # fmt: skip
    """The backend part of :func:`decide`, which reads neither values nor addresses: tensors may be fake ones."""
    grad = _differentiates(q, k, v)
    found = _backend_for(lowered, q, grad, backend, return_lse)
    if plain is not None and backend in ("auto", "sdpa") and not return_lse:
        found = _handed_over(found, lowered, q, grad, backend, plain)
        if found.plain is not None:
            return found
    folds = found.backend == "sdpa" and not (grad or return_lse) and folded.takes(q, lowered)
    return replace(found, folded=True) if folds else found


def _handed_over(
    found: Decision, lowered: Lowered, q: Projected, grad: bool, backend: str, plain: Plain
) -> Decision:  # fmt: skip
    """The same where work folds or splits off, and ``plain`` takes it."""
    kernels = devices.on_gpu(q) and devices.kernel_obstacle(q) is None and not grad
    never_eager = ("eager", "materialises the logits; runs only when asked for")
    if folded.folds(lowered):
        why = f"all of it folds into queries, keys and values, for {plain.name}"
        rejected = ("triton", "nothing is left for its loop"), never_eager
        return replace(found, backend="sdpa", reason=why, rejected=rejected, split=False, folded=kernels, plain=plain)
    if plain.returns_lse and not grad and lse_merge.merges(lowered):
        passes = len(lse_merge.runs(lowered))
        why = f"biases weigh runs of keys, each for {plain.name}"
        rejected = ("triton", "nothing is left for its loop"), never_eager
        return replace(found, backend="sdpa", reason=why, rejected=rejected, split=False, folded=kernels, passes=passes,
                       plain=plain, merges=True)  # fmt: skip
    if not split_rows.splits(lowered):
        return found
    chosen = "triton" if kernels and backend == "auto" else "sdpa"
    why = f"unmodulated queries for {plain.name}"
    rejected = tuple(each for each in found.rejected if each[0] != chosen)
    return replace(found, backend=chosen, reason=why, rejected=rejected, split=True, plain=plain)


def by_torch(decision: Decision) -> Decision:
    """The same by torch's operations, if there is a plain attention to hand work to."""
    return decision if decision.plain is None else replace(decision, backend="sdpa", folded=False, launch=None)


def _backend_for(lowered: Lowered, q: Projected, grad: bool, backend: str, return_lse: bool) -> Decision:
    obstacle = devices.kernel_obstacle(q)
    if backend == "triton":
        if grad:
            raise NotImplementedError(
                'backend="triton" is forward only: expected inputs that do not require grad, received '
                'requires_grad=True (or a tangent); use backend="sdpa" (or "auto"), or torch.no_grad()'
            )
        if obstacle:
            raise NotImplementedError(f'backend="triton" cannot run this call: {obstacle}')
    if backend != "auto":
        return Decision(backend, "asked for")
    never_eager = ("eager", "materialises the logits; runs only when asked for")
    if obstacle:
        expected = q.dtype == torch.float64 or obstacle == devices.WITHOUT_KERNELS
        warning = f"fastrope runs on backend 'sdpa': the fused kernel is unavailable ({obstacle})"
        rejected = (("triton", obstacle), never_eager)
        return Decision("sdpa", "runs on any device", rejected, warning if devices.on_gpu(q) and not expected else None)
    if grad:
        return Decision("sdpa", "differentiable", (("triton", "inputs require grad; forward only"), never_eager))
    if not devices.on_gpu(q):
        why = "interpreted, for tests: it runs when asked for"
        return Decision("sdpa", "compiled code on this device", (("triton", why), never_eager))
    rule = rules.rule_for(lowered, q.dtype, return_lse, q.device)
    chosen, split = rules.ROUTES[rule.route]
    rejected = ("sdpa" if chosen == "triton" else "triton", rule.against), never_eager
    return Decision(chosen, f"{rule.reason} ({rule.basis})", rejected, split=split)


def _differentiates(*inputs: Projected) -> bool:
    if not may_differentiate():
        return False
    return any(
        hasattr(x, "requires_grad") and differentiated(cast(Tensor, x))
        for x in inputs  # streams are not followed
    )


def may_differentiate() -> bool:
    """Whether reverse or forward mode is on; ``torch.no_grad`` ends the former alone."""
    level = torch.autograd.forward_ad._current_level  # pyright: ignore[reportPrivateImportUsage]
    return torch.is_grad_enabled() or level >= 0


def differentiated(x: Tensor) -> bool:
    """Whether reverse or forward mode follows ``x``."""
    reverse = x.requires_grad and torch.is_grad_enabled()
    return reverse or torch.autograd.forward_ad.unpack_dual(x).tangent is not None


# ---- execution -------------------------------------------------------------------------------------------------------


_WARNED: set[str] = set()


def execute(
    decision: Decision, lowered: Lowered, q: Projected, k: Projected, v: Projected, scale: float,
    return_lse: bool = False, resolved: Resolved | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run a call as decided: ``out (B, Sq, H, D)`` contiguous and, if asked for, ``lse (B, H, Sq)``.

    Args:
        resolved: what the reference reads; None where it cannot be asked for.
    """
    if decision.warning and decision.warning not in _WARNED:
        _WARNED.add(decision.warning)
        warnings.warn(decision.warning, stacklevel=3)
    with no_autocast(q.device):
        kind, device = decision.kind, q.device
        if kind is not None and not verification.holds(kind, device, lambda: _wrong(kind, device)):
            decision = _without_kernels(decision, lowered)
            q, k, v = map(joined, (q, k, v))
        ran.note(decision.backend, decision.reason, q.shape, k.shape[1], q.dtype)
        out, lse = _attend(decision, lowered, q, k, v, scale, return_lse, resolved)
    return out.contiguous(), lse if return_lse else None


def _attend(
    decision: Decision, lowered: Lowered, q: Projected, k: Projected, v: Projected, scale: float, return_lse: bool,
    resolved: Resolved | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    tensors = cast(Tensors, (q, k, v))  # streams go to our kernels alone
    if decision.backend == "eager":
        return reference.run(*tensors, cast(Resolved, resolved), scale, return_lse)
    plain = decision.plain
    if plain is not None and decision.merges:
        plain = lse_merge.by_runs(plain, lowered)
    if decision.folded:
        return folded.run(q, k, v, lowered, scale, decision.prepares, (None, None), plain), None
    if decision.launch is None and plain is not None:
        return hand_over.run(*tensors, lowered, scale, plain, decision.split), None
    if decision.launch is None:
        return sdpa.run(*tensors, lowered, scale, return_lse)
    if decision.split:
        return split_rows.run(q, k, v, lowered, scale, decision.launch, decision.prepares, plain), None
    return fused.run(q, k, v, lowered, scale, decision.launch)


def _wrong(kind: Kind, device: torch.device) -> str | None:
    """How the kernels of a kind break the tolerance rule on a small call; None where they keep it."""
    with torch.no_grad():
        sample = draw(kind, device)
        q, k, v, lowered = *sample[:3], sample.plan.lowered
        decision = by_route(kind.route, lowered, q, k, v)
        return disagreement(sample, *_attend(decision, lowered, q, k, v, kind.dim**-0.5, True, None))


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which autocast leaves dtypes alone: the op computes in the dtype of its inputs."""
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext()
