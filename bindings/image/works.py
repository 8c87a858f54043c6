"""Works of earlier calls, kept for those to come."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

from .work import Work, structure_of

PLAN_BYTES = 1 << 30  # plans kept for reuse; a plan of FLUX Kontext at 1024 px takes some 50 MB
KNOWN_WORKS = 512  # those with numbers of their own in each of 60 layers, in two branches of guidance and four steps

Held = TypeVar("Held")


class Works:
    """Works, and anything else with ``plans``, by what they were made for.

    Args:
        digest: the content of tensors, modulations and values as something to compare.
    """

    def __init__(self, digest: Callable[[Any], Hashable]) -> None:
        self._digest = digest
        self._held: OrderedDict[Hashable, Any] = OrderedDict()
        self._alike: weakref.WeakValueDictionary[Hashable, Work] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._held.values())

    def remember(self, key: Hashable, make: Callable[[], Held]) -> Held:
        """What an earlier call made under the same key, or something new."""
        if key not in self._held:
            self._held[key] = make()
        self._held.move_to_end(key)
        return self._held[key]

    def alike(self, key: Hashable, modulations: tuple, make: Callable[[Work | None], Work]) -> Work:
        """``make(like)``. ``like`` is the latest work under the same key whose modulations differ in numbers alone, if
        there is one. Schedules change numbers from layer to layer and step to step; tables of plans stay the same."""
        structure = key, self._digest(structure_of(modulations))
        work = make(self._alike.get(structure))
        self._alike[structure] = work
        return work

    def forget(self) -> None:
        """Drop what was used longest ago, until at most ``KNOWN_WORKS`` are left and fit into ``PLAN_BYTES``."""
        while len(self) > 1 and (len(self) > KNOWN_WORKS or self.nbytes > PLAN_BYTES):
            self._held.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Memory of the plans, bytes. A tensor that several plans share counts once."""
        held = {id(t): t.nbytes for work in self for plan in work.plans for t in plan.tensors}
        return sum(held.values())
