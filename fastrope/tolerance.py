"""The one tolerance rule of the repository, for tests and benchmarks.

It is the rule of FlashAttention's and FlexAttention's tests: the error of a result may be at most twice the error of
the reference in the same dtype. Both are measured against the reference in float64 on the same inputs (drawn in the low
dtype, then promoted).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

MAX_FACTOR, MEAN_FACTOR = 2.0, 1.1
# Float64 has no wider oracle. 2**-40 leaves 12 bits for angles of hundreds of radians and for the sums; a wrong term
# shows at 1e-3 or more.
WIDE_BOUND = 2.0**-40
# A mean over fewer rows is no measure: one lucky rounding of the reference, and the ratio can have any value.
MEAN_ROWS = 16
STANDARD_ERRORS = 4.0  # of a mean, for results in float32: see measure


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
        """True within the rule. A result that is not finite never passes."""
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
    and, for at least 16 rows, ``mean|out - exact| <= 1.1 mean|low - exact|``.

    Args:
        out: the output of a backend, ``(..., n)``.
        exact: the reference in float64 on the same inputs. If it is infinite (a log-sum-exp over no key), ``out`` must
            be infinite, too.
        low: the reference in ``dtype``.
        dtype: of the inputs; None: that of ``out`` (a log-sum-exp has a wider dtype than its call).

    For outputs of 16 bits this is all. The rule was not made for two other cases, which are allowed more:

    * Float32: errors are as small as the reference's own, and depend on the order of summation and the base of the
      exponential. Torch's plain scaled_dot_product_attention breaks the rule (300 random calls on a CPU: largest error
      up to 3.6 times the reference's, mean up to 1.23 times). Allowed in addition: for the maximum, four roundings of
      the largest value; for the mean, an eighth of a rounding and four standard errors, because the sample is finite.
    * A log-sum-exp (``dtype`` given) is not rounded to ``dtype``. The formula of the floor is zero above 0.6, and the
      reference may by luck have no rounding error. Allowed in addition: what float32 is allowed; for the maximum, an
      eighth of a rounding of the largest value in ``dtype``; for the mean, the square of that rounding (a product held
      as two numbers).

    Raises:
        ValueError: shapes that differ, or ``exact`` is not float64.
    """
    if not out.shape == exact.shape == low.shape:
        raise ValueError(f"shapes: expected equal ones, received {out.shape}, {exact.shape}, {low.shape}")
    if exact.dtype != torch.float64:
        raise ValueError(f"exact: expected float64, received {exact.dtype}")
    dtype, out_dtype = dtype or out.dtype, out.dtype
    out, exact, low = (x.detach().double() for x in (out, exact, low))
    agreed = exact.isinf() & (out == exact)  # infinite log-sum-exps have no rounding
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
    # One sample per query and head, because all channels share the errors of the logits.
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
