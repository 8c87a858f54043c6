"""The public op: arguments to plan, plan to decision, decision to output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from . import debug as debugging
from . import device as devices
from . import ops, verification
from .backends.folded import kernel_name
from .backends.plain import chosen as chosen_plain
from .checks import require
from .dispatch import Decision, by_torch, choose, decide, execute
from .modulations import Modulation
from .planning import Plan, cached_plan
from .planning import plan as make_plan
from .planning.resolve import as_tuple
from .planning.segments import Segment
from .rope import RoPE
from .validation import check_call, check_plan, check_tensors, scale_of


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, rope: RoPE | None = ..., key_rope: RoPE | None = ...,
    modulations: Sequence[Modulation] = ..., key_mask: Tensor | None = ..., plan: Plan | None = ...,
    scale: float | None = ..., return_lse: Literal[False] = ..., backend: str = ..., plain: str | Callable | None = ...,
    debug: bool | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, rope: RoPE | None = ..., key_rope: RoPE | None = ...,
    modulations: Sequence[Modulation] = ..., key_mask: Tensor | None = ..., plan: Plan | None = ...,
    scale: float | None = ..., return_lse: Literal[True], backend: str = ..., plain: str | Callable | None = ...,
    debug: bool | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rope: RoPE | None = None,
    key_rope: RoPE | None = None,
    modulations: Sequence[Modulation] = (),
    key_mask: Tensor | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    plain: str | Callable | None = None,
    debug: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention with rotary embedding and modulations, without causal mask.

    Args:
        q: ``(B, Sq, H, D)``; float32, float16, bfloat16 (float64 on ``eager`` and ``sdpa``). Any strides.
        k, v: ``(B, Sk, Hkv, D)``, dtype and device of ``q``; ``H % Hkv == 0`` (grouped-query attention).
        rope: angles of the queries, and of the keys unless ``key_rope`` is given; None rotates nothing.
        key_rope: angles of the keys when they are other tokens than the queries (``Sq != Sk``, shared attention).
        modulations: QueryScale, BandWeight, BiasDelta, LogitGain, LogitBias, KeyBias, ValueGain; the order does not
            matter.
        key_mask: ``(B, Sk)`` bool, True = attend. A query without any key gives zeros (and ``lse = -inf``).
        plan: a prepared :func:`fastrope.plan` in place of the four arguments above. Compiled code takes a plan.
        scale: factor of the logits, ``D ** -0.5`` by default.
        return_lse: also return the log-sum-exp of the logits.
        backend: ``"auto"``, ``"triton"`` (fused; forward only), ``"sdpa"`` (any device, differentiable in q, k, v) or
            ``"eager"`` (the specification; materialises the logits). See :func:`explain`.
        plain: the attention for calls that fold into q, k and v, and for unmodulated queries that split off: a function
            like diffusers' ``dispatch_attention_fn``, ``f(query, key, value, attn_mask=None, dropout_p=0.0,
            is_causal=False, scale=None)`` on ``(B, S, H, D)``, or torch's ``"native"``, ``"cudnn"``, ``"flash"``,
            ``"efficient"`` or ``"math"``. It gets rotated and modulated q, k, v, no mask and no grouped heads. None:
            torch's, where that is faster than our loop. Calls with ``return_lse`` hand over nothing. A function that
            itself has a parameter ``return_lse``, and then returns ``(out, lse)``, ``lse (B, H, Sq)`` of natural
            logarithms, also takes biases that are the same for all queries, one call per run of keys.
        debug: check inputs and agreement with the reference on a sample of queries; None reads ``FASTROPE_DEBUG``.

    Returns:
        ``out (B, Sq, H, D)`` in the dtype of ``q``, contiguous; with ``return_lse`` also ``lse (B, H, Sq)``, natural
        log, float32 (float64 for float64 inputs).

    Numerics: softmax and accumulation in float32, rotations in float32 rounded to the input dtype.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: the backend asked for cannot run this call.
    """
    scale, modulations = scale_of(q, scale), as_tuple(modulations)
    require(debug is None or isinstance(debug, bool), "debug", "True, False or None", repr(debug))
    if torch.compiler.is_compiling():
        chosen_plain(plain, backend)
        require(not debug, "debug", "None in compiled code (call once without the compiler to check)", debug)
        plan = _plan_for_compiled(plan, rope, key_rope, modulations, key_mask)
        out, lse = _through_op(q, k, v, plan, scale, return_lse, _traceable(backend, q, k, v))
        return out if lse is None else (out, lse)
    handed = chosen_plain(plain, backend)
    if plan is None:
        check_tensors(q, k, v, backend)
    plan = _plan_for(q, k, rope, key_rope, modulations, key_mask, plan)
    check, observed = partial(check_call, q, k, v, plan.lowered, backend), ops.observed(q, k, v)
    if observed:
        check()
        decision = by_torch(choose(plan.lowered, q, k, v, backend, return_lse, handed))
    else:
        decision = decide(plan.lowered, q, k, v, backend, return_lse, handed, check)
    checked = debugging.enabled(debug)
    if checked:
        debugging.check_inputs(q, k, v, plan.resolved, scale)
    if observed and decision.kernels:
        out, lse = _through_op(q, k, v, plan, scale, return_lse, backend)
    else:
        out, lse = execute(decision, plan.lowered, q, k, v, scale, return_lse, plan.resolved)
    if checked:
        debugging.check_output(q, k, v, plan.resolved, scale, out, decision.backend)
    return out if lse is None else (out, lse)


def _through_op(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, return_lse: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    out, lse = ops.planned_attention(q, k, v, list(plan.tensors), plan.spec, scale, return_lse, backend)
    return out, lse if return_lse else None


def _traceable(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend a compiler is given: inside an op nothing says that gradients are wanted."""
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return backend
    if backend == "triton":
        raise NotImplementedError('backend="triton" is forward only: expected inputs that do not require grad')
    return "sdpa" if backend == "auto" else backend


_NOTHING = make_plan()


def _plan_for_compiled(
    plan: Plan | None, rope: RoPE | None, key_rope: RoPE | None, modulations: tuple, key_mask: Tensor | None
) -> Plan:
    """A plan reads values and so cannot be made in compiled code."""
    if plan is not None:
        return _check_alone(plan, rope, key_rope, modulations, key_mask)
    if rope is not None or key_rope is not None or len(modulations) or key_mask is not None:
        raise ValueError(
            "plan: expected a plan in compiled code, received rope, modulations or key_mask; make it outside, with "
            "fastrope.plan(...), and hand it over as attention(q, k, v, plan=plan)"
        )
    return _NOTHING


def _plan_for(
    q: Tensor,
    k: Tensor,
    rope: RoPE | None,
    key_rope: RoPE | None,
    modulations: tuple,
    key_mask: Tensor | None,
    plan: Plan | None,
) -> Plan:
    if plan is None:
        return cached_plan(rope, key_rope, modulations, key_mask, q.shape[1], k.shape[1], q.device)
    return _check_alone(plan, rope, key_rope, modulations, key_mask)


def _check_alone(
    plan: Plan, rope: RoPE | None, key_rope: RoPE | None, modulations: tuple, key_mask: Tensor | None
) -> Plan:
    require(isinstance(plan, Plan), "plan", "a Plan of fastrope.plan()", type(plan).__name__)
    arguments = dict(rope=rope, key_rope=key_rope, modulations=modulations or None, key_mask=key_mask)
    given = [name for name, x in arguments.items() if x is not None]
    if given:
        raise ValueError(f"plan: expected either a plan or what it is made of, received plan and {', '.join(given)}")
    return plan


# ---- explain ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``str()`` of it is the report.

    Args:
        decision: how the call would run, see :class:`fastrope.dispatch.Decision`.
        segments: runs of keys with one signature, in key order.
        scale_buckets: scales that queries share, other than 1; ``per_query_scales`` counts the queries with others.
        keys_reordered: True when keys are sorted by signature.
        dropped: neutral modulations.
        plan_bytes: memory of the plan's tables.
        unmodulated: queries that plain attention takes; 0 where it takes none apart.
        trust: what is known of the kernels on this card, see :mod:`fastrope.verification`; None where none run unasked.
        key_bias: True where a KeyBias counts.
        values: names of the modulations of values.
        torch_kernel: what torch's attention runs, where our kernels prepare its inputs on a GPU.
    """

    decision: Decision
    segments: tuple[Segment, ...]
    scale_buckets: tuple[float, ...]
    per_query_scales: int
    keys_reordered: bool
    dropped: int
    plan_bytes: int
    unmodulated: int = 0
    trust: str | None = None
    key_bias: bool = False
    values: tuple[str, ...] = ()
    torch_kernel: str | None = None

    @property
    def backend(self) -> str:
        """The one that would run."""
        return self.decision.backend

    @property
    def reason(self) -> str:
        """Why it would."""
        return self.decision.reason

    @property
    def rejected(self) -> tuple[tuple[str, str], ...]:
        """``(name, why)`` of the others."""
        return self.decision.rejected

    @property
    def passes(self) -> int:
        """Runs over the keys, merged by their log-sum-exps."""
        return self.decision.passes

    def __str__(self) -> str:
        decision = self.decision
        lines = [f"backend: {self.backend} ({self.reason})"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected]
        lines.append(f"segments of keys{' (sorted by signature)' if self.keys_reordered else ''}:")
        for s in self.segments:
            covers = dict(QueryScale=s.scaled, BandWeight=s.weight >= 0, BiasDelta=s.group >= 0,
                          LogitGain=s.gain >= 0, LogitBias=s.bias >= 0)  # fmt: skip
            names = [name for name, on in covers.items() if on]
            lines.append(f"  [{s.start}, {s.stop}) {' + '.join(names) or 'plain'}")
        if self.key_bias:
            lines.append("KeyBias: one number per key, for all queries")
        if self.values:
            lines.append(f"values: {' + '.join(self.values)}, folded in before attention")
        if self.scale_buckets or self.per_query_scales:
            buckets = ", ".join(["1", *(f"{r:.4g}" for r in self.scale_buckets)])
            lines.append(f"scale buckets: {buckets}; queries with per-query scales: {self.per_query_scales}")
        if decision.launch is not None:
            if decision.launch.per_query:
                lines.append(f"  these through {decision.launch.per_query}")
            lines.append(f"keys and values: through {decision.launch.loop}")
        if self.unmodulated:
            name = "torch's attention" if decision.plain is None else decision.plain.name
            lines.append(f"unmodulated queries: {self.unmodulated}, through {name}")
        if decision.packs:
            lines.append(f"prologue: kernels over {', '.join(decision.packs)}")
        if self.torch_kernel:
            lines.append(f"torch's attention: {self.torch_kernel}")
        if self.trust:
            lines.append(f"trust in the kernels: {self.trust}")
        if self.passes > 1:
            why = "one per bias" if decision.merges else "more key signatures than one launch holds"
            lines.append(f"passes: {self.passes}, merged ({why})")
        if self.dropped:
            lines.append(f"neutral modulations dropped: {self.dropped}")
        lines.append(f"plan: {self.plan_bytes / 2**20:.1f} MiB of tables")
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rope: RoPE | None = None,
    key_rope: RoPE | None = None,
    modulations: Sequence[Modulation] = (),
    key_mask: Tensor | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    plain: str | Callable | None = None,
    debug: bool | None = None,
) -> Explanation:
    """What :func:`attention` would do with the same arguments, and why; runs nothing.

    Returns:
        An :class:`Explanation`: the decision and its reasons, the segments and scale buckets found.

    Raises:
        ValueError, NotImplementedError: what :func:`attention` would raise.
    """
    modulations = as_tuple(modulations)
    scale_of(q, scale)
    check_tensors(q, k, v, backend)
    plan = _plan_for(q, k, rope, key_rope, modulations, key_mask, plan)
    lowered = plan.lowered
    check_plan(q, k, lowered)
    decision = decide(lowered, q, k, v, backend, return_lse, chosen_plain(plain, backend))
    scales = lowered.scales
    folded = {"BiasDelta": plan.resolved.value_groups, "ValueGain": plan.resolved.value_gains}
    prepared = (decision.folded or decision.split) and decision.plain is None
    return Explanation(
        decision, lowered.segments,
        scale_buckets=() if scales is None else tuple(scales.buckets.tolist()),
        per_query_scales=0 if scales is None else sum(counts[0] for counts in scales.counts),
        keys_reordered=lowered.keys.order is not None,
        dropped=max(len(modulations) - plan.resolved.modulations, 0), plan_bytes=plan.nbytes,
        unmodulated=len(lowered.unmodulated.rows) if decision.split else 0,
        trust=verification.status(decision.kind, q.device) if decision.trusted else None,
        key_bias=lowered.keys.biased,
        values=tuple(name for name, held in folded.items() if held),
        torch_kernel=kernel_name(q, k) if prepared and devices.on_gpu(q) else None,
    )  # fmt: skip
