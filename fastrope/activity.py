"""In which layers, steps and blocks of a run a method is active."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from .checks import require, whole_slice
from .guidance import Guidance, guidance_of
from .modulations import MODULATIONS, Modulation
from .rescaling import Rescaling, rescales, rescaling_of
from .tokens import KINDS, Site

Indices = slice | range | int | Collection[int]


@dataclass(frozen=True, eq=False)
class Where:
    """Some layers, steps and kinds of block; see :class:`At`."""

    layers: Indices | None = None
    steps: Indices | None = None
    kinds: str | Collection[str] | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "steps"):
            value = getattr(self, name)
            several = (value,) if isinstance(value, int) else value
            if isinstance(value, slice):
                object.__setattr__(self, name, whole_slice(name, value))
            ok = value is None or isinstance(value, slice)
            if not ok and isinstance(several, Collection) and not isinstance(several, (str, bytes)):
                ok = all(isinstance(n, int) and not isinstance(n, bool) for n in several)
            require(ok, name, "a slice, a range, an integer or a set of integers", repr(value))
        if self.kinds is not None:
            kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds)
            require(all(kind in KINDS for kind in kinds), "kinds", f"some of {KINDS}", kinds)
            object.__setattr__(self, "kinds", kinds)

    def __contains__(self, site: Site) -> bool:
        """True if the site is among them.

        Raises:
            ValueError: the model has none of these layers or kinds of block, so the method would never act.
        """
        require(_meets(self.layers, site.num_layers), "layers", f"some of the model's {site.num_layers} layers",
                repr(self.layers))  # fmt: skip
        absent = bool(self.kinds) and bool(site.kinds) and not set(self.kinds) & set(site.kinds)
        require(not absent, "kinds", f"some of the model's kinds of block, {site.kinds}", self.kinds)
        inside = _among(self.layers, site.layer, site.num_layers) and _among(self.steps, site.step, site.num_steps)
        return inside and (self.kinds is None or site.kind in self.kinds)


@dataclass(frozen=True, eq=False, init=False)
class At:
    """Confines modulations and methods to some layers, steps and kinds of block. It is a method itself.

    Args:
        what: modulations, objects with ``modulations(site) -> list``, or lists of these.
        layers: indices of attention calls, in order of execution: a slice, a range, one integer or a set of integers.
            Negative ones count from the last layer, as in a list. None means all. If the model has none of them, its
            first call raises an error.
        steps: indices of denoising steps, likewise.
        kinds: ``"double"``, ``"single"`` or ``"joint"``, or several; see :class:`fastrope.Site`. None means all. If the
            model has none of them, its first call raises an error.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Example: ``fr.At(fr.BiasDelta(delta=1.2, keys=reference), layers=slice(19, None), steps=range(10))``.
    """

    what: tuple
    where: Where

    def __init__(
        self,
        *what: Any,
        layers: Indices | None = None,
        steps: Indices | None = None,
        kinds: str | Collection[str] | None = None,
    ) -> None:
        object.__setattr__(self, "what", flat_methods(what, "what"))
        object.__setattr__(self, "where", Where(layers, steps, kinds))
        require(len(self.what) > 0, "what", "a modulation or a method", "nothing")

    def modulations(self, site: Site) -> list[Modulation]:
        """The modulations at a site; none if the site is not among those given."""
        if site not in self.where:
            return []
        return [m for each in self.what for m in ([each] if isinstance(each, MODULATIONS) else each.modulations(site))]

    def sharings(self, site: Site) -> list:
        """The requests to shared attention at a site, see :mod:`fastrope.sharing`; none if the site is not among those
        given."""
        return sharings_of(self.what, site) if site in self.where else []

    def guidance(self, site: Site) -> Guidance | None:
        """What is asked of a layer with a negative prompt; where inactive, only that the prompts stay apart."""
        found = guidance_of(self.what, site)
        return found if found is None or site in self.where else replace(found, scale=1.0)

    @property
    def rescales(self) -> bool:
        """Whether something in it may change the model's positions."""
        return rescales(self.what)

    def rescaling(self, site: Site) -> Rescaling | None:
        """What is asked of the model's positions at a site; None where inactive.

        Raises:
            ValueError: some layers, or some kinds of block: all layers have the same positions.
        """
        where = self.where
        everywhere = where.layers is None and where.kinds is None
        require(everywhere or not self.rescales, "layers", "None (and kinds None) for a method that changes positions",
                (where.layers, where.kinds))  # fmt: skip
        return rescaling_of(self.what, site) if everywhere and site in where else None


def sharings_of(methods: Iterable, site: Site) -> list:
    """The requests at a site, of all methods that have ``sharings(site) -> list``."""
    return [sharing for m in methods if hasattr(m, "sharings") for sharing in m.sharings(site)]


def flat_methods(values: Iterable, argument: str) -> tuple:
    """Modulations and methods in one flat tuple.

    Raises:
        ValueError: something that is neither a modulation nor a method.
    """
    found = []
    for m in values:
        if isinstance(m, (list, tuple)):
            found.extend(flat_methods(m, argument))
            continue
        if not isinstance(m, MODULATIONS) and (isinstance(m, type) or not callable(getattr(m, "modulations", None))):
            raise ValueError(f"{argument}: expected modulations, or objects with modulations(site), received {m!r}")
        found.append(m)
    return tuple(found)


def _meets(indices: Indices | None, count: int) -> bool:
    """False if there are indices, but none within ``count``."""
    if indices is None:
        return True
    if isinstance(indices, slice):
        return len(range(*indices.indices(count))) > 0 or len(range(*indices.indices(sys.maxsize))) == 0
    several = (indices,) if isinstance(indices, int) else indices
    return len(several) == 0 or any(-count <= n < count for n in several)


def _among(indices: Indices | None, index: int, count: int) -> bool:
    if indices is None:
        return True
    if isinstance(indices, slice):
        return index in range(*indices.indices(count))
    several = (indices,) if isinstance(indices, int) else indices
    return index in several or index - count in several
