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
# The mean is a statistic of a finite sample, so a row's excess counts from four standard errors on. With 1000 rows
# that is about 8 % of the mean error, and pooled over many calls it vanishes.
STANDARD_ERRORS = 4.0


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
    and ``mean|out - exact| <= 1.1 mean|low - exact|``.

    Args:
        out: what a backend gave, ``(..., n)``.
        exact: the reference in float64 on the same inputs. Where it is infinite (a log-sum-exp over no key), ``out``
            must be so too.
        low: the reference in ``dtype``.
        dtype: of the inputs; that of ``out`` unless given (a log-sum-exp is wider than the call it belongs to).

    Allowances. Float32: four roundings of the largest value for the maximum, the same floor and one rounding of the
    mean value for the mean, since an order of summation, or a softmax in base 2, decides errors this small. All
    dtypes: four standard errors of the mean, the rows along the last axis being the samples. With ``dtype`` given,
    the formula of the floor is zero beyond 0.6 and the reference may round nothing to ``dtype``, so the maximum may
    be off by two roundings of the largest value in ``dtype``, the mean by the square of one (a product kept as two
    such numbers).

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
    eps, rounded = torch.finfo(dtype).eps, exact.to(dtype)
    floor = (rounded + 0.3 - 0.3 - rounded).double().abs()
    max_allowed = MAX_FACTOR * float(error_low.amax()) + 2 * float(floor.amax())
    mean_allowed = MEAN_FACTOR * float(error_low.mean()) + _chance(error - MEAN_FACTOR * error_low)
    if dtype == torch.float32:
        max_allowed += 4 * eps * size
        mean_allowed += 2 * float(floor.mean()) + eps * float(exact.abs().mean())
    elif out_dtype != dtype:
        max_allowed, mean_allowed = max_allowed + 2 * eps * size, mean_allowed + eps**2 * size
    return Errors(
        float(error.amax()), float(error_low.amax()), float(error.mean()), float(error_low.mean()),
        max_allowed, mean_allowed,
    )  # fmt: skip


def _chance(excess: torch.Tensor) -> float:
    """What a mean may exceed its expectation by. One sample a query: its channels share the errors of its logits."""
    rows = excess.mean(dim=-1).flatten() if excess.ndim == 4 else excess.flatten()
    return STANDARD_ERRORS * float(rows.std()) / math.sqrt(len(rows)) if len(rows) >= MEAN_ROWS else math.inf
