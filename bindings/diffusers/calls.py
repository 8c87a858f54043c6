"""From a transformer's own arguments to what every layer is to do: the sequence, the step, the modulations."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch

import fastrope as fr
from fastrope.modulations import MODULATIONS, Modulation

from .asking import Asked
from .dispatch import Slot, Work, structure_of
from .fingerprints import Fingerprints
from .hosts import Host
from .inspection import Inspector
from .layers import SharedWork
from .sequences import Call, JointSequence, device_of, refuse_tracing
from .steps import find_step

PLAN_BYTES = 1 << 30  # plans kept for reuse; a plan of FLUX Kontext at 1024 px takes some 50 MB
KNOWN_WORKS = 512  # those with numbers of their own in each of 60 layers, in two branches of guidance and four steps
KNOWN_SEQUENCES = 8


class Identified(NamedTuple):
    """The sequence of a call, its rotation, and what identifies both."""

    key: Hashable
    sequence: JointSequence
    rope: fr.RoPE


class Filler(Protocol):
    """What fills the slots in place of :class:`CallState` where a handle has a shared reference."""

    def reset(self) -> None:
        """Forget the forward before."""

    def fill(self, module, call: Call) -> dict[str, object] | None:
        """Fill the slots for one forward; arguments to call it with instead, if others."""


class CallState:
    """Shared by the layers of one handle. Before every forward it fills their slots.

    Args:
        host, model: the transformer and its row of the table.
        methods: modulations and methods, flat.
        slots: one per attention layer, in order of execution; ``installed`` has their modules and processors.
        kinds: the kind of each layer's block.
        pipe: the pipeline the handle was made for, if any; it knows the step.
    """

    def __init__(
        self,
        host: Host,
        model: torch.nn.Module,
        methods: Sequence,
        slots: Sequence[Slot],
        kinds: Sequence[str],
        pipe=None,
    ):
        self.host = host
        self.model = model
        self.methods = tuple(methods)
        self.slots = tuple(slots)
        self.axes_dim = host.axes_dim(model)
        self.told: tuple[int, int] | None = None
        self.inspector: Inspector | None = None
        self.shared: Filler | None = None
        self.installed: tuple[tuple[torch.nn.Module, object], ...] = ()
        self._kinds = tuple(kinds)
        self._known_kinds = tuple(dict.fromkeys(kinds))
        self._warned = False
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        self._signature = inspect.signature(type(model).forward)
        self._fingerprints = Fingerprints()
        self._sequences: OrderedDict[Hashable, tuple[JointSequence, fr.RoPE]] = OrderedDict()
        self._works: OrderedDict[Hashable, Work] = OrderedDict()
        self._alike: weakref.WeakValueDictionary[Hashable, Work] = weakref.WeakValueDictionary()

    @property
    def pipe(self):
        """The pipeline the handle was made for, if it is still there."""
        return self._pipe()

    def reset(self) -> None:
        """Empty all slots."""
        for slot in self.slots:
            slot.filled, slot.work, slot.probe = False, None, None

    def before_forward(self, module, args, kwargs) -> tuple[tuple, dict] | None:
        """Forward pre-hook of the transformer; other arguments where a reference joins the batch."""
        refuse_tracing()
        self.reset()
        if self.shared is not None:
            self.shared.reset()
        for attn, processor in self.installed:
            if attn.processor is not processor:  # by an IP-Adapter, say; the layer would go without its modulations
                raise NotImplementedError(
                    f"attention processors: expected those that fastrope.apply installed, received "
                    f"{type(attn.processor).__name__}; call handle.remove() before replacing them"
                )
        changed = None
        if self.methods or self.inspector is not None:
            call = self._signature.bind_partial(module, *args, **kwargs).arguments
            call.pop(next(iter(self._signature.parameters)))  # self
            changed = self._fill(module, call) if self.shared is None else self.shared.fill(module, call)
        for slot in self.slots:
            slot.filled = True
        return None if changed is None else ((), changed)

    def _fill(self, module, call: Call) -> None:
        key, sequence, rope = self.sequence_of(module, call)
        device = device_of(call.get(self.host.hidden))
        sites = self._sites(call, sequence)
        asked = [Asked.of(self.methods, site) for site in sites] if sites else [Asked(self.methods)] * len(self.slots)
        layers = [each.modulations for each in asked]
        for slot, work in zip(self.slots, self._works_for(key, sequence, rope, layers, device), strict=True):
            slot.work = work
        self._normalise(key, sequence, rope, sites, asked)
        if self.inspector is not None:
            plain = self._work(key, sequence, rope, (), ())
            for slot, site in zip(self.slots, sites, strict=True):
                slot.probe = self.inspector.probe(site, sequence, plain)

    def _sites(self, call: Call, sequence: JointSequence) -> list[fr.Site]:
        """One site per layer; none where nobody asks."""
        if self.inspector is None and all(isinstance(m, MODULATIONS) for m in self.methods):
            return []
        return self.sites(*self.step(call), sequence.layout())

    def sites(self, step: int, num_steps: int, tokens: fr.TokenLayout) -> list[fr.Site]:
        """One site per layer."""
        where = step, num_steps, self.axes_dim, self.host.spatial_axes, len(self.slots)
        return [fr.Site(tokens, layer, *where, kind, self._known_kinds) for layer, kind in enumerate(self._kinds)]

    def step(self, call: Call) -> tuple[int, int]:
        """The step a call belongs to, and how many there are."""
        return self.told or self._step(call) or self._first_step()

    def _step(self, call: Call) -> tuple[int, int] | None:
        pipe = self._pipe()
        return pipe and find_step(pipe, call.get(self.host.timestep), self.host.model_time)

    def _first_step(self) -> tuple[int, int]:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "fastrope: nothing tells the denoising step, so methods see step 0 in every call; apply to the "
                "pipeline, or call handle.set_step(step, num_steps)",
                stacklevel=2,
            )
        return 0, fr.Site.num_steps

    # ---- sequences --------------------------------------------------------------------------------------------------

    def sequence_of(self, module, call: Call) -> Identified:
        """What a call is over."""
        identified = self.host.identify(module, call)
        key = self._fingerprints.key((*identified, self.host.theta(module)))
        return Identified(key, *self._sequence(module, key, identified, device_of(call.get(self.host.hidden))))

    def digest(self, parts) -> Hashable:
        """The content of tensors, modulations and values as something to compare."""
        return self._fingerprints.key(parts)

    def _sequence(
        self, module, key: Hashable, identified: tuple, device: torch.device
    ) -> tuple[JointSequence, fr.RoPE]:
        if key not in self._sequences:
            sequence = self.host.describe(*identified)
            wide = sequence.positions.to(torch.float64)
            rope = fr.RoPE.axial(wide, self.axes_dim, self.host.theta(module), self.host.pairing)
            self._check_embedding(module, sequence, rope, device)
            self._sequences[key] = sequence, rope
            if len(self._sequences) > KNOWN_SEQUENCES:
                self._sequences.popitem(last=False)
        self._sequences.move_to_end(key)
        return self._sequences[key]

    def _check_embedding(self, module, sequence: JointSequence, rope: fr.RoPE, device: torch.device) -> None:
        """Modulated layers rotate by our angles: they must be the host's, whatever was done to its embedding."""
        with torch.no_grad():
            gap = (self.host.cosines(module, sequence, device).cpu().double() - rope.angles.cos().double()).abs().max()
        if not gap < 1e-3:
            raise NotImplementedError(
                f"{type(module).__name__}: expected the rotary embedding of {self.host.package} with theta "
                f"{self.host.theta(module):g}, received another one (its cosines differ by {float(gap):.2g})"
            )

    # ---- work -------------------------------------------------------------------------------------------------------

    def _works_for(self, key, sequence, rope, layers: list[tuple[Modulation, ...]], device) -> list[Work | None]:
        """The work of every layer; None where nothing is modulated."""
        distinct: list[tuple[Modulation, ...]] = []
        index = []
        for modulations in layers:
            if not distinct or not _same(distinct[-1], modulations):
                distinct.append(modulations)
            index.append(len(distinct) - 1)
        contents = [self._fingerprints.key(modulations) for modulations in distinct]
        works = []
        for modulations, content in zip(distinct, contents, strict=True):
            work = self._work(key, sequence, rope, content, modulations) if modulations else None
            works.append(work if work is not None and work.modulates(self._applied, device) else None)
        self.forget()
        return [works[n] for n in index]

    def _normalise(self, key, sequence, rope, sites: list[fr.Site], asked: list[Asked]) -> None:
        """Where a method wants the statistics of a reference in the sequence itself."""
        for slot, site, (modulations, sharings) in zip(self.slots, sites, asked, strict=False):
            if sharings:
                base = self._work(key, sequence, rope, self.digest(modulations), modulations)
                slot.work = SharedWork(base, sharings, site.tokens)

    @property
    def _applied(self) -> bool:
        return self.slots[0].applied or self.slots[0].compiled

    def _work(self, key, sequence, rope, content: Hashable, modulations: tuple) -> Work:
        return self.remember(
            (key, content),
            lambda: self.alike(key, modulations, lambda like: Work(sequence, rope, modulations, like=like)),
        )

    def alike(self, key: Hashable, modulations: tuple, make: Callable[[Work | None], Work]) -> Work:
        """``make(like)``, where ``like`` is the latest work under the same key that differs in numbers alone, if any:
        schedules change them from layer to layer and step to step, a plan's tables do not depend on them."""
        structure = key, self.digest(structure_of(modulations))
        work = make(self._alike.get(structure))
        self._alike[structure] = work
        return work

    def remember(self, key: Hashable, make: Callable[[], Work]) -> Work:
        """The work of an earlier call under the same key, or a new one."""
        if key not in self._works:
            self._works[key] = make()
        self._works.move_to_end(key)
        return self._works[key]

    def forget(self) -> None:
        """Drop what was used longest ago, until the plans left are ``KNOWN_WORKS`` and fit into ``PLAN_BYTES``."""
        while len(self._works) > 1 and (len(self._works) > KNOWN_WORKS or self._nbytes > PLAN_BYTES):
            self._works.popitem(last=False)

    @property
    def _nbytes(self) -> int:
        """Memory of the plans, bytes; they share tensors."""
        held = {id(t): t.nbytes for work in self._works.values() for plan in work.plans for t in plan.tensors}
        return sum(held.values())


def _same(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
