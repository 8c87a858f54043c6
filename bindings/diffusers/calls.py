"""From the arguments of a transformer's call to the work of every layer: sequence, step, modulations, plans."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import fastrope as fr
from fastrope.checks import require
from fastrope.guidance import Guidance, guidance_of
from fastrope.modulations import MODULATIONS, Modulation
from fastrope.rescaling import Rescaling, rescales, rescaling_of

from ..image.fingerprints import Memo
from ..image.guided import GuidedKeys, GuidedWork
from ..image.inspection import Inspector
from ..image.layers import SharedWork
from ..image.requests import LayerRequest
from ..image.rescaled import kin
from ..image.work import LayerWork, Work
from ..image.works import Works
from .agreement import agreeing, digest_of, require_alike
from .checkpoints import follow
from .forwards import Forward, Forwards, LayerState, call_frame, refuse_checkpoint, within_checkpoint
from .hosts import Host
from .identified import Identified, Sequences
from .layer_op import Layer
from .parallel import Split, context_parallel, require_shares
from .sequences import Call, device_of, refuse_tracing
from .steps import Step, find_sigma, find_step, running_pipeline


class Prepared(NamedTuple):
    """What a forward does, the arguments to call the transformer with (None keeps those of the call), and what tells it
    from forwards that do something else."""

    forward: Forward
    arguments: dict[str, Any] | None = None
    content: Any = None


class CallState:
    """Hooks of one handle, which make a :class:`.forwards.Forward` for every call, and what calls have in common.

    Forwards of several threads are made one at a time. Their layers run side by side.

    Args:
        host: the transformer's row of the table.
        called, model: the module that is called, and the transformer itself; they differ if a compiler wrapped it.
        methods: modulations and methods, flat.
        kinds: the kind of each layer's block, in order of execution.
        backend: with the plain attention, as in :func:`fastrope.apply`.
        applied: True if the host rotates queries and keys.
        pipe: the pipeline that the handle was made for, if any.
    """

    def __init__(
        self,
        host: Host,
        called: torch.nn.Module,
        model: torch.nn.Module,
        methods: Sequence,
        kinds: Sequence[str],
        backend: tuple[str, str | Callable | None],
        applied: bool,
        pipe: Any = None,
    ) -> None:
        self.host = host
        self.called, self.model = called, model
        self.methods = tuple(methods)
        self.forwards = Forwards(called, len(kinds))
        self.layers = tuple(Layer(self.forwards, n, *backend, applied) for n in range(len(kinds)))
        self.axes_dim = host.axes_dim(model)
        self.inspector: Inspector | None = None
        self.shares = False
        self.sent: tuple[dict[str, int], ...] = ()  # by the latest call
        self.prepare: Callable[[torch.nn.Module, Call, tuple], Prepared] = self._prepare
        self.installed: list[tuple[torch.nn.Module, object]] = []  # attention modules and their processors
        self._user_step, self._last_user_step = threading.local(), None
        self._kinds = tuple(kinds)
        self._known_kinds = tuple(dict.fromkeys(kinds))
        self._warned = False
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        self._signature = inspect.signature(type(model).forward)
        self._memo = Memo()
        self.sequences = Sequences(host, self.axes_dim)
        self.works = Works(self.sequences.digest)

    @property
    def bound(self) -> bool:
        """True until the handle is removed."""
        return self.layers[0].handle is not None

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def before_forward(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Forward pre-hook of the transformer. Returns other arguments if a reference joins the batch."""
        refuse_tracing()
        with self.forwards.lock:
            self.forwards.admit()
            if not self.bound:  # the handle was removed while this call waited for the lock
                return None
            config = context_parallel(self.model)
            with agreeing(config):
                self._require_its_processors()
                if within_checkpoint():
                    refuse_checkpoint()
                if torch.is_grad_enabled():
                    follow(self.model, self.forwards)
                forward = self.forwards.settled()
                made = self._prepared(module, args, kwargs) if forward is None else Prepared(forward)
                forward, arguments, content = made
                if config is not None:
                    call = self._call(module, args, kwargs) if arguments is None else arguments
                    forward = self._split(config, module, call, forward, content)
            require(self.bound, "handle", "one that stays bound while its methods run", "a removed one")
            self.forwards.enter(call_frame(), forward)
        return None if arguments is None else ((), arguments)

    def _require_its_processors(self) -> None:
        for attn, processor in self.installed:
            if attn.processor is not processor:  # an IP-Adapter's, say: the layer would lose its modulations
                raise NotImplementedError(
                    f"attention processors: expected those that fastrope.apply installed, received "
                    f"{type(attn.processor).__name__}; call handle.remove() before replacing them"
                )

    def after_forward(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook, called after errors, too. It cuts the reference's rows from the output."""
        forward = self.forwards.leave(call_frame())
        if forward is None or not forward.appended or output is None:
            return None
        if isinstance(output, tuple):
            return self.host.rows.cut(output[0], forward.appended), *output[1:]
        return replace(output, sample=self.host.rows.cut(output.sample, forward.appended))

    def _prepared(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Prepared:
        methods = self.methods
        if not methods and self.inspector is None:
            return Prepared(self.forwards.idle)
        return self.prepare(module, self._call(module, args, kwargs), methods)

    def _call(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Call:
        """The arguments of a call, by name."""
        call = self._signature.bind_partial(module, *args, **kwargs).arguments
        call.pop(next(iter(self._signature.parameters)))  # self
        return call

    def _split(self, config: Any, module: torch.nn.Module, call: Call, forward: Forward, content: Any) -> Forward:
        """A forward whose sequence diffusers is about to split over processes. All of them must do the same."""
        found = self.sequences.of(module, call)
        tokens = found.sequence.layout()
        if self.inspector is not None or tokens.order != "text-first" or tokens.padding:
            raise NotImplementedError("context parallelism: expected no inspection, and a sequence that is text and "
                                      f"then image, received {tokens}")  # fmt: skip
        require_shares(config, tokens)
        require_alike(config, digest_of((found.key, content)), call)
        self.sent = tuple({} for _ in self.layers)
        return replace(forward, split=(Split.of(config), tokens), sent=self.sent)

    def _prepare(self, module: torch.nn.Module, call: Call, methods: tuple) -> Prepared:
        found, inspector, count = self.sequences.of(module, call), self.inspector, len(self.layers)
        # One site per layer. Modulations alone need none, so that the step and the layout may be unknown.
        needed = inspector is not None or not all(isinstance(m, MODULATIONS) for m in methods)
        sites = self._sites(call, methods, found.sequence.layout()) if needed else []
        rescaling = rescaling_of(methods, sites[0]) if needed else None
        requests = [LayerRequest.of(methods, site) for site in sites] or [LayerRequest(methods)] * count
        guidances = [guidance_of(methods, site) for site in sites]
        if inspector is not None or any(guidances) or any(map(any, requests)):  # else the model's own table will do
            found = found.rescaled(rescaling)
        if any(guidances):
            forward = Forward(self._guided(found, requests, guidances), rescaling=rescaling)
            return Prepared(forward, content=(self.content(requests, rescaling), guidances))
        works = self._works_for(found, [each.modulations for each in requests], device_of(call.get(self.host.hidden)))
        for n, (modulations, sharings) in enumerate(requests):
            if sharings:  # a method takes the statistics of a reference in the sequence itself
                base = self._work(found, self.sequences.digest(modulations), modulations)
                works[n] = SharedWork(base, requests[n], sites[n].tokens)
        probes = [None] * count
        if inspector is not None:
            plain = self._work(found, (), ())
            probes = [inspector.probe(site, found.sequence, plain) for site in sites]
        forward = Forward(tuple(map(LayerState, works, probes)), rescaling=rescaling)
        return Prepared(forward, content=self.content(requests, rescaling))

    def content(self, requests: list[LayerRequest], rescaling: Rescaling | None) -> Any:
        """What layers are asked for, as something to compare between processes."""
        if context_parallel(self.model) is None:
            return None
        return [(self.sequences.digest(modulations), sharings) for modulations, sharings in requests], rescaling

    # ---- sites ------------------------------------------------------------------------------------------------------

    def sites(self, step: Step, tokens: fr.TokenLayout, sigma: float | None = None) -> list[fr.Site]:
        """One site per layer."""
        where = step.index, step.count, self.axes_dim, self.host.spatial_axes, len(self.layers)
        rest = {"kinds": self._known_kinds, "theta": self.host.theta(self.model), "sigma": sigma}
        return [fr.Site(tokens, layer, *where, kind, **rest) for layer, kind in enumerate(self._kinds)]

    def _sites(self, call: Call, methods: tuple, tokens: fr.TokenLayout) -> list[fr.Site]:
        """Those of a call. Methods that rescale positions know its noise level, whose value is read for them alone."""
        step, sigma = self.step(call), None
        if rescales(methods):
            sigma = find_sigma(step, self._memo, call.get(self.host.timestep), self.host.model_time)
        return self.sites(step, tokens, sigma)

    def tell(self, step: Step | None) -> None:
        """Set the step of the next calls of this thread, and of threads that set none. None: find it out again."""
        self._user_step.step = self._last_user_step = step

    def step(self, call: Call) -> Step:
        """The step that a call belongs to."""
        return getattr(self._user_step, "step", self._last_user_step) or self._found_step(call) or self._first_step()

    def _found_step(self, call: Call) -> Step | None:
        running = running_pipeline(self.model)
        pipe = self._pipe() if running is None else running
        scheduler = getattr(pipe, "scheduler", None)
        return find_step(scheduler, call.get(self.host.timestep), self.host.model_time, running is not None)

    def _first_step(self) -> Step:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "fastrope: the denoising step is unknown, so methods see step 0 in every call; apply to the pipeline, "
                "or call handle.set_step(step, num_steps)",
                stacklevel=2,
            )
        return Step(0, fr.Site.num_steps)

    # ---- work -------------------------------------------------------------------------------------------------------

    def _works_for(
        self, found: Identified, layers: list[tuple[Modulation, ...]], device: torch.device
    ) -> list[LayerWork | None]:
        """The work of every layer; None for a layer without a modulation."""
        distinct: list[tuple[Modulation, ...]] = []
        index = []
        for modulations in layers:
            if not distinct or not _same(distinct[-1], modulations):
                distinct.append(modulations)
            index.append(len(distinct) - 1)
        contents = [self.sequences.digest(modulations) for modulations in distinct]
        works = []
        for modulations, content in zip(distinct, contents, strict=True):
            work = self._work(found, content, modulations) if modulations else None
            works.append(work if work is not None and work.modulates(self._applied, device) else None)
        self.works.forget()
        return [works[n] for n in index]

    def _guided(
        self, found: Identified, requests: list[LayerRequest], guidances: list[Guidance | None]
    ) -> tuple[LayerState, ...]:
        """The layers of a sequence with a negative prompt."""
        if self.inspector is not None or any(each.sharings for each in requests):
            raise NotImplementedError("NAG: expected no inspection and no shared or normalising reference beside it")
        states, sequence, other = [], found.sequence, found.other
        rope, gain = (found.rope, None) if other is None else (other.rope, other.gain)
        for (modulations, _), guidance in zip(requests, guidances, strict=True):
            if guidance is None:
                raise ValueError("guidance: expected a Guidance in every layer, received None in some")
            span = guidance.negative
            keys = self.works.remember(
                (found.name, self.sequences.digest(modulations), "guided", span.start, span.stop),
                lambda modulations=modulations, span=span: GuidedKeys(sequence, rope, gain, modulations, span),
            )
            states.append(LayerState(GuidedWork(keys, guidance, sequence.masked)))
        self.works.forget()
        return tuple(states)

    @property
    def _applied(self) -> bool:
        return self.layers[0].applied or self.layers[0].compiled

    def _work(self, found: Identified, content: Hashable, modulations: tuple) -> Work:
        key, sequence, rope, other = found

        def make(like: Work | None) -> Work:
            return Work(sequence, rope, modulations, like=like, rescaled=other)

        return self.works.remember((found.name, content), lambda: self.works.alike(kin(key, other), modulations, make))


def _same(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
