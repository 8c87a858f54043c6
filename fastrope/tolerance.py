"""The one tolerance rule of the repository: tests, benchmarks and nothing else judge a result by it.

The rule is that of FlashAttention's and FlexAttention's tests: a result may be at most twice as wrong as the reference
run in the same dtype, both measured against the reference in float64 on the same inputs (drawn in the low dtype, then
promoted).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

MAX_FACTOR, MEAN_FACTOR = 2.0, 1.1
# Float64 has no wider oracle. 2**-40 leaves 12 bits for angles of hundreds of radians and for the sums; a wrong term
# shows at 1e-3 or more.
WIDE_BOUND = 2.0**-40
# Fewer rows than this say nothing of a mean: one lucky rounding of the reference and the ratio is anything.
MEAN_ROWS = 16
STANDARD_ERRORS = 4.0  # of a mean, where results are as exact as float32: see measure


@dataclass(frozen=True)
class Errors:
    """What :func:`measure` found, and what the rule allows."""

    max_out: float
    max_low: float
    mean_out: float
    mean_low: float
    max_allowed: float
    mean_allowed: float

    @property
    def passed(self) -> bool:
        """True within the rule; what is not finite never passes."""
        within = self.max_out <= self.max_allowed and self.mean_out <= self.mean_allowed
        return within and math.isfinite(self.max_out)

    def __str__(self) -> str:
        return (
            f"max {self.max_out:.3g} (reference in the low dtype {self.max_low:.3g}, allowed {self.max_allowed:.3g}), "
            f"mean {self.mean_out:.3g} (reference {self.mean_low:.3g}, allowed {self.mean_allowed:.3g})"
        )


def measure(out: torch.Tensor, exact: torch.Tensor, low: torch.Tensor, dtype: torch.dtype | None = None) -> Errors:
    """Compare ``out`` with the reference.

    ``max|out - exact| <= 2 max|low - exact| + 2 max|exact + 0.3 - 0.3 - exact|``, the last term computed in ``dtype``,
    and ``mean|out - exact| <= 1.1 mean|low - exact|``, which fewer than 16 rows are too few to judge.

    Args:
        out: what a backend gave, ``(..., n)``.
        exact: the reference in float64 on the same inputs. Where it is infinite (a log-sum-exp over no key), ``out``
            must be so too.
        low: the reference in ``dtype``.
        dtype: of the inputs; that of ``out`` unless given (a log-sum-exp is wider than the call it belongs to).

    That is all for outputs of 16 bits. Two cases lie outside of what the rule was made for:

    * Float32, where order of summation and the base of the exponential decide errors as small as the reference's own.
      Torch's plain scaled_dot_product_attention breaks the rule there (300 random calls on a CPU: largest error up to
      3.6 times the reference's, mean up to 1.23 times). Four roundings of the largest value more for the maximum; for
      the mean an eighth of a rounding, and four standard errors, since it is that of a finite sample.
    * A log-sum-exp (``dtype`` given), which is not rounded to ``dtype``: the formula of the floor is zero beyond 0.6,
      and the reference may by luck round nothing. What float32 is allowed, and an eighth of a rounding of the largest
      value in ``dtype`` for the maximum, the square of one for the mean (a product kept as two numbers).

    Raises:
        ValueError: shapes that differ, or ``exact`` is not float64.
    """
    if not out.shape == exact.shape == low.shape:
        raise ValueError(f"shapes: expected equal ones, received {out.shape}, {exact.shape}, {low.shape}")
    if exact.dtype != torch.float64:
        raise ValueError(f"exact: expected float64, received {exact.dtype}")
    dtype, out_dtype = dtype or out.dtype, out.dtype
    out, exact, low = (x.detach().double() for x in (out, exact, low))
    agreed = exact.isinf() & (out == exact)  # infinite log-sum-exps say nothing of rounding
    out, exact, low = (x.masked_fill(agreed, 0) for x in (out, exact, low))
    error, error_low = (out - exact).abs(), (low - exact).abs()
    size = max(1.0, float(exact.abs().amax()))
    if dtype == torch.float64:
        bound = WIDE_BOUND * size
        return Errors(float(error.amax()), 0.0, float(error.mean()), 0.0, bound, bound)
    rounded = exact.to(dtype)
    floor = (rounded + 0.3 - 0.3 - rounded).double().abs()
    max_allowed = MAX_FACTOR * float(error_low.amax()) + 2 * float(floor.amax())
    mean_allowed = MEAN_FACTOR * float(error_low.mean())
    # One sample a query and head: its channels share the errors of its logits.
    excess = error - MEAN_FACTOR * error_low
    samples = excess.mean(dim=-1).flatten() if excess.ndim == 4 else excess.flatten()
    if out_dtype == torch.float32:
        fine = torch.finfo(torch.float32).eps
        max_allowed += 4 * fine * size
        mean_allowed += fine / 8 * float(exact.abs().mean())
        if len(samples) > 1:
            mean_allowed += STANDARD_ERRORS * float(samples.std()) / math.sqrt(len(samples))
    if dtype != out_dtype:
        eps = torch.finfo(dtype).eps
        max_allowed, mean_allowed = max_allowed + eps / 8 * size, mean_allowed + eps**2 * size
    if len(samples) < MEAN_ROWS:
        mean_allowed = math.inf
    return Errors(
        float(error.amax()), float(error_low.amax()), float(error.mean()), float(error_low.mean()),
        max_allowed, mean_allowed,
    )  # fmt: skip
