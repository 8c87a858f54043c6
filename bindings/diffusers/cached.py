"""A reference that runs alone, once per step. A cache holds its keys and values for any number of targets."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

import fastrope as fr
from fastrope.sharing import Snapshot

from ..image.extended import image_angles
from ..image.fingerprints import Memo, values_of
from ..image.layers import Recorder, ReferenceWork
from .adapters import Adapters
from .calls import CallState
from .forwards import Forward, LayerState
from .identified import Identified
from .parallel import Split, context_parallel
from .sequences import Call, device_of


class CachedReference:
    """Finds a step's keys in a cache, and runs the reference for those that are missing.

    The run is a call of the same transformer, before the target's call begins.
    """

    def __init__(self, state: CallState, cache: fr.ReferenceCache, memo: Memo) -> None:
        self._state, self._cache, self._memo = state, cache, memo
        self._adapters = Adapters()

    def snapshot(
        self,
        module: torch.nn.Module,
        call: Call,
        alone: Call,
        reference: Identified,
        moment: tuple[int, float],
        layers: set[int],
    ) -> Snapshot:
        """The reference's keys in the given layers.

        Args:
            call: the target's.
            alone: the reference's own call, over the sequence ``reference``.
            moment: step and noise level.
        """
        self._cache.claim(self._state.model)
        name = self._name(call, alone, reference, moment)
        known = self._cache.find(name)
        missing = layers - set(known.layers if known else ())
        return known if known and not missing else self._cache.put(name, self._run(module, alone, reference, missing))

    def _name(self, call: Call, alone: Call, reference: Identified, moment: tuple[int, float]) -> Hashable:
        """Everything that the keys depend on, except the model's weights and the latents of that moment."""
        hidden = alone[self._state.host.rows.image]
        dtype, device = (hidden if isinstance(hidden, Tensor) else hidden[0]).dtype, device_of(hidden).type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        settings = call.get("joint_attention_kwargs") or call.get("attention_kwargs") or {}  # a LoRA's scale
        numbers = tuple(sorted((n, x) for n, x in settings.items() if isinstance(x, (int, float))))
        adapters = self._adapters.of(self._state.model)
        config = context_parallel(self._state.model)
        place = None if config is None else Split.of(config).place  # a process has the keys of some heads
        return *moment, dtype, autocast, reference.key, self._guidance(call), numbers, adapters, place

    def _guidance(self, call: Call) -> float | None:
        """The guidance that the transformer is given for the reference."""
        given = self._cache.source.arguments.get("guidance")
        guidance = call.get("guidance") if given is None else given
        return self._memo(values_of, guidance)[0] if isinstance(guidance, Tensor) else guidance

    def _run(self, module: torch.nn.Module, alone: Call, reference: Identified, layers: set[int]) -> Snapshot:
        state, cache = self._state, self._cache
        key, sequence, rope = reference[:3]
        if getattr(state.model, "is_cache_enabled", False):
            raise NotImplementedError(
                "enable_cache: expected a transformer without diffusers' own caches when a reference is run alone, "
                "received one that would take the reference's blocks for the target's; call disable_cache() first"
            )
        count, layout = state.host.rows.count(alone), sequence.layout()
        snapshot = Snapshot(image_angles(sequence, rope, count), (layout.target_grid,) * count)
        work = state.works.remember((key, "alone"), lambda: ReferenceWork(sequence, rope))
        works = [Recorder(work, cache.store, snapshot, n) if n in layers else None for n in range(len(state.layers))]
        with torch.no_grad():
            state.forwards.run(Forward(tuple(map(LayerState, works))), module, alone)
        return snapshot
