"""What the methods of a handle request for one attention layer: modulations, and what to take from a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import fastrope as fr
from fastrope.activity import sharings_of
from fastrope.checks import require
from fastrope.modulations import MODULATIONS, Modulation
from fastrope.sharing import SHARED, Sharing


class LayerRequest(NamedTuple):
    """Modulations and sharings of one layer. Both are empty for a layer that stays as it is."""

    modulations: tuple[Modulation, ...] = ()
    sharings: tuple[Sharing, ...] = ()

    @classmethod
    def of(cls, methods: Sequence, site: fr.Site) -> LayerRequest:
        """What all methods request at a site.

        Raises:
            ValueError: a method that returns something else than a list of modulations, or two methods that both
                normalise the target.
        """
        modulations = [m for method in methods for m in _modulations_of(method, site)]
        sharings = sharings_of(methods, site)
        normalising = sum(s.adain > 0 for s in sharings)
        require(normalising <= 1, "adain", "one method with adain above 0 per layer and step", normalising)
        return cls(tuple(modulations), tuple(dict.fromkeys(sharings)))

    @property
    def shares(self) -> bool:
        """True if the layer's target attends to the shared reference."""
        return any(s.reference == SHARED for s in self.sharings)


def _modulations_of(method: Any, site: fr.Site) -> Sequence[Modulation]:
    if isinstance(method, MODULATIONS):
        return [method]
    found = method.modulations(site)
    listed = isinstance(found, (list, tuple)) and all(isinstance(m, MODULATIONS) for m in found)
    require(listed, f"{type(method).__name__}.modulations", "a list of modulations", repr(found))
    return found
