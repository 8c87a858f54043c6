"""What one layer computes where a reference is shared: with tensors alone, whatever call they come from.

:class:`SharedWork` is the target's part. Its shared keys come from :class:`ReferenceWork`: in the same layer, where the
reference is further rows of the batch (:class:`BatchedWork`); or recorded when it ran alone (:class:`Recorder`) and
brought back later (:class:`CachedWork`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

import fastrope as fr
from fastrope.sharing import SHARED, SharedKeys, Sharing, Snapshot, Statistics, adain

from .prefetch import Prefetch
from .requests import shares
from .rotation import Rotation
from .sequence import JointSequence
from .work import Work


class SharedWork:
    """The target's attention where it sees a shared reference, or takes on a reference's statistics.

    Args:
        targets: the attention itself; its keys are the sequence and the shared tokens.
        sharings: what the methods ask for in this layer, see :func:`.requests.combine`.
        tokens: the layout of the sequence.
    """

    def __init__(self, targets: Work, sharings: tuple[Sharing, ...], tokens: fr.TokenLayout) -> None:
        self.masked = targets.masked
        self.shares = shares(sharings)
        self._targets = targets
        self._normalising = next((s for s in sharings if s.adain > 0), None)
        self._tokens = tokens

    @property
    def plans(self) -> list[fr.Plan]:
        """Those built so far."""
        return self._targets.plans

    @property
    def needs_statistics(self) -> bool:
        """Whether the target takes on those of the shared reference."""
        return self._normalising is not None and self._normalising.reference == SHARED

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto", shared: SharedKeys | None = None
    ) -> Tensor:
        """Attention of ``q, k, v (B, S, H, D)``, rotated already (``applied``) or not.

        Args:
            shared: the reference's keys, on the same device and rotated alike; None where none are shared.
        """
        keys, values = [k], [v]
        if self._normalising is not None:
            q, keys = self._normalised(q, k, applied, shared)
        if self.shares:
            keys.append(shared.k.expand(len(k), -1, -1, -1))
            values.append(shared.v.expand(len(v), -1, -1, -1))
        k, v = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (keys, values))
        return self._targets.attend(q, k, v, applied, backend)

    def _normalised(
        self, q: Tensor, k: Tensor, applied: bool, shared: SharedKeys | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Queries, and the parts of the keys, after AdaIN of the target's image tokens."""
        span, rotation, found = self._tokens.target, self._targets.rotation, []
        for x, statistics in ((q, shared and shared.queries), (k, shared and shared.keys)):
            if not self.needs_statistics:
                own = self._tokens.reference(int(self._normalising.reference))
                statistics = Statistics.of(rotation.undo(x[:, own], own) if applied else x[:, own])
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
            statistics: whether to take those of queries and keys, over the tokens of all rows, unrotated.
        """
        found = [self._statistics(x, applied) for x in (q, k)] if statistics else [None, None]
        k, v = (x[:, self._span].flatten(0, 1)[None] for x in (k, v))
        return SharedKeys(k, v, applied, *found)

    def _statistics(self, x: Tensor, applied: bool) -> Statistics:
        inner = x[:, self._span]
        inner = self.rotation.undo(inner, self._span) if applied else inner
        return Statistics.of(inner.flatten(0, 1)[None])


class BatchedWork:
    """Targets and a reference in one batch, the reference's rows last.

    Args:
        targets: what the first rows do.
        reference: what the last ``rows`` rows do.
    """

    def __init__(self, targets: SharedWork, reference: ReferenceWork, rows: int) -> None:
        self.masked = targets.masked
        self._targets = targets
        self._reference = reference
        self._rows = rows

    @property
    def plans(self) -> list[fr.Plan]:
        """Those built so far."""
        return self._targets.plans + self._reference.plans

    def attend(self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto") -> Tensor:
        """As :meth:`.work.Work.attend`."""
        rows = slice(-self._rows), slice(-self._rows, None)
        targets, reference = ((q[some], k[some], v[some]) for some in rows)
        theirs = self._reference.attend(*reference, applied, backend)
        shared = None
        if self._targets.shares:
            shared = self._reference.share(*reference, applied, self._targets.needs_statistics)
        return torch.cat([self._targets.attend(*targets, applied, backend, shared), theirs])


class CachedWork:
    """A target's attention with the keys of a reference cache.

    Args:
        targets: the attention.
        cached: the keys of the step's layers.
        n: which of them are this layer's.
        rotation: of the cached keys.
    """

    def __init__(self, targets: SharedWork, cached: Prefetch, n: int, rotation: Rotation) -> None:
        self.masked = targets.masked
        self._targets = targets
        self._cached = cached
        self._n = n
        self._rotation = rotation

    def attend(self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto") -> Tensor:
        """As :meth:`.work.Work.attend`."""
        shared = self._cached.take(self._n).map(lambda x: x.to(k.device, non_blocking=True))
        if shared.applied != applied:
            turned = self._rotation.do(shared.k) if applied else self._rotation.undo(shared.k)
            shared = shared._replace(k=turned, applied=applied)
        return self._targets.attend(q, k, v, applied, backend, shared)


class Recorder:
    """The attention of a reference alone, that records what it shares.

    Args:
        reference: the attention.
        keep: makes the copy of a tensor that is kept.
        snapshot: where to.
        layer: under which number.
    """

    def __init__(
        self, reference: ReferenceWork, keep: Callable[[Tensor], Tensor], snapshot: Snapshot, layer: int
    ) -> None:
        self.masked = reference.masked
        self._reference = reference
        self._keep = keep
        self._snapshot = snapshot
        self._layer = layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto") -> Tensor:
        """As :meth:`.work.Work.attend`."""
        shared = self._reference.share(q, k, v, applied, statistics=True)
        self._snapshot.layers[self._layer] = shared.map(self._keep)
        return self._reference.attend(q, k, v, applied, backend)
