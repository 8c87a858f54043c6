"""A reference as further rows of the target's own call: one forward of the transformer serves both.

The rows are appended before the transformer runs, and dropped from its output.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

import fastrope as fr

from ..image.extended import target_work, with_shared
from ..image.layers import BatchedWork, ReferenceWork, SharedWork
from ..image.requests import LayerRequest
from ..image.sequence import JointSequence
from ..image.work import LayerWork, Work
from .calls import CallState, Identified, Prepared
from .forwards import Forward, LayerState
from .rows import Joined

Done = TypeVar("Done", bound=LayerWork)


def prepare_batch(
    state: CallState,
    module: torch.nn.Module,
    joined: Joined,
    sites: list[fr.Site],
    methods: Sequence,
    requests: list[LayerRequest],
) -> Prepared:
    """The forward of a call that a reference joined, and its arguments.

    Args:
        sites: of the target in a call of its own.
        requests: of the methods, at these sites.
    """
    batch = _Batch(state, module, joined)
    if batch.tokens != sites[0].tokens:  # filled up
        requests = [LayerRequest.of(methods, replace(site, tokens=batch.tokens)) for site in sites]
    layers = tuple(LayerState(batch.work(each)) for each in requests)
    state.forget()
    return Prepared(Forward(layers, joined.rows), joined.call)


class _Batch:
    """A joined call: what is the target's of it, and what the reference's."""

    def __init__(self, state: CallState, module: torch.nn.Module, joined: Joined) -> None:
        self._state = state
        self._count = joined.rows
        self._filled_up = joined.text_mask is not None
        self._key, self._sequence, self._rope, _ = _identify(state, module, joined)
        layout, angles = self._sequence.layout(), self._rope.angles
        self.tokens = with_shared(layout, (layout.target_grid,) * joined.rows)
        count = state.host.rows.count(joined.call) - joined.rows
        mine, theirs = (angles, angles) if angles.ndim == 2 else (angles[:count], angles[count:])
        self._mine = _rows(self._sequence, slice(count)), replace(self._rope, angles=mine)
        reference = _rows(self._sequence, slice(count, None)), replace(self._rope, angles=theirs)
        self._reference = state.remember((self._key, joined.rows, "reference"), lambda: ReferenceWork(*reference))
        shared = theirs[..., layout.target, :]
        self._shared = shared.repeat(joined.rows, 1) if shared.ndim == 2 else shared.flatten(0, 1)

    def work(self, request: LayerRequest) -> Work | BatchedWork | None:
        """What a layer does; None where the host's own attention will do."""
        if any(request):
            content = self._key, self._count, self._state.digest(request.modulations), request.sharings
            return self._state.remember(content, lambda: self._batched(request))
        if not self._filled_up:
            return None
        return self._state.remember((self._key, self._count, "all"), self._plain)

    def _batched(self, request: LayerRequest) -> BatchedWork:
        key = self._key, self._count
        shared = self._shared if request.shares else None
        targets = self._state.alike(
            (*key, request.sharings),
            request.modulations,
            lambda like: target_work(*self._mine, request.modulations, shared, like),
        )
        shared_work = SharedWork(targets, request.sharings, self.tokens)
        return self._as_the_host_masks(BatchedWork(shared_work, self._reference, self._count))

    def _plain(self) -> Work:
        return self._as_the_host_masks(Work(self._sequence, self._rope, ()))

    def _as_the_host_masks(self, work: Done) -> Done:
        """Fillers are masked here alone: a mask that the host hands over is another one, still to be refused."""
        work.masked = work.masked and not self._filled_up
        return work


def _identify(state: CallState, module: torch.nn.Module, joined: Joined) -> Identified:
    """The sequence of all rows, fillers of texts masked."""
    found = state.sequence_of(module, joined.call)
    if joined.text_mask is None:
        return found
    text, layout = joined.text_mask, found.sequence.layout()
    image = text.new_ones(len(text), len(layout) - layout.text_tokens)
    sequence = replace(found.sequence, key_mask=torch.cat([text, image], dim=1).cpu())
    key: Hashable = found.key, state.digest((text,))
    return Identified(key, sequence, found.rope)


def _rows(sequence: JointSequence, rows: slice) -> JointSequence:
    """Some rows of a batch."""

    def some(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows]

    positions = sequence.positions if sequence.positions.ndim == 2 else sequence.positions[rows]
    return replace(sequence, positions=positions, key_mask=some(sequence.key_mask), bonus=some(sequence.bonus))
