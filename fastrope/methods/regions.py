"""Regions: parts of a picture that have prompts and reference pictures of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from ..activity import Indices
from ..checks import require, whole_slice
from ..modulations import LogitBias
from ..tokens import Site, TokenLayout
from .maps import as_map, resize
from .per_reference import checked_references, present
from .schedules import Activity, Steps
from .strength import check_text_tokens


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the target with text and references of its own; see :class:`fastrope.Regions`.

    Args:
        mask: an array or tensor ``(rows, columns)`` of any size, bool or numbers in 0..1: 1 inside, 0 outside. It is
            averaged over the cells of the target's token grid.
        text: text tokens of the region, counted from the first text token; None for no text.
        references: indices of its reference pictures.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    mask: Any
    text: slice | None = None
    references: Sequence[int] = ()
    _map: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found = as_map("Region.mask", self.mask)
        require(len(found) == 1, "Region.mask", "one mask (rows, columns)", f"{len(found)} masks")
        low, high = float(found.min()), float(found.max())
        require(low >= 0 and high <= 1 and high > 0, "Region.mask", "values in 0..1, not all 0", f"{low:g}..{high:g}")
        object.__setattr__(self, "_map", found)
        if self.text is not None:
            require(isinstance(self.text, slice), "Region.text", "a slice or None", repr(self.text))
            text = whole_slice("Region.text", self.text)
            ok = text.start is not None and text.stop is not None and 0 <= text.start < text.stop
            require(ok and text.step in (None, 1), "Region.text", "slice(start, stop) with 0 <= start < stop", text)
            object.__setattr__(self, "text", text)
        chosen = self.references
        require(isinstance(chosen, (list, tuple, range)), "Region.references", "a list of indices", repr(chosen))
        chosen = checked_references("Region.references", chosen) if len(chosen) else ()
        object.__setattr__(self, "references", chosen)


@dataclass(frozen=True, eq=False)
class Regions:
    """Binds texts and reference pictures to regions of the target. With ``m_r[i]`` the mask of region ``r`` at query
    ``i``, and for a key ``j`` of the text or references of some regions::

        s_ij <- s_ij + max over the regions r of j of log m_r[i]

    * A query of the target sees text and references of its regions, and not those of others. A mask between 0 and 1 is
      a log weight, so edges may be soft; 0 hides.
    * Text and references of a region do not see those of other regions: for them ``m`` is 1 in their regions and 0 in
      others.
    * For all other queries ``m`` is 1. Text and references outside of all regions see everything, and everyone sees
      them.

    Every set of keys with the same regions gets one bias per query. There is no matrix of queries by keys, for any
    number of regions.

    Args:
        regions: a list of :class:`fastrope.Region`. Masks, texts and references may overlap. A region with neither text
            nor references is of use with ``local`` only.
        local: if True, a query of the target sees those tokens of the target that share a region with it (mask above 0
            for both), and those in no region.
        text_tokens: number of text tokens of the prompt. Calls with another number (a negative prompt) are treated as
            if no region had text. None means that all calls have the regions' text.
        layers, steps: where the method acts, as in :class:`fastrope.ReferenceStrength`.

    A region with mask 1 everywhere, alone, modulates nothing.

    Raises:
        ValueError: naming the argument, what was expected and what came; in :meth:`modulations` also a sequence without
            a region's text tokens or references.
    """

    regions: Sequence[Region]
    local: bool = False
    text_tokens: int | None = None
    layers: Indices | None = None
    steps: Steps = None
    _active: Activity = field(init=False, repr=False)

    def __post_init__(self) -> None:
        regions = self.regions
        ok = isinstance(regions, (list, tuple)) and len(regions) > 0 and all(isinstance(r, Region) for r in regions)
        require(ok, "Regions.regions", "a list of fastrope.Region", repr(regions))
        require(isinstance(self.local, bool), "Regions.local", "True or False", repr(self.local))
        bound = any(r.text is not None or len(r.references) for r in regions)
        require(bound or self.local, "Regions.regions", "text or references of some region, or local=True", "neither")
        check_text_tokens("Regions", self.text_tokens)
        object.__setattr__(self, "regions", tuple(regions))
        object.__setattr__(self, "_active", Activity(self.layers, self.steps))

    def modulations(self, site: Site) -> list[LogitBias]:
        """One :class:`fastrope.LogitBias` per set of keys with the same regions, unless neutral. Equal layouts give the
        same objects."""
        return list(_biases(self, site.tokens)) if site in self._active else []


@lru_cache(maxsize=64)
def _biases(method: Regions, tokens: TokenLayout) -> tuple[LogitBias, ...]:
    """Cached, because a binding reuses its plan for the same objects."""
    masks = torch.cat([resize(r._map, tokens.target_grid).flatten(1) for r in method.regions]).clamp(0, 1)
    bound = _bound(method, tokens)
    weights = (bound | ~bound.any(dim=0)).double()[:, : len(tokens)]  # of every query in every region
    weights[:, tokens.target] = masks
    found = _by_regions(bound, weights)
    if method.local:
        inside, weights = torch.zeros_like(bound), torch.ones_like(weights)
        inside[:, tokens.target] = masks > 0
        weights[:, tokens.target] = (masks > 0).double()
        found += _by_regions(inside, weights)
    return tuple(found)


def _bound(method: Regions, tokens: TokenLayout) -> torch.Tensor:
    """``(regions, keys)``: the text and references of each region."""
    found = torch.zeros(len(method.regions), tokens.num_keys, dtype=torch.bool, device="cpu")
    with_text = method.text_tokens in (None, tokens.text_tokens)
    for row, region in zip(found, method.regions, strict=True):
        if region.text is not None and with_text:
            count, stop = tokens.text_tokens, region.text.stop
            require(stop <= count, "Region.text", f"a slice of the {count} text tokens", region.text)
            row[tokens.text][region.text] = True
        for i in present("Region", tokens, tuple(region.references)):
            row[tokens.reference(i)] = True
    return found


def _by_regions(members: torch.Tensor, weights: torch.Tensor) -> list[LogitBias]:
    """A bias per set of keys with the same regions, from ``(regions, keys)`` and ``(regions, queries)``: the logarithm
    of the query's largest weight in any region of the key."""
    found = []
    for pattern in members.unique(dim=1).T:
        bias = weights[pattern].amax(dim=0).log() if bool(pattern.any()) else torch.zeros(1, device="cpu")
        if bool((bias != 0).any()):
            found.append(LogitBias(bias, keys=(members == pattern[:, None]).all(dim=0)))
    return found
