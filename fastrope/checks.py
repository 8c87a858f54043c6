"""Checks of arguments, with one form of error message. They raise real exceptions, which ``python -O`` keeps."""

from __future__ import annotations

import contextlib
import operator
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, overload

import torch


@overload
def require(condition: Literal[False], argument: str, expected: object, received: object) -> NoReturn: ...
@overload
def require(condition: bool, argument: str, expected: object, received: object) -> None: ...
def require(condition: bool, argument: str, expected: object, received: object) -> None:
    """Raise ``ValueError`` naming the argument, what was expected and what came, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, received {received}")


def is_whole(value: object) -> bool:
    """True for integers, False for bools."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def whole_slice(argument: str, value: slice) -> slice:
    """The slice with Python integers for bounds. A tensor as a bound could change in place and compares by identity, so
    its present value counts.

    Raises:
        ValueError: a bound that is no whole number.
    """

    def whole(bound: Any) -> int | None:
        if bound is None:
            return None
        if not isinstance(bound, bool) and getattr(bound, "dtype", None) != torch.bool:
            with contextlib.suppress(TypeError):
                return operator.index(bound)
        raise ValueError(f"{argument}: expected a slice of whole numbers, received {value}")

    return slice(*(whole(bound) for bound in (value.start, value.stop, value.step)))


def require_tensor(argument: str, value: Any, ndim: tuple[int, ...], shape_hint: str) -> None:
    """Require a ``torch.Tensor`` of one of the given ranks."""
    require(isinstance(value, torch.Tensor), argument, f"a torch.Tensor {shape_hint}", type(value).__name__)
    require(value.ndim in ndim, argument, f"shape {shape_hint}", tuple(value.shape))


def require_finite(name: str, x: torch.Tensor, dims: tuple[str, ...]) -> None:
    """Require finite values; the message locates the first other one. ``dims`` name the last dimensions of ``x``."""
    bad = first_not_finite(x, dims)
    if bad:
        raise ValueError(f"{name}: expected finite values, received {bad}")


def require_bias(name: str, x: torch.Tensor, dims: tuple[str, ...]) -> None:
    """As :func:`require_finite`, but ``-inf`` is allowed."""
    bad = _first(x, x.isnan() | (x == float("inf")), dims, "neither finite nor -inf")
    if bad:
        raise ValueError(f"{name}: expected finite values or -inf, which hides, received {bad}")


def first_not_finite(x: torch.Tensor, dims: tuple[str, ...]) -> str | None:
    """A description of the first value that is not finite; None if all are. ``dims`` name the last dimensions of
    ``x``."""
    return _first(x, ~x.isfinite(), dims, "not finite")


def _first(x: torch.Tensor, bad: torch.Tensor, dims: tuple[str, ...], what: str) -> str | None:
    count = int(bad.sum())
    if not count:
        return None
    index = bad.nonzero()[0].tolist()
    place = zip(dims[len(dims) - x.ndim :], index, x.shape, strict=True)
    where = ", ".join(f"{dim} {i}" for dim, i, size in place if size > 1) or "index 0"
    return f"{x[tuple(index)].item()} at {where} ({count} of {x.numel()} values are {what})"
