"""A reference that is run alone, once per step, and whose keys and values are kept for any number of targets."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

import fastrope as fr
from fastrope.sharing import Snapshot

from .adapters import Adapters
from .calls import CallState, Identified
from .fingerprints import Readings
from .layers import Recorder, ReferenceWork
from .sequences import Call, device_of


class KeptReference:
    """Finds what a cache holds of a step, and runs the reference for what it does not.

    The run is a forward of the same transformer, inside the target's: its hooks come back here, see :attr:`recording`.
    """

    def __init__(self, state: CallState, cache: fr.ReferenceCache):
        self._state = state
        self._cache = cache
        self._recording: tuple[Snapshot, set[int]] | None = None
        self._guidance, self._adapters = Readings(), Adapters()

    @property
    def recording(self) -> bool:
        """Whether the forward under way is the reference's own."""
        return self._recording is not None

    def record(self, module, call: Call) -> None:
        """Fill the slots for the reference's own forward."""
        (snapshot, layers), state = self._recording, self._state
        key, sequence, rope = state.sequence_of(module, call)
        reference = state.remember((key, "alone"), lambda: ReferenceWork(sequence, rope))
        for n in layers:
            state.slots[n].work = Recorder(reference, self._cache.keep, snapshot, n)

    def snapshot(
        self, module, call: Call, alone: Call, own: Identified, moment: tuple[int, float], layers: set[int]
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
        if not missing:
            return known
        return self._cache.put(name, self._run(module, alone, _empty(own, self._state.host.rows.count(alone)), missing))

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

    def _run(self, module, alone: Call, fresh: Snapshot, layers: set[int]) -> Snapshot:
        if getattr(self._state.model, "is_cache_enabled", False):
            raise NotImplementedError(
                "enable_cache: expected a transformer without diffusers' own caches when a reference is run alone, "
                "received one that would take the reference's blocks for the target's; call disable_cache() first"
            )
        self._recording = fresh, layers
        try:
            with torch.no_grad():
                module(**alone)
        finally:
            self._recording = None
        self._state.reset()
        return fresh


def _empty(own: Identified, rows: int) -> Snapshot:
    """A snapshot of a reference of so many rows, to be filled."""
    layout = own.sequence.layout()
    angles = own.rope.angles[..., layout.target, :]
    angles = angles.repeat(rows, 1) if angles.ndim == 2 else angles.flatten(0, 1)
    return Snapshot(angles, (layout.target_grid,) * rows)
