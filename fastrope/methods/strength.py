"""How strongly reference pictures and words count, and how sharp attention is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real

from ..activity import Indices
from ..checks import require
from ..modulations import LogitBias
from ..tokens import Site, TokenLayout
from .per_reference import Dial, checked_dial, checked_references, for_each, present, require_reference, values_of
from .schedules import Activity, Steps


@dataclass(frozen=True)
class ReferenceStrength:
    """How strongly each reference picture counts: ``s_ij <- s_ij + log w`` for the keys ``j`` of a picture and all
    queries ``i`` (the strength of a guide in ComfyUI).

    With weight 2, every token of the picture counts as two copies of it. GRAG changes how attention is spread inside a
    picture; this method changes how much of it goes to the picture as a whole.

    Args:
        weight: ``w``, dimensionless, at least 0: a number, a schedule, or a list with one of these per reference. 1 is
            neutral and modulates nothing; 0 hides the picture.
        references: indices of the reference pictures; None means all.
        layers: indices of the attention layers where the method acts, as in :class:`fastrope.At`; None means all.
        steps: step indices likewise, or two floats ``(start, stop)``, fractions of the run; None means all.

    Raises:
        ValueError: naming the argument, what was expected and what came; in :meth:`modulations` also, unless neutral, a
            sequence without a reference, or without one of ``references``.
    """

    weight: Dial
    references: Sequence[int] | None = None
    layers: Indices | None = None
    steps: Steps = None
    _active: Activity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        weight = checked_dial("ReferenceStrength.weight", self.weight)
        _require_weights("ReferenceStrength.weight", [w for w in _listed(weight) if isinstance(w, Real)])
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "references", checked_references("ReferenceStrength.references", self.references))
        object.__setattr__(self, "_active", Activity(self.layers, self.steps))

    def modulations(self, site: Site) -> list[LogitBias]:
        """One :class:`fastrope.LogitBias` per reference that is not neutral. Equal values give the same objects."""
        if site not in self._active:
            return []
        name = "ReferenceStrength.weight"
        weights = values_of(name, self.weight, site)
        _require_weights(name, weights)
        if set(weights) == {1.0}:
            return []
        require_reference("ReferenceStrength", site.tokens)
        chosen = present("ReferenceStrength", site.tokens, self.references)
        each = for_each(name, self.weight, weights, len(chosen))
        return list(_weighted(site.tokens, tuple(zip(chosen, each, strict=True))))


def _listed(value: Dial) -> Sequence:
    return value if isinstance(value, Sequence) else (value,)


def _require_weights(name: str, weights: Sequence) -> None:
    for weight in weights:
        require(weight >= 0, name, "a weight of at least 0", weight)


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf


@lru_cache(maxsize=512)
def _weighted(tokens: TokenLayout, weights: tuple[tuple[int, float], ...]) -> tuple[LogitBias, ...]:
    """Cached, because a binding reuses its plan for the same objects."""
    return tuple(LogitBias(_log(w), keys=tokens.reference(i)) for i, w in weights if w != 1.0)
