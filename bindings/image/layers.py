"""What one layer computes when a reference is shared. Nothing here depends on a call; it works on tensors alone.

:class:`SharedWork` is the target's part. Its shared keys are those of a :class:`ReferenceWork`, and they come in one of
two ways. Either the reference's rows are in the same batch (:class:`BatchedWork`), or the reference ran alone before
(:class:`Recorder`) and its keys come from the cache (:class:`CachedWork`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

import fastrope as fr
from fastrope.sharing import SHARED, SharedKeys, Snapshot, Statistics, adain

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
        self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto", shared: SharedKeys | None = None
    ) -> Tensor:
        """Attention of ``q, k, v (B, S, H, D)``, rotated already (``applied``) or not.

        Args:
            shared: the reference's keys, on the same device and rotated alike; None if none are shared.
        """
        keys, values = [k], [v]
        if self._normalising is not None:
            q, keys = self._normalised(q, k, applied, shared)
        if self.request.shares:
            keys.append(shared.k.expand(len(k), -1, -1, -1))
            values.append(shared.v.expand(len(v), -1, -1, -1))
        k, v = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (keys, values))
        return self.targets.attend(q, k, v, applied, backend)

    def _normalised(
        self, q: Tensor, k: Tensor, applied: bool, shared: SharedKeys | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Queries, and the parts of the keys, after AdaIN of the target's image tokens."""
        span, rotation, found = self.tokens.target, self.targets.rotation, []
        for x, statistics in ((q, shared and shared.queries), (k, shared and shared.keys)):
            if not self.needs_statistics:
                reference = self.tokens.reference(int(self._normalising.reference))
                inner = x[:, reference]
                statistics = Statistics.of(rotation.undo(inner, reference) if applied else inner)
            inner = rotation.undo(x[:, span], span) if applied else x[:, span]
            inner = adain(inner, cast(Statistics, statistics), self._normalising.adain)
            inner = rotation.do(inner, span) if applied else inner
            found.append([x[:, : span.start], inner, x[:, span.stop :]])
        return torch.cat(found[0], dim=1), found[1]


class ReferenceWork(Work):
    """The plain attention of a reference's rows, and what their image tokens share."""

    def __init__(self, sequence: JointSequence, rope: fr.RoPE) -> None:
        super().__init__(sequence, rope, ())
        self._span = sequence.layout().target

    def share(self, q: Tensor, k: Tensor, v: Tensor, applied: bool, statistics: bool) -> SharedKeys:
        """The image tokens of all rows as one run of keys.

        Args:
            q, k, v: ``(R, S, heads, D)`` of the reference, rotated already (``applied``) or not.
            statistics: also take the statistics of queries and keys, unrotated, over the tokens of all rows.
        """
        found = [self._statistics(x, applied) for x in (q, k)] if statistics else [None, None]
        k, v = (x[:, self._span].flatten(0, 1)[None] for x in (k, v))
        return SharedKeys(k, v, applied, *found)

    def _statistics(self, x: Tensor, applied: bool) -> Statistics:
        inner = x[:, self._span]
        inner = self.rotation.undo(inner, self._span) if applied else inner
        return Statistics.of(inner.flatten(0, 1)[None])


@dataclass(eq=False)
class BatchedWork:
    """Targets and a reference in one batch. The last ``rows`` rows are the reference's."""

    targets: SharedWork
    reference: ReferenceWork
    rows: int

    def __post_init__(self) -> None:
        self.masked = self.targets.masked

    def attend(self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto") -> Tensor:
        """See :meth:`.work.Work.attend`."""
        rows = slice(-self.rows), slice(-self.rows, None)
        targets, reference = ((q[some], k[some], v[some]) for some in rows)
        theirs = self.reference.attend(*reference, applied, backend)
        shared = None
        if self.targets.request.shares:
            shared = self.reference.share(*reference, applied, self.targets.needs_statistics)
        return torch.cat([self.targets.attend(*targets, applied, backend, shared), theirs])


@dataclass(eq=False)
class CachedWork:
    """A target's attention with the keys of a reference cache.

    Args:
        targets: the attention.
        cached: the keys of all layers that share, in this step.
        position: the position of this layer among them.
        rotation: of the cached keys.
    """

    targets: SharedWork
    cached: Prefetch
    position: int
    rotation: Rotation

    def __post_init__(self) -> None:
        self.masked = self.targets.masked

    def attend(self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto") -> Tensor:
        """See :meth:`.work.Work.attend`."""
        shared = self.cached.take(self.position).map(lambda x: x.to(k.device, non_blocking=True))
        if shared.applied != applied:
            turned = self.rotation.do(shared.k) if applied else self.rotation.undo(shared.k)
            shared = shared._replace(k=turned, applied=applied)
        return self.targets.attend(q, k, v, applied, backend, shared)


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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto") -> Tensor:
        """See :meth:`.work.Work.attend`."""
        shared = self.reference.share(q, k, v, applied, statistics=True)
        self.snapshot.layers[self.layer] = shared.map(self.store)
        return self.reference.attend(q, k, v, applied, backend)
