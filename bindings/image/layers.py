"""What one layer computes when a reference is shared. Nothing here depends on a call; it works on tensors alone.

:class:`SharedWork` is the target's part. Its shared keys are those of a :class:`ReferenceWork`, and they come in one of
two ways. Either the reference's rows are in the same batch (:class:`BatchedWork`), or the reference ran alone before
(:class:`Recorder`) and its keys come from the cache (:class:`CachedWork`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

import fastrope as fr
from fastrope.sharing import SHARED, SharedKeys, Snapshot, Statistics, adain

from .part import Part, Places, joined, replaced
from .prefetch import Prefetch
from .requests import LayerRequest
from .rotation import Rotation
from .sequence import JointSequence
from .work import Work


@dataclass(eq=False)
class SharedWork:
    """The target's attention when it attends to a shared reference, or takes on the statistics of a reference.

    Args:
        targets: the attention itself; its keys are the sequence and the shared tokens.
        request: what the methods request for this layer.
        tokens: the layout of the sequence.
    """

    targets: Work
    request: LayerRequest
    tokens: fr.TokenLayout

    def __post_init__(self) -> None:
        self.masked = self.targets.masked
        self._normalising = next((s for s in self.request.sharings if s.adain > 0), None)

    @property
    def plans(self) -> list[fr.Plan]:
        """The plans built so far."""
        return self.targets.plans

    @property
    def needs_statistics(self) -> bool:
        """True if the target takes on the statistics of the shared reference."""
        return self._normalising is not None and self._normalising.reference == SHARED

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        applied: bool,
        backend: str = "auto",
        part: Part | None = None,
        shared: SharedKeys | None = None,
    ) -> Tensor:
        """See :meth:`.work.LayerWork.attend`.

        Args:
            shared: the reference's keys, of all its tokens, on the same device and rotated alike; None if none are
                shared.
        """
        keys, values = [k], [v]
        if self._normalising is not None:
            q, keys = self._normalised(q, k, applied, shared, part)
        if part is not None:
            keys, values = ([x] for x in part.gather(joined(keys), v))
        if self.request.shares:
            keys.append(shared.k.expand(len(k), -1, -1, -1))
            values.append(shared.v.expand(len(v), -1, -1, -1))
        return self.targets.of(part).attend(q, joined(keys), joined(values), applied, backend)

    def _normalised(
        self, q: Tensor, k: Tensor, applied: bool, shared: SharedKeys | None, part: Part | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Queries, and the parts of the keys, after AdaIN of the target's image tokens."""
        rotation, found = self.targets.rotation, []
        for x, statistics in ((q, shared and shared.queries), (k, shared and shared.keys)):
            if not self.needs_statistics:
                reference = self.tokens.reference(int(self._normalising.reference))
                statistics = _statistics(x, reference, rotation, applied, part)
            inner, places, tokens = _inner(x, self.tokens.target, rotation, applied, part)
            own = None if part is None else part.statistics(inner, self.tokens.target)
            inner = adain(inner, cast(Statistics, statistics), self._normalising.adain, own)
            inner = rotation.do(inner, tokens) if applied else inner
            found.append(replaced(x, places, inner))
        return joined(found[0]), found[1]


class ReferenceWork(Work):
    """The plain attention of a reference's rows, and what their image tokens share."""

    def __init__(self, sequence: JointSequence, rope: fr.RoPE) -> None:
        super().__init__(sequence, rope, ())
        self._span = sequence.layout().target

    def share(
        self,
        k: Tensor,
        v: Tensor,
        applied: bool,
        statistics: Sequence,
        part: Part | None = None,
        gathered: bool = False,
    ) -> SharedKeys:
        """The image tokens of all rows as one run of keys.

        Args:
            k, v: ``(R, S, heads, D)`` of the reference, rotated already (``applied``) or not.
            statistics: of queries and keys.
            part, gathered: the tokens are those of a part, or all of them in the order of gathered ones.
        """
        places = self._span if part is None else part.within(self._span, k.device, gathered)[0]
        k, v = (x[:, places].flatten(0, 1)[None] for x in (k, v))
        return SharedKeys(k, v, applied, statistics[0], statistics[1])

    def statistics(self, q: Tensor, k: Tensor, applied: bool, part: Part | None = None) -> list[Statistics]:
        """Of queries and keys ``(R, S, heads, D)``, unrotated, over the image tokens of all rows."""
        return [_statistics(x, self._span, self.rotation, applied, part, rows=True) for x in (q, k)]


@dataclass(eq=False)
class BatchedWork:
    """Targets and a reference in one batch. The last ``rows`` rows are the reference's."""

    targets: SharedWork
    reference: ReferenceWork
    rows: int

    def __post_init__(self) -> None:
        self.masked = self.targets.masked

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto", part: Part | None = None
    ) -> Tensor:
        """See :meth:`.work.LayerWork.attend`."""
        targets, (q, k, v) = ((q[some], k[some], v[some]) for some in (slice(-self.rows), slice(-self.rows, None)))
        needed = self.targets.request.shares and self.targets.needs_statistics
        statistics = self.reference.statistics(q, k, applied, part) if needed else (None, None)
        if part is not None:
            k, v = part.gather(k, v)
        theirs = self.reference.of(part).attend(q, k, v, applied, backend)
        shared = None
        if self.targets.request.shares:
            shared = self.reference.share(k, v, applied, statistics, part, gathered=True)
        return torch.cat([self.targets.attend(*targets, applied, backend, part, shared), theirs])


@dataclass(eq=False)
class CachedWork:
    """A target's attention with the keys of a reference cache.

    Args:
        targets: the attention.
        cached: the keys of all layers that share, in this step: of all tokens, or those of this process.
        position: the position of this layer among them.
        rotation: of the reference's keys.
        rows: reference pictures.
    """

    targets: SharedWork
    cached: Prefetch
    position: int
    rotation: Rotation
    rows: int = 1

    def __post_init__(self) -> None:
        self.masked = self.targets.masked

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto", part: Part | None = None
    ) -> Tensor:
        """See :meth:`.work.LayerWork.attend`."""
        shared = self.cached.take(self.position).map(lambda x: x.to(k.device, non_blocking=True))
        if part is not None:
            lengths = part.lengths(self.rotation.tokens // self.rows)
            own, values = (x[0].unflatten(0, (self.rows, -1)) for x in (shared.k, shared.v))
            keys, values = (x.flatten(0, 1)[None] for x in part.gather(own, values, lengths))
            shared = shared._replace(k=keys, v=values)
        if shared.applied != applied:
            turned = self.rotation.do(shared.k) if applied else self.rotation.undo(shared.k)
            shared = shared._replace(k=turned, applied=applied)
        return self.targets.attend(q, k, v, applied, backend, part, shared)


@dataclass(eq=False)
class Recorder:
    """The attention of a reference that runs alone. It records what the reference shares.

    Args:
        reference: the attention.
        store: makes the copy of a tensor that the cache holds.
        snapshot: where the keys go, under the number ``layer``.
    """

    reference: ReferenceWork
    store: Callable[[Tensor], Tensor]
    snapshot: Snapshot
    layer: int

    def __post_init__(self) -> None:
        self.masked = self.reference.masked

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto", part: Part | None = None
    ) -> Tensor:
        """See :meth:`.work.LayerWork.attend`."""
        statistics = self.reference.statistics(q, k, applied, part)
        self.snapshot.layers[self.layer] = self.reference.share(k, v, applied, statistics, part).map(self.store)
        return self.reference.attend(q, k, v, applied, backend, part)


def _inner(
    x: Tensor, span: slice, rotation: Rotation, applied: bool, part: Part | None
) -> tuple[Tensor, Places, Places]:
    """Unrotated tokens of a span that are here, their places in ``x``, and which tokens they are."""
    places, tokens = (span, span) if part is None else part.within(span, x.device)
    return rotation.undo(x[:, places], tokens) if applied else x[:, places], places, tokens


def _statistics(
    x: Tensor, span: slice, rotation: Rotation, applied: bool, part: Part | None, rows: bool = False
) -> Statistics:
    """Over the unrotated tokens of a span, of each row or of all ``rows`` together."""
    inner, *_ = _inner(x, span, rotation, applied, part)
    inner = inner.flatten(0, 1)[None] if rows else inner
    return Statistics.of(inner) if part is None else part.statistics(inner, span)
