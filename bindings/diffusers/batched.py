"""A reference as further rows of the target's own call: one forward of the transformer serves both.

The rows are appended before the transformer runs, and dropped from its output.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

import fastrope as fr

from .asking import Asked
from .calls import CallState, Identified
from .dispatch import Work
from .extended import target_work, with_shared
from .layers import BatchedWork, ReferenceWork, SharedWork
from .rows import Joined
from .sequences import JointSequence


class BatchedReference:
    """Fills the slots of a handle for calls that a reference joined."""

    def __init__(self, state: CallState):
        self._state = state
        self._appended = 0  # rows, in the forward under way

    def reset(self) -> None:
        """Before every forward: the last one may have broken off."""
        self._appended = 0

    def fill(self, module, joined: Joined, sites: list[fr.Site], asked: list[Asked]) -> dict[str, object]:
        """Fill the slots; the arguments to call the transformer with.

        Args:
            sites: of the target in a call of its own.
            asked: by the methods, at these sites.
        """
        state = self._state
        batch = _Batch(state, module, joined)
        if batch.tokens != sites[0].tokens:  # filled up
            asked = [Asked.of(state.methods, replace(site, tokens=batch.tokens)) for site in sites]
        for slot, each in zip(state.slots, asked, strict=True):
            slot.work = batch.work(each)
        state.forget()
        self._appended = joined.rows
        return joined.call

    def cut(self, output):
        """The target's part of the output; None where that is all of it."""
        if not self._appended:
            return None
        rows, cut, self._appended = self._appended, self._state.host.rows.cut, 0
        if isinstance(output, tuple):
            return cut(output[0], rows), *output[1:]
        return replace(output, sample=cut(output.sample, rows))


class _Batch:
    """A joined call: what is the target's of it, and what the reference's."""

    def __init__(self, state: CallState, module, joined: Joined):
        self._state = state
        self._count = joined.rows
        self._filled_up = joined.text_mask is not None
        self._key, self._sequence, self._rope = _identify(state, module, joined)
        layout, angles = self._sequence.layout(), self._rope.angles
        self.tokens = with_shared(layout, (layout.target_grid,) * joined.rows)
        count = state.host.rows.count(joined.call) - joined.rows
        mine, theirs = (angles, angles) if angles.ndim == 2 else (angles[:count], angles[count:])
        self._mine = _rows(self._sequence, slice(count)), replace(self._rope, angles=mine)
        reference = _rows(self._sequence, slice(count, None)), replace(self._rope, angles=theirs)
        self._reference = state.remember((self._key, joined.rows, "reference"), lambda: ReferenceWork(*reference))
        shared = theirs[..., layout.target, :]
        self._shared = shared.repeat(joined.rows, 1) if shared.ndim == 2 else shared.flatten(0, 1)

    def work(self, asked: Asked) -> Work | BatchedWork | None:
        """What a layer does; None where the host's own attention will do."""
        if any(asked):
            content = self._key, self._count, self._state.digest(asked.modulations), asked.sharings
            return self._state.remember(content, lambda: self._batched(asked))
        if not self._filled_up:
            return None
        return self._state.remember((self._key, self._count, "all"), self._plain)

    def _batched(self, asked: Asked) -> BatchedWork:
        key = self._key, self._count
        shared = self._shared if asked.shares else None
        targets = self._state.alike(
            (*key, asked.sharings),
            asked.modulations,
            lambda like: target_work(*self._mine, asked.modulations, shared, like),
        )
        shared_work = SharedWork(targets, asked.sharings, self.tokens)
        return self._as_the_host_masks(BatchedWork(shared_work, self._reference, self._count))

    def _plain(self) -> Work:
        return self._as_the_host_masks(Work(self._sequence, self._rope, ()))

    def _as_the_host_masks(self, work):
        """Fillers are masked here alone: a mask that the host hands over is another one, still to be refused."""
        work.masked = work.masked and not self._filled_up
        return work


def _identify(state: CallState, module, joined: Joined) -> Identified:
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
