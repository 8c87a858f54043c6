"""What the methods of a handle ask of one attention layer: modulations, and what it takes from a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import fastrope as fr
from fastrope.activity import sharings_of
from fastrope.checks import require
from fastrope.modulations import MODULATIONS, Modulation
from fastrope.sharing import SHARED, Sharing


class LayerRequest(NamedTuple):
    """Modulations, and sharings as :func:`combine` gives them; both empty where a layer stays as it is."""

    modulations: tuple[Modulation, ...] = ()
    sharings: tuple[Sharing, ...] = ()

    @classmethod
    def of(cls, methods: Sequence, site: fr.Site) -> LayerRequest:
        """All that methods ask for at a site.

        Raises:
            ValueError: a method whose modulations are none, or two methods that both normalise the target.
        """
        return cls(tuple(ask(methods, site)), combine(sharings_of(methods, site)))

    @property
    def shares(self) -> bool:
        """Whether the layer's target sees the shared reference."""
        return shares(self.sharings)


def ask(methods: Sequence, site: fr.Site) -> list[Modulation]:
    """All modulations at a site.

    Raises:
        ValueError: a method that returns something else than a list of modulations.
    """
    found = []
    for method in methods:
        if isinstance(method, MODULATIONS):
            found.append(method)
            continue
        answer = method.modulations(site)
        if not (isinstance(answer, (list, tuple)) and all(isinstance(m, MODULATIONS) for m in answer)):
            raise ValueError(
                f"{type(method).__name__}.modulations: expected a list of modulations, received {answer!r}"
            )
        found.extend(answer)
    return found


def combine(sharings: Sequence[Sharing]) -> tuple[Sharing, ...]:
    """What all methods together ask of a layer.

    Raises:
        ValueError: two methods that both normalise the target.
    """
    normalising = sum(s.adain > 0 for s in sharings)
    require(normalising <= 1, "adain", "one method with adain above 0 per layer and step", normalising)
    return tuple(dict.fromkeys(sharings))


def shares(sharings: Sequence[Sharing]) -> bool:
    """Whether a layer's target sees the shared reference."""
    return any(s.reference == SHARED for s in sharings)
