"""torch.library ops, so that compilers, graphs and fake tensors see one opaque call.

* ``fastrope::planned_attention`` applies a lowered plan: its tensors and its spec as a string.
* ``fastrope::attention`` takes the user's own rope and modulations and lowers them at run time (a device
  synchronisation per call): what a compiled module that builds modulations on the fly turns into.

Both return ``(out, lse)``, ``lse`` empty unless asked for, and differentiate in q, k, v by recomputing through
``sdpa``. Their first lines are the same checks as outside a graph, so a wrong shape raises while tracing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .modulations import BandWeight, BiasDelta, LogitGain, QueryScale
from .planning import Plan, PlanSpec
from .planning import plan as build_plan
from .rope import RoPE

# ---- plans -----------------------------------------------------------------------------------------------------------


def plan_from(tensors: Sequence[Tensor], spec: str) -> Plan:
    """A plan as ops hand it over: ``list(plan.tensors.values())`` and ``plan.spec_string``.

    Raises:
        ValueError: another number of tensors than the spec names.
    """
    parsed = PlanSpec.from_string(spec)
    return Plan(parsed, spec, dict(zip(parsed.tensor_names, tensors, strict=True)))


def _outputs(q: Tensor, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    return out.contiguous(), q.new_empty(0, dtype=_wide(q)) if lse is None else lse.contiguous()


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _empty_outputs(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    lse = q.new_empty((batch, heads, length) if return_lse else (0,), dtype=_wide(q))
    return q.new_empty(q.shape), lse


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
    """:func:`fastrope.attention` of a plan given as ``list(plan.tensors.values())`` and ``plan.spec_string``."""
    from . import api
    from .backends import divided

    prepared = plan_from(tensors, spec)
    api.check_tensors(q, k, v, scale, backend)
    api.check_plan(q, k, prepared)
    with torch.no_grad(), api.no_autocast(q.device):
        choice = api.choose(q, k, v, prepared, backend, return_lse)
        if choice.divided:
            return _outputs(q, divided.run(q, k, v, prepared, scale), None)
        if choice.backend == "triton":
            return _outputs(q, *api.triton.run(q, k, v, prepared, scale, return_lse))
        if choice.folded:
            return _outputs(q, api.folded.run(q, k, v, prepared, scale), None)
        return _outputs(q, *api.sdpa.run(q, k, v, prepared, scale, return_lse))


@planned_attention.register_fake
def _(q, k, v, tensors, spec, scale, return_lse, backend):
    from . import api

    api.check_tensors(q, k, v, scale, backend)
    api.check_plan(q, k, plan_from(tensors, spec))
    return _empty_outputs(q, return_lse)


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
    return _recompute_gradients(grad_out, grad_lse, q, k, v, plan_from(tensors, spec), scale)


@planned_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, tensors, spec, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _recompute_gradients(grad_out, grad_lse, q, k, v, prepared: Plan, scale: float):
    from .backends import sdpa

    def forward(q, k, v):
        out, lse = sdpa.run(q, k, v, prepared, scale, return_lse=grad_lse is not None)
        return (out,) if grad_lse is None else (out, lse)

    # Inside an op autograd's own recording is off whatever the grad mode; functional transforms still record.
    _, pull_back = torch.func.vjp(forward, q, k, v)
    found = pull_back((grad_out,) if grad_lse is None else (grad_out, grad_lse))
    return tuple(torch.empty_like(x).copy_(g) for x, g in zip((q, k, v), found, strict=True))


def _planned_setup(ctx, inputs, output):
    q, k, v, tensors, ctx.spec, ctx.scale, ctx.return_lse, _ = inputs
    ctx.save_for_backward(q, k, v, *tensors)


def _planned_backward(ctx, grad_out, grad_lse):
    q, k, v, *tensors = ctx.saved_tensors
    grad_lse = grad_lse if ctx.return_lse else None
    grads = planned_attention_backward(grad_out, grad_lse, q, k, v, tensors, ctx.spec, ctx.scale)
    return *grads, [None] * len(tensors), None, None, None, None


planned_attention.register_autograd(_planned_backward, setup_context=_planned_setup)


def apply_plan(q, k, v, prepared: Plan, scale: float, return_lse: bool, backend: str):
    """:func:`planned_attention` for a :class:`Plan`."""
    tensors = list(prepared.tensors.values())
    return planned_attention(q, k, v, tensors, prepared.spec_string, scale, return_lse, backend)


# ---- raw arguments ---------------------------------------------------------------------------------------------------
# A call is encoded as tensors, numbers and a string of constants: one entry per object, in order.


class _Encoder:
    def __init__(self):
        self.tensors, self.ints, self.floats, self.words = [], [], [], []

    def tensor(self, x) -> str:
        self.tensors.append(x)
        return "t"

    def number(self, x) -> str:
        if isinstance(x, torch.Tensor):
            return self.tensor(x)
        self.floats.append(float(x))
        return "f"

    def keys(self, keys) -> str:
        if not isinstance(keys, slice):
            return self.tensor(keys)
        code = "s"
        for bound in (keys.start, keys.stop, keys.step):
            if bound is None:
                code += "n"
            else:
                self.ints.append(bound)
                code += "i"
        return code

    def rope(self, name: str, rope: RoPE | None) -> None:
        if rope is not None:
            self.tensor(rope.angles)
            axis = "-" if rope.axis is None else self.tensor(rope.axis)
            self.words.append(f"{name} {axis} {rope.pairing} {int(rope.applied)}")

    def modulation(self, m) -> None:
        if isinstance(m, QueryScale):
            axes = "all" if m.axes is None else ",".join([str(a) for a in m.axes])
            self.words.append(f"scale {self.tensor(m.scale)} {self.keys(m.keys)} {axes}")
        elif isinstance(m, BandWeight):
            self.words.append(f"weight {self.tensor(m.weight)} {self.keys(m.keys)}")
        elif isinstance(m, BiasDelta):
            self.words.append(f"group {self.number(m.bias)} {self.number(m.delta)} {self.keys(m.keys)}")
        elif isinstance(m, LogitGain):
            self.words.append(f"gain {self.tensor(m.gain)} {self.keys(m.keys)}")
        else:
            expected = "QueryScale, BandWeight, BiasDelta or LogitGain"
            raise ValueError(f"modulations: expected {expected}, received {type(m)}")


def _decode(tensors, ints, floats, layout: str) -> dict:
    tensors, ints, floats = iter(tensors), iter(ints), iter(floats)

    def keys(code: str):
        if code == "t":
            return next(tensors)
        return slice(*(next(ints) if c == "i" else None for c in code[1:]))

    def number(code: str):
        return next(tensors) if code == "t" else next(floats)

    call: dict = {"modulations": []}
    for entry in layout.split(";") if layout else ():
        kind, *words = entry.split(" ")
        if kind in ("rope", "key_rope"):
            angles = next(tensors)
            axis = next(tensors) if words[0] == "t" else None
            call[kind] = RoPE(angles, axis, words[1], words[2] == "1")
        elif kind == "mask":
            call["key_mask"] = next(tensors)
        elif kind == "scale":
            axes = None if words[2] == "all" else tuple(int(a) for a in words[2].split(","))
            call["modulations"].append(QueryScale(next(tensors), keys(words[1]), axes))
        elif kind == "weight":
            call["modulations"].append(BandWeight(next(tensors), keys(words[1])))
        elif kind == "group":
            call["modulations"].append(BiasDelta(number(words[0]), number(words[1]), keys(words[2])))
        else:
            call["modulations"].append(LogitGain(next(tensors), keys(words[1])))
    return call


def _lower(q, k, tensors, ints, floats, layout: str) -> Plan:
    call = _decode(tensors, ints, floats, layout)
    return build_plan(**call, num_queries=q.shape[1], num_keys=k.shape[1], device=q.device)


def _check_call(q, k, call: dict) -> None:
    """What can be checked from shapes alone, for tracing."""
    from .resolve import check_arguments, lengths

    tokens = call.get("rope"), call.get("key_rope"), call["modulations"], call.get("key_mask")
    check_arguments(*tokens, values=False)
    lengths(*tokens, q.shape[1], k.shape[1])


@torch.library.custom_op("fastrope::attention", mutates_args=())
def raw_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    layout: str,
    scale: float,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`fastrope.attention` with its rope and modulations encoded as tensors, numbers and a layout string."""
    from . import api

    api.check_tensors(q, k, v, scale, backend)
    prepared = _lower(q, k, tensors, ints, floats, layout)
    with torch.no_grad():
        result = api.run_plan(q, k, v, prepared, scale, return_lse, backend, None)
    return _outputs(q, *(result if return_lse else (result, None)))


@raw_attention.register_fake
def _(q, k, v, tensors, ints, floats, layout, scale, return_lse, backend):
    from . import api

    api.check_tensors(q, k, v, scale, backend)
    _check_call(q, k, _decode(tensors, ints, floats, layout))
    return _empty_outputs(q, return_lse)


@torch.library.custom_op("fastrope::attention_backward", mutates_args=())
def raw_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    layout: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`raw_attention` in q, k, v."""
    prepared = _lower(q, k, tensors, ints, floats, layout)
    return _recompute_gradients(grad_out, grad_lse, q, k, v, prepared, scale)


@raw_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, tensors, ints, floats, layout, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _raw_setup(ctx, inputs, output):
    q, k, v, tensors, ctx.ints, ctx.floats, ctx.layout, ctx.scale, ctx.return_lse, _ = inputs
    ctx.save_for_backward(q, k, v, *tensors)


def _raw_backward(ctx, grad_out, grad_lse):
    q, k, v, *tensors = ctx.saved_tensors
    grad_lse = grad_lse if ctx.return_lse else None
    grads = raw_attention_backward(grad_out, grad_lse, q, k, v, tensors, ctx.ints, ctx.floats, ctx.layout, ctx.scale)
    return *grads, [None] * len(tensors), None, None, None, None, None, None


raw_attention.register_autograd(_raw_backward, setup_context=_raw_setup)


def traced_attention(q, k, v, rope, key_rope, modulations, key_mask, plan, scale, return_lse, backend):
    """What a compiler traces for :func:`fastrope.attention`: encoding, then one op."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if backend == "triton":
            raise NotImplementedError('backend="triton" is forward only: expected inputs that do not require grad')
        backend = "sdpa" if backend == "auto" else backend  # as outside a graph
    if plan is not None:
        if backend == "eager":  # it reads the modulations as given, and a graph carries only their lowered form
            raise NotImplementedError('backend="eager" cannot run a compiled plan: expected "sdpa", "triton" or "auto"')
        if rope is not None or key_rope is not None or len(modulations) or key_mask is not None:
            raise ValueError("plan: expected either a plan or what it is made of, received both")
        out, lse = apply_plan(q, k, v, plan, scale, return_lse, backend)
        return (out, lse) if return_lse else out
    code = _Encoder()
    code.rope("rope", rope)
    code.rope("key_rope", key_rope)
    if key_mask is not None:
        code.tensor(key_mask)
        code.words.append("mask")
    for m in modulations:
        code.modulation(m)
    layout = ";".join(code.words)
    out, lse = raw_attention(q, k, v, code.tensors, code.ints, code.floats, layout, scale, return_lse, backend)
    return (out, lse) if return_lse else out
