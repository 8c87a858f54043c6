"""Where the attention calls of one model call stand."""

from __future__ import annotations

import copy

import fastrope as fr

from .steps import Step


class Sites:
    """The sites of a call, made when asked for."""

    def __init__(
        self, layout: fr.TokenLayout, step: Step, axes_dim: tuple[int, ...], kinds: tuple[str, ...], theta: float
    ) -> None:
        self.layout, self.kinds = layout, kinds
        self._more = theta, None, step.sigma
        self._where = step.index, step.count, axes_dim, (1, 2), len(kinds)
        self._known_kinds = tuple(dict.fromkeys(kinds))

    def __getitem__(self, layer: int) -> fr.Site:
        return fr.Site(self.layout, layer, *self._where, self.kinds[layer], self._known_kinds, *self._more)

    def all(self) -> list[fr.Site]:
        """Of all layers; checked once, since they differ in nothing that could be wrong."""
        first, found = self[0], []
        for layer, kind in enumerate(self.kinds):
            site = copy.copy(first)
            object.__setattr__(site, "layer", layer)
            object.__setattr__(site, "kind", kind)
            found.append(site)
        return found
