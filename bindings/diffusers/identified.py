"""The joint sequence of a call, its rotation, and a key by which both are known again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import fastrope as fr
from fastrope.device import wide_on_cpu
from fastrope.rescaling import Rescaling

from ..image.fingerprints import Fingerprints
from ..image.rescaled import Rescaled
from ..image.sequence import JointSequence
from .hosts import Host
from .parallel import context_parallel
from .sequences import Call, device_of

KNOWN = 8  # sequences that are kept


class Identified(NamedTuple):
    """The sequence of a call, the model's own rotation of it, a key that identifies both, and other frequencies, if
    any."""

    key: Hashable
    sequence: JointSequence
    rope: fr.RoPE
    other: Rescaled | None = None

    def rescaled(self, rescaling: Rescaling | None) -> Identified:
        """The same sequence at other frequencies."""
        return self if rescaling is None else self._replace(other=Rescaled(self.rope, rescaling))

    @property
    def name(self) -> Hashable:
        """What identifies the sequence and its frequencies."""
        return self.key, self.other and self.other.rescaling

    def some(self, rows: slice) -> Identified:
        """Some rows of the batch, under the same key."""

        def of(x: torch.Tensor | None, alike: int = 1) -> Any:
            return x if x is None or x.ndim == alike else x[rows]

        s = self.sequence
        sequence = replace(s, positions=of(s.positions, 2), key_mask=of(s.key_mask), bonus=of(s.bonus))
        return self._replace(sequence=sequence, rope=replace(self.rope, angles=of(self.rope.angles, 2)))


class Sequences:
    """The sequences of a transformer's calls, described once for every distinct content.

    Args:
        host: the transformer's row of the table.
        axes_dim: channels of its position axes.
    """

    def __init__(self, host: Host, axes_dim: tuple[int, ...]) -> None:
        self._host, self._axes_dim = host, axes_dim
        self._fingerprints = Fingerprints()
        self._known: OrderedDict[Hashable, tuple[JointSequence, fr.RoPE]] = OrderedDict()

    def digest(self, parts: Any) -> Hashable:
        """A hashable value for the content of tensors, modulations and plain values."""
        return self._fingerprints.key(parts)

    def of(self, module: torch.nn.Module, call: Call) -> Identified:
        """The sequence of a call."""
        identified = self._host.identify(module, call)
        key = self.digest((*identified, self._host.theta(module)))
        if key not in self._known:
            self._known[key] = self._described(module, identified, device_of(call.get(self._host.hidden)))
            if len(self._known) > KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return Identified(key, *self._known[key])

    def _described(
        self, module: torch.nn.Module, identified: tuple, device: torch.device
    ) -> tuple[JointSequence, fr.RoPE]:
        host, sequence = self._host, self._host.describe(*identified)
        wide = wide_on_cpu(sequence.positions)
        rope = fr.RoPE.axial(wide, self._axes_dim, host.theta(module), host.pairing)
        if context_parallel(module) is None:  # which splits the table of some hosts
            self._require_its_angles(module, sequence, rope, device)
        return sequence, rope

    def _require_its_angles(
        self, module: torch.nn.Module, sequence: JointSequence, rope: fr.RoPE, device: torch.device
    ) -> None:
        """Require that our angles are the host's, because modulated layers rotate by ours."""
        host = self._host
        with torch.no_grad():
            gap = (host.cosines(module, sequence, device).cpu().double() - rope.angles.cos().double()).abs().max()
        if not gap < 1e-3:
            raise NotImplementedError(
                f"{type(module).__name__}: expected the rotary embedding of {host.package} with theta "
                f"{host.theta(module):g}, received another one (its cosines differ by {float(gap):.2g})"
            )
