"""Shared attention in a bound transformer: the target's rows, the reference's rows or cached keys, one softmax.

From the reference to the work of every layer: what it is at this step, what the methods ask for, and which way it
comes: :mod:`.batched` with the target, or :mod:`.cached` from a run of its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, cast

import torch

import fastrope as fr
from fastrope.rescaling import rescales
from fastrope.sharing import Snapshot, check_reference

from ..image.extended import target_work, with_shared
from ..image.layers import CachedWork, SharedWork
from ..image.prefetch import Prefetch
from ..image.requests import LayerRequest
from ..image.rotation import Rotation
from ..image.work import LayerWork
from .batched import prepare_batch
from .cached import CachedReference
from .calls import CallState, Identified, Prepared
from .fingerprints import Readings
from .forwards import Forward, LayerState
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

    def __init__(self, state: CallState, reference: Any) -> None:
        cache = reference if isinstance(reference, fr.ReferenceCache) else None
        self._source: Any = reference if cache is None else cache.source
        check_reference(self._source)
        if state.host.rows is None:
            raise NotImplementedError(f"reference: expected a host with shared attention, received "
                                      f"{state.host.transformer}, whose row says nothing of it")  # fmt: skip
        self._state = state
        self._cached = None if cache is None else CachedReference(state, cache)
        self._sigmas, self._memo = Readings(), Memo()

    def prepare(self, module: torch.nn.Module, call: Call, methods: tuple) -> Prepared:
        """What a forward is to do, in place of the handle's own answer."""
        state, rows = self._state, self._state.host.rows
        if rescales(methods):
            raise NotImplementedError("positions: expected no method that rescales them beside a shared reference, "
                                      "whose keys are at the model's own")  # fmt: skip
        step = state.step(call)
        sigma = find_sigma(step, self._sigmas.of, call.get(state.host.timestep), state.host.model_time)
        moment = step.index, sigma
        target = state.sequence_of(module, call)
        alone = self._alone(call, target, *moment)
        own = target if self._cached is None else state.sequence_of(module, alone)
        shape = own.key, rows.count(alone)
        tokens = with_shared(target.sequence.layout(), (own.sequence.layout().target_grid,) * shape[1])
        sites = state.sites(step, tokens)
        requests = [LayerRequest.of(methods, site) for site in sites]
        sharing = {n for n, each in enumerate(requests) if each.shares}
        if sharing and self._cached is None:
            return prepare_batch(state, module, rows.together(call, alone, self._memo), sites, methods, requests)
        snapshot = self._cached.snapshot(module, call, alone, own, moment, sharing) if sharing else None
        return self._prepare_target(target, tokens, requests, snapshot, shape, device_of(call.get(state.host.hidden)))

    def _alone(self, call: Call, target: Identified, step: int, sigma: float) -> dict[str, Any]:
        """The reference's own call."""
        latents, size = self._source.latents(step, sigma), math.prod(target.sequence.layout().target_grid)
        return self._state.host.rows.alone(call, latents, self._source.arguments, size, self._memo)

    # ---- the target's own rows --------------------------------------------------------------------------------------

    def _prepare_target(
        self,
        target: Identified,
        tokens: fr.TokenLayout,
        requests: list[LayerRequest],
        snapshot: Snapshot | None,
        shape: Hashable,
        device: torch.device,
    ) -> Prepared:
        """A forward of the target's own rows.

        Args:
            tokens: the target's layout.
            snapshot: what the layers that share see; None where none does.
            shape: what the angles of the reference's keys depend on.
            device: of the computation.
        """
        order = [n for n, each in enumerate(requests) if each.shares]
        works: list[LayerWork | None] = [
            self._target_work(target, tokens, each, shape, snapshot) if any(each) else None for each in requests
        ]
        if snapshot is not None:
            ahead = Prefetch([snapshot.layers[n] for n in order], device)
            rotation = Rotation(snapshot.angles, target.rope.pairing)
            for position, n in enumerate(order):
                works[n] = CachedWork(cast(SharedWork, works[n]), ahead, position, rotation)
        self._state.forget()
        return Prepared(Forward(tuple(map(LayerState, works))))

    def _target_work(
        self,
        target: Identified,
        tokens: fr.TokenLayout,
        request: LayerRequest,
        shape: Hashable,
        snapshot: Snapshot | None,
    ) -> SharedWork:
        key, sequence, rope = target[:3]
        state, modulations = self._state, request.modulations
        shape, angles = (shape, snapshot.angles) if request.shares else (None, None)

        def make() -> SharedWork:
            works = state.alike(
                (key, shape), modulations, lambda like: target_work(sequence, rope, modulations, angles, like)
            )
            return SharedWork(works, request.sharings, tokens)

        return state.remember((key, shape, state.digest(modulations), request.sharings), make)
