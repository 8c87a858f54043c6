"""Debug mode: turn a black picture into an error that names the argument.

Enabled by ``FASTROPE_DEBUG=1`` or ``debug=True``. Every check synchronises with the device; not for production.
"""

from __future__ import annotations

import os

import torch

from .checks import require

SAMPLE = 16  # queries compared with the reference, spread evenly


def enabled(argument: bool | None) -> bool:
    """The argument if given, else the environment."""
    return os.environ.get("FASTROPE_DEBUG", "0") not in ("", "0") if argument is None else argument


def check_inputs(q, k, v, plan, scale: float) -> None:
    """Require finite, sane inputs.

    Raises:
        ValueError: naming the argument and the first offending index. Masked keys and values may hold anything.
    """
    mask = plan.key_mask
    for name, x in (("q", q), ("k", k), ("v", v)):
        if mask is not None and name != "q":
            x = x.masked_fill(~mask[:, :, None, None], 0)
        _finite(name, x)
    for rope, name in ((plan.rope, "rope.angles"), (plan.key_rope, "key_rope.angles")):
        if rope is not None:
            _finite(name, rope.angles)
    mods = plan.resolved
    if mods.scale is not None:
        _finite("QueryScale.scale", mods.scale.r)
    for m in mods.weights:
        _finite("BandWeight.weight", m.w)
    for m in mods.groups:
        _finite("BiasDelta.bias", m.bias)
        _finite("BiasDelta.delta", m.delta)
    for m in mods.gains:
        _finite("LogitGain.gain", m.g)
    largest = float(q.abs().amax().double() * k.abs().amax().double()) * q.shape[-1] * abs(scale)
    require(largest < torch.finfo(torch.float32).max, "q, k", "logits within float32", f"up to {largest:.3g}")


def check_output(q, k, v, plan, scale: float, out, backend: str) -> None:
    """Compare a sample of queries with the reference in float64 and in the input dtype.

    Raises:
        RuntimeError: the backend disagrees with the specification by more than four times the error of the input dtype
            (this is a bug of fastrope: please report it), or the output is not finite.
    """
    from .backends import eager

    if not bool(out.isfinite().all()):
        raise RuntimeError(f"backend {backend}: output is not finite although the inputs are (overflow in {q.dtype}?)")
    rows = torch.linspace(0, q.shape[1] - 1, min(SAMPLE, q.shape[1]), device=q.device).long().unique()
    wide = torch.float32 if q.device.type == "mps" else torch.float64
    exact, _ = eager.run(q.to(wide), k.to(wide), v.to(wide), plan, scale, queries=rows)
    low, _ = eager.run(q, k, v, plan, scale, queries=rows)
    error = (out[:, rows].to(wide) - exact).abs().amax()
    floor = 4 * torch.finfo(q.dtype).eps * exact.abs().amax()
    allowed = 4 * (low.to(wide) - exact).abs().amax() + floor
    if error > allowed:
        raise RuntimeError(f"backend {backend} disagrees with the reference: error {error:.3g}, allowed {allowed:.3g}")


def _finite(name: str, x: torch.Tensor) -> None:
    bad = ~x.isfinite()
    if bool(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name}: expected finite values, received {x[index].item()} at index {index}")
