"""The public op: arguments to plan, plan to backend."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch

from . import debug, ops
from .backends import eager, folded, sdpa, triton
from .checks import require, require_tensor
from .modulations import Modulation
from .planning import Plan, cached_plan
from .resolve import as_tuple, same_device
from .rope import RoPE
from .rules import rule_for

BACKENDS = ("triton", "sdpa", "eager")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    rope: RoPE | None = None,
    key_rope: RoPE | None = None,
    modulations: Sequence[Modulation] = (),
    key_mask: torch.Tensor | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    debug: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention with rotary embedding and modulations, without causal mask.

    Args:
        q: ``(B, Sq, H, D)``; float32, float16, bfloat16 (float64 on ``eager`` and ``sdpa``). Any strides.
        k, v: ``(B, Sk, Hkv, D)``, dtype and device of ``q``; ``H % Hkv == 0`` (grouped-query attention).
        rope: angles of the queries, and of the keys unless ``key_rope`` is given; None rotates nothing.
        key_rope: angles of the keys when they are other tokens than the queries (``Sq != Sk``, shared attention).
        modulations: QueryScale, BandWeight, BiasDelta, LogitGain; the order does not matter.
        key_mask: ``(B, Sk)`` bool, True = attend. A query without any key gives zeros (and ``lse = -inf``).
        plan: a prepared :func:`fastrope.plan` in place of the four arguments above.
        scale: factor of the logits, ``D ** -0.5`` by default.
        return_lse: also return the log-sum-exp of the logits.
        backend: ``"auto"``, ``"triton"`` (fused; forward only), ``"sdpa"`` (any device, differentiable in q, k, v) or
            ``"eager"`` (the specification; materialises the logits). See :func:`explain`.
        debug: check inputs and agreement with the reference on a sample of queries; None reads ``FASTROPE_DEBUG``.

    Returns:
        ``out (B, Sq, H, D)`` in the dtype of ``q``, contiguous; with ``return_lse`` also ``lse (B, H, Sq)``, natural
        log, float32 (float64 for float64 inputs).

    Numerics: softmax and accumulation in float32, rotations in float32 rounded to the input dtype.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: the backend asked for cannot run this call.
    """
    scale_value, modulations = scale_of(q, scale), as_tuple(modulations)
    require(debug is None or isinstance(debug, bool), "debug", "True, False or None", repr(debug))
    if torch.compiler.is_compiling():
        require(not debug, "debug", "None in compiled code (call once without the compiler to check)", debug)
        tokens = rope, key_rope, modulations, key_mask, plan
        return ops.traced_attention(q, k, v, *tokens, scale_value, return_lse, backend)
    check_tensors(q, k, v, scale_value, backend)
    plan = _plan_for(q, k, rope, key_rope, modulations, key_mask, plan)
    return run_plan(q, k, v, plan, scale_value, return_lse, backend, debug)


def run_plan(q, k, v, plan: Plan, scale: float, return_lse: bool, backend: str, check: bool | None):
    """Choose a backend for a checked call and run it."""
    check_plan(q, k, plan)
    choice = choose(q, k, v, plan, backend, return_lse)
    if choice.warning:
        _warn_once(choice.warning)
    if debug.enabled(check):
        debug.check_inputs(q, k, v, plan, scale)
    with no_autocast(q.device):
        if choice.backend == "eager":
            out, lse = eager.run(q, k, v, plan, scale, return_lse)
        elif not choice.kernels:
            out, lse = sdpa.run(q, k, v, plan, scale, return_lse)
        else:
            out, lse = ops.apply_plan(q, k, v, plan, scale, return_lse, backend)
    out = out.contiguous()
    if debug.enabled(check):
        debug.check_output(q, k, v, plan, scale, out, choice.backend)
    return (out, lse) if return_lse else out


def no_autocast(device: torch.device):
    """A context in which autocast leaves dtypes alone: the op computes in the dtype of its inputs."""
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext()


# ---- validation -----------------------------------------------------------------------------------------------------


def check_tensors(q, k, v, scale: float, backend: str) -> None:
    """What can be said of q, k, v without a plan."""
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
    require(-float("inf") < scale < float("inf"), "scale", "a finite number", scale)
    require(backend in ("auto", *BACKENDS), "backend", f"one of {('auto', *BACKENDS)}", repr(backend))


def check_plan(q, k, plan: Plan) -> None:
    """That the plan was made for tensors like these."""
    spec = plan.spec
    for name, x, length in (("q", q, spec.num_queries), ("k", k, spec.num_keys)):
        require(length is None or x.shape[1] == length, name, f"{length} tokens (dim 1), as in the plan",
                x.shape[1])  # fmt: skip
    require(spec.pairs is None or q.shape[3] == 2 * spec.pairs, "q", f"head dim {2 * (spec.pairs or 0)}, two channels "
            "per RoPE pair", q.shape[3])  # fmt: skip
    require(spec.batch is None or q.shape[0] == spec.batch, "q", f"batch {spec.batch}, as in the plan", q.shape[0])
    device = plan.device
    require(device is None or same_device(device, q.device), "plan", f"tensors on the device of q, {q.device}", device)


def scale_of(q, scale: float | None) -> float:
    """The factor of the logits, ``D ** -0.5`` where none is given."""
    require_tensor("q", q, (4,), "(B, S, H, D)")
    if scale is None:
        return q.shape[-1] ** -0.5
    require(isinstance(scale, Real) and not isinstance(scale, bool), "scale", "a number or None", repr(scale))
    return float(scale)


def _plan_for(q, k, rope, key_rope, modulations, key_mask, plan) -> Plan:
    if plan is None:
        return cached_plan(rope, key_rope, modulations, key_mask, q.shape[1], k.shape[1], q.device)
    require(isinstance(plan, Plan), "plan", "a Plan of fastrope.plan()", type(plan).__name__)
    given = [name for name, x in (("rope", rope), ("key_rope", key_rope), ("modulations", modulations or None),
             ("key_mask", key_mask)) if x is not None]  # fmt: skip
    require(not given, "plan", "either a plan or what it is made of", f"plan and {', '.join(given)}")
    return plan


# ---- choice of backend ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The backend that runs a call, why, and why each of the others does not; ``folded``: ``sdpa`` in the form of
    :mod:`fastrope.backends.folded`; ``divided``: ``triton`` in that of :mod:`fastrope.backends.divided`."""

    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    warning: str | None = None
    folded: bool = False
    divided: bool = False

    @property
    def kernels(self) -> bool:
        """Whether ours prepare the call, forward only."""
        return self.backend == "triton" or self.folded


def choose(q, k, v, plan: Plan, backend: str, return_lse: bool = False) -> Choice:
    """Pick the backend. An explicit one runs or raises; ``auto`` never changes the mathematics."""
    grad = torch.is_grad_enabled() and any(differentiated(x) for x in (q, k, v))
    obstacle = triton.unsupported(q)
    if backend == "triton":
        if grad:
            raise NotImplementedError(
                'backend="triton" is forward only: expected inputs that do not require grad, received '
                'requires_grad=True (or a tangent); use backend="sdpa" (or "auto"), or torch.no_grad()'
            )
        if obstacle:
            raise NotImplementedError(f'backend="triton" cannot run this call: {obstacle}')
    folds = not (grad or return_lse) and folded.takes(q, plan)
    if backend != "auto":
        return Choice(backend, "asked for", folded=folds and backend == "sdpa")
    never_eager = ("eager", "materialises the logits; runs only when asked for")
    if obstacle:
        unexpected = q.device.type == "cuda" and q.dtype != torch.float64
        warning = f"fastrope runs on backend 'sdpa': the fused kernel is unavailable ({obstacle})"
        rejected = (("triton", obstacle), never_eager)
        return Choice("sdpa", "runs on any device", rejected, warning if unexpected else None)
    if grad:
        return Choice("sdpa", "differentiable", (("triton", "inputs require grad; forward only"), never_eager))
    if q.device.type != "cuda":
        why = "interpreted, for tests: it runs when asked for"
        return Choice("sdpa", "compiled code on this device", (("triton", why), never_eager))
    rule = rule_for(plan, q.dtype, return_lse)
    other = "sdpa" if rule.backend == "triton" else "triton"
    rejected = (other, rule.against), never_eager
    return Choice(
        rule.backend, f"{rule.reason} ({rule.basis})", rejected, folded=folds and rule.backend == "sdpa",
        divided=rule.divided,
    )  # fmt: skip


def differentiated(x: torch.Tensor) -> bool:
    """Whether reverse or forward mode follows ``x``."""
    return x.requires_grad or torch.autograd.forward_ad.unpack_dual(x).tangent is not None


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``str()`` of it is the report.

    Args:
        backend: the one that would run, for ``reason``; ``rejected`` has ``(name, why)`` of the others.
        segments: runs of keys under one treatment, in the order of the keys (sorted, where they are).
        levels: scales that queries share, other than 1; ``continuous_queries`` counts those with a scale of their own.
        keys_reordered: True when keys are sorted by treatment.
        dropped: neutral modulations.
        plan_bytes: memory of the plan's tables.
        passes: launches over the keys, merged by their log-sum-exps.
        loop: how the fused loop reads keys and values; None where another one runs.
        own: how the fused kernels meet queries with a scale of their own, exactly or by a series; None without any.
        untouched: queries that nothing sets apart, where torch's attention takes them; 0 where not.
        prologue: what our kernels prepare for torch's attention, such as ``"q, k"``; None where nothing.
    """

    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...]
    segments: tuple
    levels: tuple[float, ...]
    continuous_queries: int
    keys_reordered: bool
    dropped: int
    plan_bytes: int
    passes: int = 1
    loop: str | None = None
    own: str | None = None
    untouched: int = 0
    prologue: str | None = None

    def __str__(self) -> str:
        lines = [f"backend: {self.backend} ({self.reason})"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected]
        lines.append(f"segments of keys{' (sorted by treatment)' if self.keys_reordered else ''}:")
        for s in self.segments:
            names = [n for n, on in (("QueryScale", s.scaled), ("BandWeight", s.weight >= 0),
                     ("BiasDelta", s.group >= 0), ("LogitGain", s.gain >= 0)) if on]  # fmt: skip
            lines.append(f"  [{s.start}, {s.stop}) {' + '.join(names) or 'plain'}")
        if self.levels or self.continuous_queries:
            levels = ", ".join(f"{r:.4g}" for r in self.levels)
            lines.append(f"levels: 1{', ' if levels else ''}{levels}; queries with a scale of their own: "
                         f"{self.continuous_queries}")  # fmt: skip
        if self.own:
            lines.append(f"  these through {self.own}")
        if self.untouched:
            lines.append(f"queries that nothing sets apart: {self.untouched}, through torch's attention")
        if self.loop:
            lines.append(f"keys and values: through {self.loop}")
        if self.prologue:
            lines.append(f"prologue: kernels over {self.prologue}")
        if self.passes > 1:
            lines.append(f"passes: {self.passes}, merged (more treatments than one launch holds)")
        if self.dropped:
            lines.append(f"neutral modulations dropped: {self.dropped}")
        lines.append(f"plan: {self.plan_bytes / 2**20:.1f} MiB of tables")
        return "\n".join(lines)


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    rope: RoPE | None = None,
    key_rope: RoPE | None = None,
    modulations: Sequence[Modulation] = (),
    key_mask: torch.Tensor | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    debug: bool | None = None,
) -> Explanation:
    """What :func:`attention` would do with the same arguments, and why; runs nothing.

    Returns:
        An :class:`Explanation`: the backend and the reasons against the others, the segments and levels found.

    Raises:
        ValueError, NotImplementedError: what :func:`attention` would raise.
    """
    modulations = as_tuple(modulations)
    check_tensors(q, k, v, scale_of(q, scale), backend)
    plan = _plan_for(q, k, rope, key_rope, modulations, key_mask, plan)
    check_plan(q, k, plan)
    choice = choose(q, k, v, plan, backend, return_lse)
    mods = plan.resolved
    kept = (mods.scale is not None) + len(mods.weights) + len(mods.groups) + len(mods.gains)
    return Explanation(
        backend=choice.backend, reason=choice.reason, rejected=choice.rejected, segments=plan.spec.segments,
        levels=tuple(plan.tensors["levels"].tolist()) if "levels" in plan.tensors else (),
        continuous_queries=sum(counts[0] for counts in plan.spec.level_counts),
        keys_reordered="key_order" in plan.tensors, dropped=max(len(tuple(modulations)) - kept, 0),
        plan_bytes=plan.nbytes,
        passes={"eager": 1, "sdpa": len(sdpa.passes(plan)), "triton": max(len(plan.spec.passes), 1)}[choice.backend],
        loop=triton.explain_loop(q, k, v, plan) if choice.backend == "triton" else None,
        own=triton.explain_own(q, plan) if choice.backend == "triton" else None,
        untouched=len(plan.tensors["untouched"]) if choice.divided else 0,
        prologue=folded.prepared(q, k, v, plan) or None if choice.folded or choice.divided else None,
    )  # fmt: skip


_WARNED: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=3)
