"""Debug mode: an error that names the argument, in place of a black picture.

It is enabled by ``FASTROPE_DEBUG=1`` or ``debug=True``. Before a call, everything that the call reads must be finite
and in range. After it, the output must be finite, and a sample of the user's queries is compared with the reference.
Every check waits for the device, so it is slow. Compiled code and captured graphs run no checks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import reference
from .checks import first_not_finite, require, require_finite
from .device import switched_on, widest_float
from .planning import Resolved
from .planning.resolved import Group

SAMPLE = 16  # queries compared with the reference, spread evenly
LOW_PRECISION_SLACK = 4  # times the error of the reference in the input dtype, as backends round in other places
EXACT_SLACK = 1e-10  # of the largest value, for float64, where there is no error of the reference to compare with
ANGLE_ROUNDING = 0.1  # radians: if neighbouring numbers are further apart than this, angles do not tell positions


def enabled(argument: bool | None) -> bool:
    """The argument, or if it is None the environment variable."""
    return switched_on("FASTROPE_DEBUG", default=False) if argument is None else argument


def check_inputs(q: Tensor, k: Tensor, v: Tensor, resolved: Resolved, scale: float) -> None:
    """Require that everything a call reads is finite and in range. Masked keys and values may have any values;
    modulations were checked with the plan.

    Args:
        q, k, v: ``(B, Sq, H, D)``, ``(B, Sk, Hkv, D)`` twice.
        resolved: what the user asked for.
        scale: factor of the logits.

    Raises:
        ValueError: naming the argument, what was expected, what came and where.
    """
    q, k, v = q.detach(), k.detach(), v.detach()
    mask = resolved.present
    if mask is not None:
        k, v = (x.masked_fill(~mask[:, :, None, None], 0) for x in (k, v))
    for name, x, token in (("q", q, "query"), ("k", k, "key"), ("v", v, "key")):
        require_finite(name, x, ("batch row", token, "head", "channel"))
    for name, rope in (("rope.angles", resolved.rope), ("key_rope.angles", resolved.key_rope)):
        if rope is not None:
            require_finite(name, rope.angles, ("batch row", "token", "pair"))
            _distinct_angles(name, rope.angles)
    _check_ranges(q, k, v, resolved, scale)


def check_output(q: Tensor, k: Tensor, v: Tensor, resolved: Resolved, scale: float, out: Tensor, backend: str) -> None:
    """Require a finite output that agrees with the reference on a sample of queries.

    Raises:
        RuntimeError: the output is not finite although the inputs are, or the backend disagrees with the specification
            by more than rounding explains (that is a bug of fastrope: please report it).
    """
    bad = first_not_finite(out, ("batch row", "query", "head", "channel"))
    if bad:
        raise RuntimeError(
            f"backend {backend}: expected a finite output for finite inputs, received {bad} (overflow in {q.dtype}?)"
        )
    error, allowed = deviation(q, k, v, resolved, scale, out)
    if not error <= allowed:
        raise RuntimeError(
            f"backend {backend} disagrees with the reference on a sample of queries: expected an error of at most "
            f"{allowed:.3g}, received {error:.3g}; please report it with the output of fastrope doctor"
        )


def deviation(q: Tensor, k: Tensor, v: Tensor, resolved: Resolved, scale: float, out: Tensor) -> tuple[float, float]:
    """Largest error of ``out (B, Sq, H, D)`` against the float64 reference on a sample of queries, and what is allowed.

    Allowed is a multiple of the error that the reference itself makes in the input dtype. On devices without float64
    the reference runs in float32.
    """
    rows = _sample(q.shape[1], resolved, q.device)
    wide = widest_float(q.device)
    with torch.no_grad():
        exact, _ = reference.run(q.to(wide), k.to(wide), v.to(wide), resolved, scale, queries=rows)
        error = float((out[:, rows].to(wide) - exact).abs().amax())
        if q.dtype == torch.float64:
            values = v if resolved.present is None else v.masked_fill(~resolved.present[:, :, None, None], 0)
            return error, EXACT_SLACK * float(values.abs().amax())
        low, _ = reference.run(q, k, v, resolved, scale, queries=rows)
        rounding = float((low.to(wide) - exact).abs().amax())
        floor = torch.finfo(q.dtype).eps * float(exact.abs().amax())
    return error, LOW_PRECISION_SLACK * (rounding + floor)


def _sample(num_queries: int, resolved: Resolved, device: torch.device) -> Tensor:
    """Queries spread evenly, and those with the most extreme scales and gains, ``(n,)``."""
    rows = [torch.linspace(0, num_queries - 1, min(SAMPLE, num_queries), device="cpu").long()]
    scales = [] if resolved.scale is None else [resolved.scale.r]
    for values in [*scales, *(m.g for m in resolved.gains), *(m.b for m in resolved.biases)]:
        rows += [values.argmin(dim=1).cpu(), values.argmax(dim=1).cpu()]
    return torch.cat(rows).unique().to(device)


# ---- ranges ---------------------------------------------------------------------------------------------------------


def _distinct_angles(name: str, angles: Tensor) -> None:
    largest = float(angles.abs().amax())
    limit = ANGLE_ROUNDING / torch.finfo(angles.dtype).eps
    expected = f"angles below {limit:.3g} rad, up to where {angles.dtype} tells positions apart"
    require(largest < limit, name, expected, f"{largest:.3g}")


def _check_ranges(q: Tensor, k: Tensor, v: Tensor, resolved: Resolved, scale: float) -> None:
    """Require logits within the accumulator, modulated keys and values within the input dtype, by bounds on norms.

    The norm of a token bounds each of its channels under any rotation, and two norms bound a logit.
    """
    wide = widest_float(q.device)
    accumulator = torch.promote_types(q.dtype, torch.float32)
    logits, keys = f"logits within {accumulator}", f"modulated keys within {k.dtype}"
    query, key = (float(x.to(wide).norm(dim=-1).amax()) for x in (q, k))
    logit = _within("q, k", logits, query * key, accumulator)
    logit = _within("scale", logits, logit * max(abs(scale), 1.0), accumulator)
    groups = "BiasDelta.bias, BiasDelta.delta"
    factors = [(groups, _spread(m), True) for m in resolved.key_groups]
    factors += [("BandWeight.weight", m.w.abs(), True) for m in resolved.weights]
    factors += [("LogitGain.gain", m.g.abs(), False) for m in resolved.gains]
    for name, values, on_keys in factors:
        factor = max(float(values.amax()), 1.0)  # keys outside the set keep theirs
        if on_keys:
            key = _within(name, keys, key * factor, k.dtype)
        logit = _within(name, logits, logit * factor, accumulator)
    biases = [("LogitBias.bias", m.b) for m in resolved.biases] + [("KeyBias.bias", x) for x in resolved.key_biases]
    for name, values in biases:
        logit = _within(
            name, logits, logit + float(values.masked_fill(values == -torch.inf, 0).abs().amax()), accumulator
        )
    value = float(v.to(wide).norm(dim=-1).amax())
    factors = [(groups, _spread(m)) for m in resolved.value_groups] + [
        ("ValueGain.gain", u) for u in resolved.value_gains
    ]
    for name, values in factors:
        value = _within(
            name, f"modulated values within {v.dtype}", value * max(float(values.abs().amax()), 1.0), v.dtype
        )


def _spread(group: Group) -> Tensor:
    """How much a BiasDelta may multiply the largest norm of its group by."""
    return (group.bias - group.delta).abs() + group.delta.abs()


def _within(name: str, expected: str, bound: float, dtype: torch.dtype) -> float:
    require(bound <= torch.finfo(dtype).max, name, expected, f"values that may reach {bound:.3g}")
    return bound
