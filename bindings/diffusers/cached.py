"""A reference that is run alone, once per step, and whose keys and values are kept for any number of targets."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

import fastrope as fr
from fastrope.sharing import Snapshot

from ..image.layers import Recorder, ReferenceWork
from .adapters import Adapters
from .calls import CallState, Identified
from .fingerprints import Readings
from .forwards import Forward, LayerState
from .sequences import Call, device_of


class CachedReference:
    """Finds what a cache holds of a step, and runs the reference for what it does not.

    The run is a call of the same transformer before the target's begins: the hooks are the same, the forward another.
    """

    def __init__(self, state: CallState, cache: fr.ReferenceCache) -> None:
        self._state = state
        self._cache = cache
        self._guidance, self._adapters = Readings(), Adapters()

    def snapshot(
        self,
        module: torch.nn.Module,
        call: Call,
        alone: Call,
        own: Identified,
        moment: tuple[int, float],
        layers: set[int],
    ) -> Snapshot:
        """What is kept of the reference; it is run for layers that are not there.

        Args:
            call: the target's.
            alone: the reference's own call, over ``own``.
            moment: step and noise level.
            layers: which are needed.
        """
        self._cache.claim(self._state.model)
        name = self._name(call, alone, own, moment)
        known = self._cache.find(name)
        missing = layers - set(known.layers if known else ())
        return known if known and not missing else self._cache.put(name, self._run(module, alone, own, missing))

    def _name(self, call: Call, alone: Call, own: Identified, moment: tuple[int, float]) -> Hashable:
        """All that the keys depend on, but for the model's weights and what the source makes of a moment."""
        hidden = alone[self._state.host.rows.image]
        dtype, device = (hidden if isinstance(hidden, Tensor) else hidden[0]).dtype, device_of(hidden).type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        settings = call.get("joint_attention_kwargs") or call.get("attention_kwargs") or {}  # a LoRA's scale
        numbers = tuple(sorted((n, x) for n, x in settings.items() if isinstance(x, (int, float))))
        return *moment, dtype, autocast, own.key, self._strength(call), numbers, self._adapters.of(self._state.model)

    def _strength(self, call: Call) -> float | None:
        """The number that the transformer is given as guidance."""
        given = self._cache.source.arguments.get("guidance")
        guidance = call.get("guidance") if given is None else given
        return self._guidance.of(guidance)[0] if isinstance(guidance, Tensor) else guidance

    def _run(self, module: torch.nn.Module, alone: Call, own: Identified, layers: set[int]) -> Snapshot:
        state, cache = self._state, self._cache
        if getattr(state.model, "is_cache_enabled", False):
            raise NotImplementedError(
                "enable_cache: expected a transformer without diffusers' own caches when a reference is run alone, "
                "received one that would take the reference's blocks for the target's; call disable_cache() first"
            )
        snapshot = _empty(own, state.host.rows.count(alone))
        reference = state.remember((own.key, "alone"), lambda: ReferenceWork(own.sequence, own.rope))
        forward = Forward(
            tuple(
                LayerState(Recorder(reference, cache.keep, snapshot, n) if n in layers else None)
                for n in range(len(state.layers))
            )
        )
        with torch.no_grad():
            state.forwards.run(forward, module, alone)
        return snapshot


def _empty(own: Identified, rows: int) -> Snapshot:
    """A snapshot of a reference of so many rows, to be filled."""
    layout = own.sequence.layout()
    angles = own.rope.angles[..., layout.target, :]
    angles = angles.repeat(rows, 1) if angles.ndim == 2 else angles.flatten(0, 1)
    return Snapshot(angles, (layout.target_grid,) * rows)
