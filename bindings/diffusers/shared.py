"""Shared attention in a bound transformer: the target's rows, the reference's rows or kept keys, one softmax.

From the reference to the slots of one forward: what it is at this step, what the methods ask for, and which way it
comes: :mod:`.batched` with the target, or :mod:`.kept` from a run of its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor

import fastrope as fr
from fastrope.sharing import Snapshot, check_reference

from .asking import Asked
from .batched import BatchedReference
from .calls import CallState, Identified
from .extended import target_work, with_shared
from .fingerprints import Readings
from .kept import KeptReference
from .layers import KeptWork, SharedWork
from .prefetch import Prefetch
from .rotation import Rotation
from .rows import Memo
from .sequences import Call, device_of
from .steps import find_sigma


class SharedAttention:
    """The reference of one handle.

    Args:
        state: of the handle.
        reference: a :class:`fastrope.Reference` or the like, or a :class:`fastrope.ReferenceCache`.

    Raises:
        ValueError: something else.
        NotImplementedError: a host without rows for a reference.
    """

    def __init__(self, state: CallState, reference):
        cache = reference if isinstance(reference, fr.ReferenceCache) else None
        self._source = reference if cache is None else cache.source
        check_reference(self._source)
        if state.host.rows is None:
            raise NotImplementedError(f"reference: expected a host with shared attention, received "
                                      f"{state.host.transformer}, whose row says nothing of it")  # fmt: skip
        self._state = state
        self._batched = BatchedReference(state)
        self._kept = None if cache is None else KeptReference(state, cache)
        self._sigmas, self._memo = Readings(), Memo()

    def reset(self) -> None:
        """Before every forward, also of one that shares nothing: the last one may have broken off."""
        self._batched.reset()

    def fill(self, module, call: Call) -> dict[str, object] | None:
        """Fill the slots for one forward; arguments to call it with instead, if others."""
        if self._kept is not None and self._kept.recording:
            return self._kept.record(module, call)
        state, rows = self._state, self._state.host.rows
        step, num_steps = state.step(call)
        moment = step, self._sigma(call, step)
        target = state.sequence_of(module, call)
        alone = self._alone(call, target, *moment)
        own = target if self._kept is None else state.sequence_of(module, alone)
        shape = own.key, rows.count(alone)
        tokens = with_shared(target.sequence.layout(), (own.sequence.layout().target_grid,) * shape[1])
        sites = state.sites(step, num_steps, tokens)
        asked = [Asked.of(state.methods, site) for site in sites]
        sharing = {n for n, each in enumerate(asked) if each.shares}
        if sharing and self._kept is None:
            return self._batched.fill(module, rows.together(call, alone, self._memo), sites, asked)
        kept = self._kept.snapshot(module, call, alone, own, moment, sharing) if sharing else None
        self._fill_target(target, tokens, asked, kept, shape, device_of(call.get(state.host.hidden)))
        return None

    def after_forward(self, module, args, output):
        """Forward hook: the reference's rows are dropped from the output."""
        return self._batched.cut(output)

    # ---- the reference at this step ---------------------------------------------------------------------------------

    def _sigma(self, call: Call, step: int) -> float:
        """The noise level of the step."""
        state = self._state
        sigmas = getattr(getattr(state.pipe, "scheduler", None), "sigmas", None)
        known = state.told is None and isinstance(sigmas, Tensor)  # the step is an index into them
        levels = self._sigmas.of(sigmas) if known else None
        return find_sigma(levels, call.get(state.host.timestep), step, state.host.model_time)

    def _alone(self, call: Call, target: Identified, step: int, sigma: float) -> dict[str, object]:
        """The reference's own call."""
        latents, size = self._source.latents(step, sigma), math.prod(target.sequence.layout().target_grid)
        return self._state.host.rows.alone(call, latents, self._source.arguments, size, self._memo)

    # ---- the target's own rows --------------------------------------------------------------------------------------

    def _fill_target(
        self,
        target: Identified,
        tokens: fr.TokenLayout,
        asked: list[Asked],
        kept: Snapshot | None,
        shape: Hashable,
        device: torch.device,
    ) -> None:
        """Slots for the target's own rows.

        Args:
            tokens: the target's layout.
            kept: what the layers that share see; None where none does.
            shape: what the kept keys' angles depend on.
            device: of the computation.
        """
        state = self._state
        order = [n for n, each in enumerate(asked) if each.shares]
        if kept is not None:
            ahead = Prefetch([kept.layers[n] for n in order], device)
            rotation = Rotation(kept.angles, target.rope.pairing)
        for n, (slot, each) in enumerate(zip(state.slots, asked, strict=True)):
            if any(each):
                seen = (shape, kept.angles) if each.shares else (None, None)
                work = self._target_work(target, tokens, each, *seen)
                slot.work = KeptWork(work, ahead, order.index(n), rotation) if each.shares else work
        state.forget()

    def _target_work(
        self, target: Identified, tokens: fr.TokenLayout, asked: Asked, shape: Hashable, shared: Tensor | None
    ) -> SharedWork:
        (key, sequence, rope), state, modulations = target, self._state, asked.modulations

        def make() -> SharedWork:
            works = state.alike(
                (key, shape), modulations, lambda like: target_work(sequence, rope, modulations, shared, like)
            )
            return SharedWork(works, asked.sharings, tokens)

        return state.remember((key, shape, state.digest(modulations), asked.sharings), make)
