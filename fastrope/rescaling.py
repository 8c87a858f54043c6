"""Requests of methods to a model's own positions: other frequencies, for all layers at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .checks import require
from .tokens import Site


@dataclass(frozen=True)
class Rescaling:
    """Other frequencies for the rotary embedding of a whole model.

    A pair with the angle ``phi`` rotates by ``factor * phi``, and its queries and keys are multiplied by ``gain``. So
    its share of the logits grows by ``gain ** 2``.

    Args:
        factor: one positive number per RoPE pair, ``D/2`` of them, dimensionless.
        gain: likewise.

    Raises:
        ValueError: numbers that are not positive and finite, or not as many gains as factors.
    """

    factor: tuple[float, ...]
    gain: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("factor", "gain"):
            values = tuple(float(x) for x in getattr(self, name))
            ok = len(values) > 0 and all(math.isfinite(x) and x > 0 for x in values)
            require(ok, f"Rescaling.{name}", "positive finite numbers, one per pair", values)
            object.__setattr__(self, name, values)
        require(len(self.gain) == len(self.factor), "Rescaling.gain", f"{len(self.factor)} numbers", len(self.gain))

    @property
    def neutral(self) -> bool:
        """True if nothing changes."""
        return set(self.factor) | set(self.gain) == {1.0}

    def __mul__(self, other: Rescaling) -> Rescaling:
        """Both: factors and gains multiply."""
        pairs = len(self.factor)
        require(len(other.factor) == pairs, "Rescaling.factor", f"{pairs} numbers", len(other.factor))
        return Rescaling(
            tuple(a * b for a, b in zip(self.factor, other.factor, strict=True)),
            tuple(a * b for a, b in zip(self.gain, other.gain, strict=True)),
        )


def rescales(methods: Iterable[Any]) -> bool:
    """True if some method may change positions."""
    return any(hasattr(m, "rescaling") and getattr(m, "rescales", True) for m in methods)


def rescaling_of(methods: Iterable[Any], site: Site) -> Rescaling | None:
    """The product of all methods with ``rescaling(site) -> Rescaling | None``; None if nothing changes.

    Raises:
        ValueError: a method that returns something else, or factors for another number of pairs.
    """
    found, pairs = None, sum(site.axes_dim) // 2
    for method in methods:
        if not hasattr(method, "rescaling"):
            continue
        answer, name = method.rescaling(site), f"{type(method).__name__}.rescaling"
        if answer is None:
            continue
        require(isinstance(answer, Rescaling), name, "a Rescaling or None", repr(answer))
        require(len(answer.factor) == pairs, name, f"{pairs} factors, one per pair", len(answer.factor))
        found = answer if found is None else found * answer
    return None if found is None or found.neutral else found
