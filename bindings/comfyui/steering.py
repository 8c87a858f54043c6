"""Methods bound to a model of ComfyUI: what a node adds to a clone, and what happens around every call of the model."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

import torch

import fastrope as fr
from fastrope.activity import flat_methods
from fastrope.device import wide_on_cpu
from fastrope.guidance import Guidance, guidance_of
from fastrope.methods.schedules import rests
from fastrope.modulations import Modulation
from fastrope.rescaling import Rescaling
from fastrope.sharing import Snapshot

from ..image.extended import image_angles, target_work, with_shared
from ..image.fingerprints import Fingerprints
from ..image.guided import GuidedKeys, GuidedWork
from ..image.inspection import Inspector, Record
from ..image.layers import CachedWork, Recorder, ReferenceWork, SharedWork
from ..image.prefetch import Prefetch
from ..image.requests import LayerRequest
from ..image.rescaled import Rescaled, kin
from ..image.rotation import Rotation
from ..image.sequence import JointSequence
from ..image.work import LayerWork, Work
from ..image.works import Works
from .bound import Bound, acting
from .calls import ModelCall, Positions
from .compiled import CompiledDoor
from .host import ARGUMENTS, called, is_compiled, key_mask
from .marks import Joined, require_marks
from .models import Call, Family, family_of
from .references import LatentReference
from .rescaled import requested_rescaling
from .sites import Sites
from .steps import Step, Steps

KEY = "fastrope"
KNOWN = 64  # sequences and steps that are remembered within a run


class Steering:
    """Methods of one patched model, and what their calls have in common. Immutable but for its memory.

    Args:
        bound: the methods, in the order of their nodes; the order does not matter.
        watchers: who looks at the attention, and where it is written.
        reference: a latent that methods share attention with.
        backend: as in :func:`fastrope.attention`.
    """

    def __init__(
        self,
        bound: Sequence[Bound] = (),
        watchers: Sequence[tuple[Inspector, Record]] = (),
        reference: LatentReference | None = None,
        backend: str = "auto",
    ) -> None:
        self.bound, self.watchers, self.reference, self.backend = tuple(bound), tuple(watchers), reference, backend
        flat_methods([each.method for each in self.bound], "method")
        self._lock = threading.RLock()  # guidance may run its branches on several devices, each in a thread
        self._steps = Steps()
        self._doors: dict[int, CompiledDoor] = {}  # by the transformer, which compiled code holds as well
        self.forget()

    def forget(self, *_: Any) -> None:
        """Let go of all tensors; the host calls it when a run is over."""
        self._positions: OrderedDict[Hashable, Positions] = OrderedDict()
        self._requests: OrderedDict[Hashable, list[LayerRequest]] = OrderedDict()
        self._digest = Fingerprints().key
        self._works = Works(self._digest)
        self._tables: OrderedDict[Hashable, Rescaled] = OrderedDict()
        if self.reference is not None:
            self.reference.forget()

    def begin(self, *_: Any) -> None:
        """A run begins: records are of the latest run."""
        for _inspector, record in self.watchers:
            record._seen.clear()

    def around(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        """The host's call of ``BaseModel.apply_model``, steered."""
        arguments = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        with self._lock:
            call = self.prepare(executor.class_obj, arguments, executor)
        return self._run(executor, arguments, call)

    def check(self, executor: Callable, model: Any, noise_shape: Any, conds: Mapping, *args: Any, **kwargs: Any) -> Any:
        """The host's preparation of a run.

        Raises:
            ValueError: a node that joined prompts is wired by half.
        """
        marks = [Joined.of(options) for some in conds.values() for options in some or ()]
        require_marks([b.node for b in self.bound if b.node is not None], marks)
        return executor(model, noise_shape, conds, *args, **kwargs)

    def _run(self, executor: Callable, arguments: Mapping[str, Any], call: ModelCall) -> Any:
        given = arguments.get("transformer_options") or {}
        if is_compiled(given):
            call.surround(given)
            return self._door(executor.class_obj).run(call, given, lambda options: called(executor, arguments, options))
        if call.idle:
            return called(executor, arguments, given)
        out = called(executor, arguments, call.options(given))
        call.finish()
        return out

    def _door(self, model: Any) -> CompiledDoor:
        family, transformer = family_of(model)
        return self._doors.setdefault(id(transformer), CompiledDoor(family, transformer))

    # ---- preparing a call --------------------------------------------------------------------------------------------

    def prepare(self, model: Any, arguments: Mapping[str, Any], executor: Callable | None = None) -> ModelCall:
        """What the layers of a call do. With a reference latent, ``executor`` runs the model on it first, unless what
        it shares at this step is known.

        Raises:
            NotImplementedError: a model or a call that cannot be steered.
            ValueError: methods that do not go with the call.
        """
        family, transformer = family_of(model)
        options = arguments.get("transformer_options") or {}
        key, positions = self._positions_of(family, transformer, arguments)
        layout, device = positions.sequence.layout(), arguments["x"].device
        methods = acting(self.bound, arguments, layout)
        step, kinds = self._steps.find(options), family.kinds(transformer)
        alone: dict[str, Any] = {}
        its_key, its = key, positions
        if self.reference is not None:
            alone = self.reference.call(model, arguments, step.sigma)
            its_key, its = self._positions_of(family, transformer, alone)
            layout = with_shared(layout, (its.sequence.layout().target_grid,) * self.reference.rows)
            key = key, its_key
        sites = Sites(layout, step, family.axes_dim(transformer), kinds, family.theta(transformer))
        obstacles = {
            "this model, whose rotation no patch reaches": not family.patched,
            "compiled code, which would keep the positions of its first step": is_compiled(options),
            "a reference latent, whose keys have the model's own positions": self.reference is not None,
        }
        rescaling, rescaled = requested_rescaling(methods, sites[0], obstacles), None
        if rescaling is not None:
            rescaled = _remember(self._tables, (key, rescaling), lambda: Rescaled(positions.rope, rescaling))
        requests = self._requests_of((key, rescaling, step.index, step.count, tuple(map(id, methods))), methods, sites)
        applied = is_compiled(options) or not (family.rotates_last and positions.trusted)
        sharing = [n for n, each in enumerate(requests) if each.shares]
        if guidance_of(methods, sites[0]) is not None:
            works = self._guided(key, positions, rescaled, requests, methods, sites)
        else:
            names = [(tuple(map(id, modulations)), sharings) for modulations, sharings in requests]
            distinct = dict(zip(names, requests, strict=True))  # most layers ask for the same
            made = {n: self._work(key, positions, rescaled, r, layout, applied, device) for n, r in distinct.items()}
            works = [made[name] for name in names]
        if sharing:
            snapshot = self._snapshot(executor, alone, family, transformer, (its_key, its), step, set(sharing))
            for n, work in zip(sharing, self._sharing(key, positions, requests, layout, snapshot, device), strict=True):
                works[n] = work
        probes = self._probes(key, sites, positions, rescaled) if self.watchers else [None] * len(kinds)
        self._works.forget()
        return ModelCall(family, transformer, positions, tuple(works), tuple(probes), rescaled, self.backend)

    # ---- a reference latent ------------------------------------------------------------------------------------------

    def _snapshot(
        self, executor: Any, alone: Mapping[str, Any], family: Family, transformer: Any,
        at: tuple[Hashable, Positions], step: Step, layers: set[int],
    ) -> Snapshot:  # fmt: skip
        """What the reference shares at a step: known, or of a call of its own."""
        (key, positions), reference = at, cast(LatentReference, self.reference)
        weights = getattr(executor.class_obj.current_patcher, "patches_uuid", None)  # LoRAs
        key = key, round(step.sigma, 6), weights
        known = reference.snapshot(key, layers)
        if known is not None:
            return known
        sequence, rope = positions.sequence, positions.rope
        snapshot = Snapshot(
            image_angles(sequence, rope, reference.rows), (sequence.layout().target_grid,) * reference.rows
        )
        plain = ReferenceWork(sequence, rope)
        count = len(family.kinds(transformer))
        works = [Recorder(plain, reference.store, snapshot, n) if n in layers else None for n in range(count)]
        self._run(
            executor,
            alone,
            ModelCall(family, transformer, positions, tuple(works), (None,) * count, None, self.backend),
        )
        return reference.put(key, snapshot)

    def _sharing(
        self, key: Hashable, positions: Positions, requests: list[LayerRequest], layout: fr.TokenLayout,
        snapshot: Snapshot, device: torch.device,
    ) -> list[LayerWork]:  # fmt: skip
        """The work of all layers that share, in order."""
        sharing = [n for n, each in enumerate(requests) if each.shares]
        ahead = Prefetch([snapshot.layers[n] for n in sharing], device)
        turned = Rotation(snapshot.angles, positions.rope.pairing)
        found: list[LayerWork] = []
        for position, n in enumerate(sharing):
            modulations = requests[n].modulations

            def make(like: Work | None, modulations: tuple = modulations) -> Work:
                return target_work(positions.sequence, positions.rope, modulations, snapshot.angles, like)

            target = self._remembered((key, "shared"), modulations, make)
            found.append(CachedWork(SharedWork(target, requests[n], layout), ahead, position, turned))
        return found

    # ---- the parts of a call -----------------------------------------------------------------------------------------

    def _positions_of(
        self, family: Family, transformer: Any, arguments: Mapping[str, Any]
    ) -> tuple[Hashable, Positions]:
        call, mask = Call.of(arguments), key_mask(arguments.get("attention_mask"), arguments)
        trusted = family.own_angles(transformer)
        key = family.transformer, call, trusted, None if mask is None else tuple(map(tuple, mask.tolist()))

        def make() -> Positions:
            layout, places = family.describe(transformer, call)
            if mask is not None:
                mask_of_all = torch.cat([mask, mask.new_ones(len(mask), len(layout) - mask.shape[1])], dim=1)
            sequence = JointSequence(places, lambda: layout, None if mask is None else mask_of_all)
            return Positions(sequence, family.rope(transformer, wide_on_cpu(places)), trusted)

        return key, _remember(self._positions, key, make)

    def _requests_of(self, key: Hashable, methods: list, sites: Sites) -> list[LayerRequest]:
        def make() -> list[LayerRequest]:
            awake = [method for method in methods if not rests(method, sites[0])]
            if not awake:
                return [LayerRequest()] * len(sites.kinds)
            try:
                return [LayerRequest.of(awake, site) for site in sites.all()]
            except ValueError as error:
                if sites.layout.reference_grids or "reference" not in str(error):
                    raise
                raise ValueError(
                    f"{error}. Give the positive conditioning a reference: a ReferenceLatent node, or an encoder with "
                    "an image"
                ) from error

        return _remember(self._requests, key, make)

    def _work(
        self, key: Hashable, positions: Positions, rescaled: Rescaled | None, request: LayerRequest,
        layout: fr.TokenLayout, applied: bool, device: torch.device,
    ) -> LayerWork | None:  # fmt: skip
        modulations, sharings = request
        if request.shares or not (modulations or sharings):
            return None  # layers that share come later
        work = self._plain_work(key, positions, rescaled, modulations)
        if sharings:
            return SharedWork(work, request, layout)
        return work if work.modulates(applied, device) else None

    def _guided(
        self, key: Hashable, positions: Positions, rescaled: Rescaled | None, requests: list[LayerRequest],
        methods: list, sites: Sites,
    ) -> list[LayerWork | None]:  # fmt: skip
        """The work of all layers over a text with a negative prompt.

        Raises:
            NotImplementedError: what attends to further keys, or looks at attention.
        """
        if self.watchers or self.reference is not None or any(each.sharings for each in requests):
            raise NotImplementedError(
                "NAG: expected neither Inspect attention nor Untwisting RoPE with a reference latent or AdaIN beside "
                "it, received one of them; remove it"
            )
        rope, gain = (positions.rope, None) if rescaled is None else (rescaled.rope, rescaled.gain)
        found: list[LayerWork | None] = []
        for (modulations, _), site in zip(requests, sites.all(), strict=True):
            _refuse_moved(positions, modulations)
            guidance = cast(Guidance, guidance_of(methods, site))

            def make(modulations: tuple = modulations, span: slice = guidance.negative) -> GuidedKeys:
                return GuidedKeys(positions.sequence, rope, gain, modulations, span)

            span = guidance.negative.start, guidance.negative.stop
            name = key, rescaled and rescaled.rescaling, self._digest(modulations), "guided", *span
            keys = self._works.remember(name, make)
            if keys.moves:
                positions.require_own("NAG, on a model whose text has positions,")
            found.append(GuidedWork(keys, guidance, positions.sequence.masked))
        return found

    def _plain_work(
        self, key: Hashable, positions: Positions, rescaled: Rescaled | None, modulations: tuple[Modulation, ...]
    ) -> Work:
        """The same for the same modulations."""
        _refuse_moved(positions, modulations)
        rescaling = rescaled and rescaled.rescaling

        def make(like: Work | None) -> Work:
            return Work(positions.sequence, positions.rope, modulations, like=like, rescaled=rescaled)

        return self._remembered(kin(key, rescaled), modulations, make, rescaling)

    def _remembered(
        self, key: Hashable, modulations: tuple[Modulation, ...], make: Callable[[Work | None], Work],
        rescaling: Rescaling | None = None,
    ) -> Work:  # fmt: skip
        """Work of an earlier call, or a new one that shares the plans of one whose modulations differ in numbers, or
        whose positions differ in frequencies."""
        name = key, rescaling, self._digest(modulations)
        return self._works.remember(name, lambda: self._works.alike(key, modulations, make))

    def _probes(
        self, key: Hashable, sites: Sites, positions: Positions, rescaled: Rescaled | None
    ) -> list[Callable | None]:
        plain = self._plain_work(key, positions, rescaled, ())
        found: list[Callable | None] = []
        for layer in range(len(sites.kinds)):
            looks = [each[0].probe(sites[layer], positions.sequence, plain) for each in self.watchers]
            found.append(_all(looks) if any(looks) else None)
        return found


def _refuse_moved(positions: Positions, modulations: tuple[Modulation, ...]) -> None:
    if any(isinstance(m, fr.QueryScale) for m in modulations):
        positions.require_own("a method that scales positions (LooseRoPE)")


def _remember(known: OrderedDict, key: Hashable, make: Callable[[], Any]) -> Any:
    if key not in known:
        known[key] = make()
        if len(known) > KNOWN:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def _all(looks: Sequence[Callable | None]) -> Callable:
    def look(*seen: Any) -> None:
        for each in filter(None, looks):
            each(*seen)

    return look
