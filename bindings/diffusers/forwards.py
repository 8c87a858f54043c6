"""The forwards of a bound transformer that are running, and what every layer does in each of them.

Several threads may run one transformer, and a checkpointed block runs again long after its forward. So layers store
nothing of a call: a layer looks up the forward that it is part of.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint

from fastrope.checks import require
from fastrope.rescaling import Rescaling
from fastrope.tokens import TokenLayout

from ..image.work import LayerWork
from .parallel import Split

_CALL = torch.nn.Module.__call__.__code__
_CHECKPOINT = torch.utils.checkpoint.__file__
_POLL = 0.01  # seconds; torch runs no hook when a KeyboardInterrupt ends a call, so waiting needs polls


class LayerState(NamedTuple):
    """What a layer does in one forward: its ``work`` (None without a modulation), and ``probe(q, k, work, applied)``,
    which measures the attention (None if nothing does)."""

    work: LayerWork | None = None
    probe: Callable | None = None

    @property
    def idle(self) -> bool:
        """True if the host's own processor can run."""
        return self.work is None and self.probe is None


@dataclass(frozen=True)
class Forward:
    """One call of the transformer.

    Args:
        layers: what each layer does, in order of execution.
        appended: rows of a reference after the target's, to be cut from the output.
        rescaling: of the model's positions.
        split: how the sequence is split over processes, and its layout; None where it is whole.
        sent: what each layer sends to other processes, bytes by collective.
    """

    layers: tuple[LayerState, ...]
    appended: int = 0
    rescaling: Rescaling | None = None
    split: tuple[Split, TokenLayout] | None = None
    sent: tuple[dict[str, int], ...] = ()

    def unobserved(self) -> Forward:
        """The same without probes, for blocks that run a second time."""
        return replace(self, layers=tuple(LayerState(layer.work) for layer in self.layers))


class _Entry(NamedTuple):
    frame: FrameType
    forward: Forward
    differentiable: bool


class Forwards:
    """The running forwards of one handle, by thread.

    An entry belongs to a frame of its thread's call stack: the call of the transformer, or of a block that runs again.
    torch runs no hook after a KeyboardInterrupt, so an entry may stay behind. Its frame has then ended, which tells it
    from a running one.

    Args:
        called: the module that is called: the transformer, or the compiler's wrapper of it.
        count: number of layers.
    """

    def __init__(self, called: torch.nn.Module, count: int) -> None:
        # Held while a forward is made, a block is prepared to run again, or the handle is removed.
        self.lock = threading.Condition(threading.RLock())
        self.idle = Forward((LayerState(),) * count)
        self._called = weakref.ref(called)
        self._pausing = 0
        self._entries: dict[int, list[_Entry]] = {}
        self._settled: dict[int, Forward] = {}

    def enter(self, frame: FrameType, forward: Forward) -> None:
        """From now on, layers that this frame calls are part of the forward. The caller holds the lock."""
        for thread, entries in list(self._entries.items()):
            if not _any_runs(entries):  # their calls' tensors would stay in memory
                self._entries.pop(thread, None)
        entries = self._entries.setdefault(threading.get_ident(), [])
        while entries and not _search(frame, entries[-1].frame)[0]:
            entries.pop()
        entries.append(_Entry(frame, forward, torch.is_grad_enabled()))

    def leave(self, frame: FrameType) -> Forward | None:
        """End the forward that this frame entered, and return it; None if it entered none."""
        thread = threading.get_ident()
        entries = self._entries.get(thread, [])
        position = next((n for n, entry in enumerate(entries) if entry.frame is frame), None)
        if position is None:
            return None
        forward = entries[position].forward
        del entries[position:]
        if not entries:
            self._entries.pop(thread, None)
        return forward

    def current(self) -> Forward:
        """The forward that the caller is part of. A call that began before the handle was bound has an idle one.

        Raises:
            ValueError: the caller is not part of a call of the transformer.
            NotImplementedError: a checkpoint lies in between. It would run the layer again outside of the forward.
        """
        entries = self._entries.get(threading.get_ident(), [])
        while entries:
            running, checkpointed = _search(sys._getframe(1), entries[-1].frame)
            if running:
                if checkpointed and entries[-1].differentiable:
                    refuse_checkpoint()
                return entries[-1].forward
            entries.pop()
        if _within_call(self._called()):
            return self.idle
        raise ValueError(
            "transformer: expected a call of the object that fastrope.apply was given, received one that went round "
            "it; the layout of the sequence is unknown"
        )

    # ---- forwards of other threads ----------------------------------------------------------------------------------

    def admit(self) -> None:
        """Wait while calls are paused. A call within another one does not wait, because the pause waits for the outer
        one. The caller holds the lock."""
        while self._pausing and not self._here():
            self.lock.wait()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block in which no forward runs. It first waits for those that run; new ones wait for its end.

        Raises:
            ValueError: a forward runs in this thread.
        """
        with self.lock:
            require(not self._here(), "handle", "no running call of the transformer in this thread", "one")
            self._pausing += 1
            try:
                while any(map(_any_runs, list(self._entries.values()))):
                    self.lock.wait(_POLL)
                yield
            finally:
                self._pausing -= 1
                self.lock.notify_all()

    def _here(self) -> bool:
        """True if a forward runs in this thread."""
        return _any_runs(self._entries.get(threading.get_ident(), []))

    # ---- a forward that is made before its call ---------------------------------------------------------------------

    def run(self, forward: Forward, module: torch.nn.Module, arguments: Mapping[str, Any]) -> None:
        """Call a module. Its hook takes this forward, from :meth:`settled`, and makes none."""
        thread = threading.get_ident()
        self._settled[thread] = forward
        try:
            module(**arguments)
        finally:
            self._settled.pop(thread, None)

    def settled(self) -> Forward | None:
        """The forward that :meth:`run` gave to the call that begins in this thread, if any."""
        return self._settled.pop(threading.get_ident(), None)


def call_frame() -> FrameType:
    """The frame of the module's call that runs the calling hook."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame or sys._getframe(1)


def within_checkpoint() -> bool:
    """True if :mod:`torch.utils.checkpoint` runs the caller."""
    return _search(sys._getframe(1), None)[1]


def refuse_checkpoint() -> None:
    """Raise NotImplementedError."""
    raise NotImplementedError(
        "gradient checkpointing: expected transformer.enable_gradient_checkpointing(), received a transformer or a "
        "block within torch.utils.checkpoint, which would run again without its forward"
    )


def _any_runs(entries: list[_Entry]) -> bool:
    """True if the frame of any entry runs, in any thread. A frame that has ended frees what it held."""
    return any(_runs(entry.frame) for entry in list(entries))


def _runs(frame: FrameType) -> bool:
    # sys._current_frames() is no way to look at other threads' stacks, because it can hang: it collects garbage under a
    # lock of the interpreter, and threading.local objects in the garbage need that lock.
    try:
        frame.clear()
    except RuntimeError:  # it is executing
        return True
    return False


def _within_call(module: torch.nn.Module | None) -> bool:
    """True if a call of the module runs the caller."""
    frame = sys._getframe(1)
    while frame is not None and not (frame.f_code is _CALL and frame.f_locals.get("self") is module):
        frame = frame.f_back
    return frame is not None


def _search(top: FrameType | None, wanted: FrameType | None) -> tuple[bool, bool]:
    """Whether the stack below ``top`` has the wanted frame, and whether it has a checkpoint above that frame."""
    frame, checkpointed = top, False
    while frame is not None and frame is not wanted:
        checkpointed = checkpointed or frame.f_code.co_filename == _CHECKPOINT
        frame = frame.f_back
    return frame is not None, checkpointed
