"""Installing and removing processors."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch

from fastrope.activity import Indices, Where, flat_methods
from fastrope.backends.plain import chosen
from fastrope.checks import require
from fastrope.rescaling import rescales
from fastrope.validation import BACKENDS

from ..image.inspection import Inspector, Record
from .calls import CallState
from .checkpoints import unfollow
from .embedders import RescaledTables
from .hosts import Host, find_host
from .layer_op import OWN
from .processors import BoundProcessor
from .shared import SharedAttention
from .steps import Step
from .video import bind_video, unbind_video, video_host

ROTATIONS = ("op", "host")
_BINDING = threading.RLock()  # held while processors are checked and replaced


class Handle:
    """Methods bound to a transformer. A context manager: leaving the block removes them."""

    def __init__(self, state: CallState) -> None:
        self._state: CallState | None = state  # None after removal, which frees transformer, pipeline and plans
        self._undo = contextlib.ExitStack()
        self._methods = state.methods
        self._tables: RescaledTables | None = None
        self._transformer = state.host.transformer

    @property
    def bound(self) -> bool:
        """True until :meth:`remove`."""
        return self._state is not None

    @property
    def methods(self) -> tuple:
        """The bound modulations and methods, flat."""
        return self._methods

    @property
    def sent(self) -> list[dict[str, int]]:
        """What this process sent to others in each layer of the latest call, bytes by collective, under diffusers'
        context parallelism. Layers that nothing modulates have none, because diffusers' own attention runs there."""
        return [dict(layer) for layer in self._bound.sent]

    @property
    def _bound(self) -> CallState:
        """The state that all calls share.

        Raises:
            ValueError: a removed handle.
        """
        require(self.bound, "handle", "a bound handle", "one that was removed already")
        return cast(CallState, self._state)

    def update(self, *methods: Any) -> None:
        """Replace all modulations and methods, from the next call of the transformer on, also in the middle of a run.
        Running calls of other threads go on with those they began with.

        Nothing is applied again and nothing compiles again. Methods are frozen. Change a parameter with
        ``handle.update(dataclasses.replace(method, delta=1.2))``.

        Raises:
            ValueError: something that is neither a modulation nor a method, or a removed handle.
            NotImplementedError: methods that rescale positions, if this handle cannot.
        """
        flat = flat_methods(methods, "methods")
        self._rescale(flat)
        self._bound.methods = self._methods = flat

    def inspect(
        self,
        layers: Indices | None = None,
        steps: Indices | None = None,
        queries: slice | torch.Tensor | None = None,
    ) -> Record:
        """Measure the attention of the next calls: its mass per group of tokens, and the distance that it spans.

        Every inspected layer computes its attention once more, in float32. So inspect few layers; the picture does not
        change. After ``fr.apply(pipe)`` without methods, this measures the stock attention.

        Args:
            layers, steps: those to inspect, as in :class:`fastrope.At`; None means all.
            queries: the queries that count: a slice, bool mask or index tensor over the sequence; None means the
                target's.

        Returns:
            A :class:`fastrope.bindings.diffusers.Record`, empty at first. It records until ``stop()``, until the end of
            its ``with`` block, or until the handle is removed.

        Raises:
            ValueError: a removed handle, or one with another open record.
            NotImplementedError: a handle with a shared reference, whose keys are in no group of the sequence.
        """
        state = self._bound
        require(state.inspector is None, "handle", "one record at a time: stop() the other", "an open record")
        if state.shares:
            raise NotImplementedError("inspect: expected a handle without a shared reference, received one with it")
        record = Record(lambda: self._stop(inspector))
        inspector = state.inspector = Inspector(record, Where(layers, steps), queries)
        return record

    def _stop(self, inspector: Inspector) -> None:
        if self.bound and self._state.inspector is inspector:
            self._state.inspector = None

    def set_step(self, step: int | None, num_steps: int = 28) -> None:
        """Set the denoising step that methods see, for calls outside of a pipeline. ``None``: find it out again. It
        counts for this thread's calls, and for calls of threads that set none.

        Without a pipeline and without this call, methods see step 0, and a warning says so once.

        Raises:
            ValueError: a step outside ``[0, num_steps)``, or a removed handle.
        """
        if step is not None:
            ok = isinstance(step, int) and isinstance(num_steps, int) and 0 <= step < num_steps
            require(ok, "step", f"an integer in [0, {num_steps})", repr(step))
        self._bound.tell(None if step is None else Step(step, num_steps))

    def remove(self) -> None:
        """Put the previous processors back, the very same objects, and remove the hooks.

        Running calls of other threads end first, with the methods they began with. Calls that begin meanwhile wait, and
        then run without the handle.

        Raises:
            ValueError: the handle was removed before, or a call of the transformer runs in this thread.
        """
        with self._bound.forwards.paused():
            state = self._bound
            replaced = sum(attn.processor is not processor for attn, processor in state.installed)
            self._undo.close()
            self._state = None
        if replaced:
            warnings.warn(
                f"{replaced} attention processors were replaced after fastrope.apply; the new ones stay in place",
                stacklevel=2,
            )

    def _install(self, called: torch.nn.Module, attentions: Sequence[Any]) -> None:
        """Bind. Every change is recorded together with its undoing, before it happens."""
        state, undo = self._state, self._undo
        undo.callback(unfollow, state.model)
        for attn, layer in zip(attentions, state.layers, strict=True):
            undo.callback(layer.close)
            layer.handle = self
            processor = state.host.processors[type(attn.processor).__name__](attn.processor, layer)
            undo.callback(_put_back, attn, processor)
            state.installed.append((attn, processor))
            attn.set_processor(processor)
        # A compiler must not trace the hooks: they would break its graph, or become constants in it.
        disable: Any = partial(torch.compiler.disable, reason="to export a transformer, call handle.remove() first")
        before, after = disable(state.before_forward), disable(state.after_forward)
        undo.callback(_unhook, called, before)
        called.register_forward_pre_hook(before, with_kwargs=True)
        undo.callback(_unhook, called, after)
        called.register_forward_hook(after, always_call=True)

    def _rescale(self, methods: tuple) -> None:
        """Stand behind the model's rotary table once a method may rescale positions.

        Raises:
            NotImplementedError: a host without a table that can be made again, or one that is compiled as a whole,
                which would freeze the table of one step.
        """
        state = self._bound
        if self._tables is not None or not rescales(methods):
            return
        host, model = state.host, state.model
        if host.embedder is None:
            raise NotImplementedError(f"positions: expected a host whose rotary table is known, received "
                                      f"{host.transformer}, whose row names no embedder")  # fmt: skip
        if state.called is not model:
            raise NotImplementedError("positions: expected a transformer that is not compiled as a whole; compile its "
                                      "blocks, with transformer.compile_repeated_blocks()")  # fmt: skip
        wanted = lambda: state.forwards.current().rescaling  # noqa: E731

        def share(positions: torch.Tensor) -> torch.Tensor:
            split = state.forwards.current().split
            whole = split is None or not host.embedder.several  # diffusers splits the ids or, of Qwen-Image, the tables
            return positions if whole else split[0].share(positions)

        self._tables = RescaledTables(host.embedder, model, state.axes_dim, host.theta(model), wanted, share)
        self._undo.callback(self._tables.remove)

    def __enter__(self) -> Handle:
        self._bound  # noqa: B018
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bound:
            self.remove()

    def __repr__(self) -> str:
        names = ", ".join(type(m).__name__ for m in self._methods)
        what = f"{len(self._state.layers)} layers" if self.bound else "removed"
        return f"<fastrope.Handle on {self._transformer}: {what}, [{names}]>"


def bind(
    target: Any,
    methods: Sequence,
    backend: str = "auto",
    rotation: str = "op",
    reference: Any = None,
    plain: str | Callable | None = None,
) -> Handle:
    """See :func:`fastrope.apply`. Everything is checked before anything changes."""
    if plain != OWN:
        chosen(plain, backend)
    require(backend in ("auto", *BACKENDS), "backend", f"one of {('auto', *BACKENDS)}", repr(backend))
    require(rotation in ROTATIONS, "rotation", f"one of {ROTATIONS}", repr(rotation))
    methods = flat_methods(methods, "methods")
    pipe = None if isinstance(target, torch.nn.Module) else target
    called, model = _transformer_of(target)
    if video_host(model) is not None:
        # They are about attention, which is not modulated there.
        for name, value, default in (("reference", reference, None), ("backend", backend, "auto"),
                                     ("rotation", rotation, "op"), ("plain", plain, None)):  # fmt: skip
            require(value == default, name, f"{default!r} on a video transformer", repr(value))
        return cast(Handle, bind_video(target, called, methods))  # as much of one as there is to hold
    host = find_host(model)
    if pipe is not None and any(cls.__name__ == "PAGMixin" for cls in type(pipe).__mro__):
        raise NotImplementedError(f"PAG: expected a pipeline without it, received {type(pipe).__name__}")
    with _BINDING:
        layers = _find_layers(model, host)
        for name, attn in layers:
            _check_processor(name, attn.processor, host)
        kinds = [host.blocks[name.partition(".")[0]] for name, _ in layers]
        state = CallState(host, called, model, methods, kinds, (backend, plain), rotation == "host", pipe)
        if reference is not None:
            state.prepare, state.shares = SharedAttention(state, reference).prepare, True
        handle = Handle(state)
        try:
            handle._install(called, [attn for _, attn in layers])
            handle._rescale(methods)
            return handle
        except BaseException:
            handle._undo.close()
            raise


def _put_back(attn: Any, processor: BoundProcessor) -> None:
    if attn.processor is processor:  # not replaced meanwhile
        attn.set_processor(processor.original)


def _unhook(module: torch.nn.Module, hook: Callable) -> None:
    """Remove a hook, also if an interrupt came before torch returned the object that removes it."""
    flags = (
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, each in hooks.items() if each is hook]:
            for each in (hooks, *flags):
                each.pop(key, None)


def unbind(target: Any) -> None:
    """Remove the handle that is bound to a pipeline's transformer, or to a transformer.

    Raises:
        ValueError: none is bound.
    """
    _, model = _transformer_of(target)
    if unbind_video(model):
        return
    bound = (getattr(module, "processor", None) for module in model.modules())
    handle = next((p.layer.handle for p in bound if isinstance(p, BoundProcessor)), None)
    require(
        handle is not None, "pipe", "a transformer that a handle is bound to", f"{type(model).__name__} without one"
    )
    cast(Handle, handle).remove()


def _transformer_of(target: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The module that is called, and the model itself. They differ if ``torch.compile`` wrapped the model."""
    called: Any = target if isinstance(target, torch.nn.Module) else getattr(target, "transformer", None)
    require(isinstance(called, torch.nn.Module), "pipe", "a diffusers pipeline with a transformer, or a transformer",
            type(target).__name__)  # fmt: skip
    return called, getattr(called, "_orig_mod", called)


def _find_layers(model: torch.nn.Module, host: Host) -> list[tuple[str, torch.nn.Module]]:
    """Attention modules by name, in order of execution."""
    found, lists = [], list(host.blocks)
    for name, module in model.named_modules():
        if not hasattr(module, "set_processor"):
            continue
        match = re.match(rf"({'|'.join((*lists, *host.skipped))})\.(\d+)\.", name)
        if match is None:
            raise NotImplementedError(f"transformer: expected attention in {lists} alone, received one at {name}")
        if match[1] not in host.skipped:
            found.append(((lists.index(match[1]), int(match[2])), name, module))
    require(bool(found), "transformer", "at least one attention layer", type(model).__name__)
    return [(name, module) for _, name, module in sorted(found, key=lambda entry: entry[0])]


def _check_processor(name: str, processor: Any, host: Host) -> None:
    kind = type(processor).__name__
    if isinstance(processor, BoundProcessor):
        raise ValueError("pipe: expected a transformer without a bound handle, received one with it; call remove() on "
                         "its handle first (or fastrope.remove(pipe) if it is lost), or pass all methods to one "
                         "apply")  # fmt: skip
    what = "IP-Adapter" if "IPAdapter" in kind else "PAG" if kind.startswith("PAG") else "custom attention processors"
    if kind not in host.processors or type(processor).__module__.split(".")[0] != host.package:
        raise NotImplementedError(f"{what}: expected {' or '.join(host.processors)} at {name}, received {kind}")
