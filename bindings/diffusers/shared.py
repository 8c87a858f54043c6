"""Shared attention in a bound transformer: the target also attends to the image tokens of a reference, in one softmax.

:class:`SharedAttention` asks the reference for its latents at this step, asks the methods for their requests, and makes
the work of every layer. The reference's keys come in one of two ways. Its rows are appended to the target's batch, and
cut off from the output; or it ran alone before, and its keys are in a cache (:mod:`.cached`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

import fastrope as fr
from fastrope.guidance import guidance_of
from fastrope.rescaling import rescales
from fastrope.sharing import Snapshot, check_reference

from ..image.extended import image_angles, target_work, with_shared
from ..image.fingerprints import Memo
from ..image.layers import BatchedWork, CachedWork, ReferenceWork, SharedWork
from ..image.prefetch import Prefetch
from ..image.requests import LayerRequest
from ..image.rotation import Rotation
from ..image.work import LayerWork, Work
from .cached import CachedReference
from .calls import CallState, Prepared
from .forwards import Forward, LayerState
from .identified import Identified
from .rows import Joined
from .sequences import Call, device_of
from .steps import find_sigma


class SharedAttention:
    """The reference of one handle.

    Args:
        state: of the handle.
        reference: a :class:`fastrope.Reference`, an object like one, or a :class:`fastrope.ReferenceCache`.

    Raises:
        ValueError: something else.
        NotImplementedError: a host without :mod:`.rows`.
    """

    def __init__(self, state: CallState, reference: Any) -> None:
        cache = reference if isinstance(reference, fr.ReferenceCache) else None
        self._source: Any = reference if cache is None else cache.source
        check_reference(self._source)
        if state.host.rows is None:
            raise NotImplementedError(f"reference: expected a host with shared attention, received "
                                      f"{state.host.transformer}, whose Host.rows is None")  # fmt: skip
        self._state = state
        self._memo = Memo()
        self._cached = None if cache is None else CachedReference(state, cache, self._memo)

    def prepare(self, module: torch.nn.Module, call: Call, methods: tuple) -> Prepared:
        """What every layer does in a call of the transformer, and the call's arguments if the reference joins it."""
        state, rows = self._state, self._state.host.rows
        if rescales(methods):
            raise NotImplementedError("positions: expected no method that rescales them beside a shared reference, "
                                      "whose keys have the model's own positions")  # fmt: skip
        step = state.step(call)
        sigma = find_sigma(step, self._memo, call.get(state.host.timestep), state.host.model_time)
        target = state.sequences.of(module, call)
        alone = self._alone(call, target, step.index, sigma)
        reference = target if self._cached is None else state.sequences.of(module, alone)
        count = rows.count(alone)
        tokens = with_shared(target.sequence.layout(), (reference.sequence.layout().target_grid,) * count)
        sites = state.sites(step, tokens)
        if guidance_of(methods, sites[0]) is not None:
            raise NotImplementedError("NAG: expected no shared reference beside it, received one; apply it without "
                                      "reference=")  # fmt: skip
        requests = [LayerRequest.of(methods, site) for site in sites]
        sharing = {n for n, each in enumerate(requests) if each.shares}
        content = state.content(requests, None)
        if sharing and self._cached is None:
            joined = rows.together(call, alone, self._memo)
            return self._prepare_batch(module, joined, sites, methods, requests)._replace(content=content)
        snapshot = None
        if sharing:
            snapshot = self._cached.snapshot(module, call, alone, reference, (step.index, sigma), sharing)
        device = device_of(call.get(state.host.hidden))
        prepared = self._prepare_target(target, tokens, requests, snapshot, (reference.key, count), device)
        return prepared._replace(content=content)

    def _alone(self, call: Call, target: Identified, step: int, sigma: float) -> dict[str, Any]:
        """The call that would run the reference by itself."""
        latents, size = self._source.latents(step, sigma), math.prod(target.sequence.layout().target_grid)
        return self._state.host.rows.alone(call, latents, self._source.arguments, size, self._memo)

    def _shared_work(
        self,
        target: Identified,
        place: Hashable,
        request: LayerRequest,
        tokens: fr.TokenLayout,
        angles: torch.Tensor | None,
    ) -> SharedWork:
        """The target's part of a layer. A later call with the same request gets the same object.

        Args:
            place: identifies the rows and the reference's angles, together with the key of the target.
            tokens: the target's layout.
            angles: of the shared keys.
        """
        key, sequence, rope = target[:3]
        modulations = request.modulations
        angles = angles if request.shares else None

        def make() -> SharedWork:
            targets = self._state.works.alike(
                (key, place, request.shares),
                modulations,
                lambda like: target_work(sequence, rope, modulations, angles, like),
            )
            return SharedWork(targets, request, tokens)

        return self._state.works.remember(
            (key, place, self._state.sequences.digest(modulations), request.sharings), make
        )

    # ---- the reference in the same batch ----------------------------------------------------------------------------

    def _prepare_batch(
        self,
        module: torch.nn.Module,
        joined: Joined,
        sites: list[fr.Site],
        methods: Sequence,
        requests: list[LayerRequest],
    ) -> Prepared:
        """Work on the rows of target and reference together.

        Args:
            sites: of the target in a call of its own.
            requests: of the methods at these sites.
        """
        state, rows = self._state, joined.rows
        whole = self._identify(module, joined)
        layout = whole.sequence.layout()
        tokens = with_shared(layout, (layout.target_grid,) * rows)
        if tokens != sites[0].tokens:  # texts were padded to one length
            requests = [LayerRequest.of(methods, replace(site, tokens=tokens)) for site in sites]
        count = state.host.rows.count(joined.call) - rows
        target, others = whole.some(slice(count)), whole.some(slice(count, None))
        reference = state.works.remember(
            (whole.key, rows, "reference"), lambda: ReferenceWork(others.sequence, others.rope)
        )
        angles = image_angles(others.sequence, others.rope, rows)

        def work(request: LayerRequest) -> LayerWork | None:
            if any(request):
                return BatchedWork(self._shared_work(target, rows, request, tokens, angles), reference, rows)
            if joined.text_mask is None:
                return None  # the host's own attention will do
            return state.works.remember((whole.key, rows, "all"), lambda: Work(whole.sequence, whole.rope, ()))

        layers = tuple(LayerState(work(each)) for each in requests)
        state.works.forget()
        return Prepared(Forward(layers, rows), joined.call)

    def _identify(self, module: torch.nn.Module, joined: Joined) -> Identified:
        """The sequence of all rows, with the padding of texts masked."""
        found = self._state.sequences.of(module, joined.call)
        if joined.text_mask is None:
            return found
        text, layout = joined.text_mask, found.sequence.layout()
        image = text.new_ones(len(text), len(layout) - layout.text_tokens)
        mask = torch.cat([text, image], dim=1).cpu()
        sequence = replace(found.sequence, key_mask=mask, mask_is_ours=True)
        return Identified((found.key, self._state.sequences.digest((text,))), sequence, found.rope)

    # ---- the target alone, with or without cached keys --------------------------------------------------------------

    def _prepare_target(
        self,
        target: Identified,
        tokens: fr.TokenLayout,
        requests: list[LayerRequest],
        snapshot: Snapshot | None,
        place: Hashable,
        device: torch.device,
    ) -> Prepared:
        """Work on the target's rows.

        Args:
            tokens: the target's layout.
            snapshot: the keys of the layers that share; None if none does.
            place: identifies the angles of these keys.
            device: of the computation.
        """
        angles = None if snapshot is None else snapshot.angles
        works: list[LayerWork | None] = [
            self._shared_work(target, place, each, tokens, angles) if any(each) else None for each in requests
        ]
        if snapshot is not None:
            order = [n for n, each in enumerate(requests) if each.shares]
            ahead = Prefetch([snapshot.layers[n] for n in order], device)
            rotation = Rotation(snapshot.angles, target.rope.pairing)
            for position, n in enumerate(order):
                works[n] = CachedWork(cast(SharedWork, works[n]), ahead, position, rotation, len(snapshot.grids))
        self._state.works.forget()
        return Prepared(Forward(tuple(map(LayerState, works))))
