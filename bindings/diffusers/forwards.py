"""The forwards of a bound transformer that are under way, and what every layer does in each of them.

Several threads may run one transformer, and a block that was checkpointed runs again long after its forward. So nothing
of a call is kept in the layers: a layer asks for the forward that it is part of.
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

from ..image.work import LayerWork

_CALL = torch.nn.Module.__call__.__code__
_CHECKPOINT = torch.utils.checkpoint.__file__
_POLL = 0.01  # seconds: nothing tells the end of a call that a KeyboardInterrupt broke off


class LayerState(NamedTuple):
    """What a layer does in one forward: its ``work``, None where nothing is modulated; ``probe(q, k, work, applied)``,
    if any, looks at the attention."""

    work: LayerWork | None = None
    probe: Callable | None = None

    @property
    def idle(self) -> bool:
        """Whether the host's own processor can run unobserved."""
        return self.work is None and self.probe is None


@dataclass(frozen=True)
class Forward:
    """One call of the transformer.

    Args:
        layers: what each does, in order of execution.
        appended: rows of a reference behind the target's, to be cut from the output.
        rescaling: of the model's positions.
    """

    layers: tuple[LayerState, ...]
    appended: int = 0
    rescaling: Rescaling | None = None

    def unobserved(self) -> Forward:
        """The same without probes, for blocks that run again."""
        return replace(self, layers=tuple(LayerState(layer.work) for layer in self.layers))


class _Entry(NamedTuple):
    frame: FrameType
    forward: Forward
    differentiable: bool


class Forwards:
    """Of one handle, by thread.

    An entry belongs to a frame of its thread's call stack: the call of the transformer, or of a block that runs again.
    torch runs no hook after a KeyboardInterrupt, so an entry may stay behind; its frame, which is over, tells it from
    one that counts.

    Args:
        called: the module that is called: the transformer, or what a compiler has wrapped it in.
        count: of the layers.
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
        """From now on, layers that this frame calls are part of the forward. Whoever calls holds the lock."""
        for thread, entries in list(self._entries.items()):
            if not _any_runs(entries):  # they would keep their calls' tensors
                self._entries.pop(thread, None)
        entries = self._entries.setdefault(threading.get_ident(), [])
        while entries and not _search(frame, entries[-1].frame)[0]:
            entries.pop()
        entries.append(_Entry(frame, forward, torch.is_grad_enabled()))

    def leave(self, frame: FrameType) -> Forward | None:
        """The forward that this frame entered, which is over; None where it entered none."""
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
        """The forward that whoever calls is part of; an idle one in a call that began before the handle was bound.

        Raises:
            ValueError: whoever calls is part of no call of the transformer.
            NotImplementedError: a checkpoint in between, that would run the layer again without it.
        """
        entries = self._entries.get(threading.get_ident(), [])
        while entries:
            under_way, checkpointed = _search(sys._getframe(1), entries[-1].frame)
            if under_way:
                if checkpointed and entries[-1].differentiable:
                    refuse_checkpoint()
                return entries[-1].forward
            entries.pop()
        if _within_call(self._called()):
            return self.idle
        raise ValueError(
            "transformer: expected a call of the object that fastrope.apply was given, received one that went round "
            "it, so that the layout of the sequence is unknown"
        )

    # ---- forwards of other threads ----------------------------------------------------------------------------------

    def admit(self) -> None:
        """Wait while calls are paused, unless this one is within another, which the pause waits for. Whoever calls
        holds the lock."""
        while self._pausing and not self._here():
            self.lock.wait()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No forward is under way within the block: it waits for those that are, and those to come wait for its end.

        Raises:
            ValueError: one is under way in this thread.
        """
        with self.lock:
            require(not self._here(), "handle", "no call of the transformer under way in this thread", "one that is")
            self._pausing += 1
            try:
                while any(map(_any_runs, list(self._entries.values()))):
                    self.lock.wait(_POLL)
                yield
            finally:
                self._pausing -= 1
                self.lock.notify_all()

    def _here(self) -> bool:
        """Whether a forward is under way in this thread."""
        return _any_runs(self._entries.get(threading.get_ident(), []))

    # ---- a forward that is settled before its call ------------------------------------------------------------------

    def run(self, forward: Forward, module: torch.nn.Module, arguments: Mapping[str, Any]) -> None:
        """Call a module whose hook takes this forward, from :meth:`settled`, instead of making one."""
        thread = threading.get_ident()
        self._settled[thread] = forward
        try:
            module(**arguments)
        finally:
            self._settled.pop(thread, None)

    def settled(self) -> Forward | None:
        """What the call that begins in this thread is to do, if that is settled."""
        return self._settled.pop(threading.get_ident(), None)


def call_frame() -> FrameType:
    """Of the module's call that runs the hook which asks."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame or sys._getframe(1)


def within_checkpoint() -> bool:
    """Whether whoever calls is run by :mod:`torch.utils.checkpoint`."""
    return _search(sys._getframe(1), None)[1]


def refuse_checkpoint() -> None:
    """Raise NotImplementedError."""
    raise NotImplementedError(
        "gradient checkpointing: expected transformer.enable_gradient_checkpointing(), whose blocks run again as in "
        "their own forward, received a transformer or a block within torch.utils.checkpoint"
    )


def _any_runs(entries: list[_Entry]) -> bool:
    """Whether the frame of any runs, in whatever thread; one that is over lets go of what it held."""
    return any(_runs(entry.frame) for entry in list(entries))


def _runs(frame: FrameType) -> bool:
    # The stacks of other threads would tell, too, but asking for them can hang: sys._current_frames() collects garbage
    # under a lock of the interpreter that threading.local objects among it want.
    try:
        frame.clear()
    except RuntimeError:  # it is executing
        return True
    return False


def _within_call(module: torch.nn.Module | None) -> bool:
    """Whether whoever calls is run by a call of the module."""
    frame = sys._getframe(1)
    while frame is not None and not (frame.f_code is _CALL and frame.f_locals.get("self") is module):
        frame = frame.f_back
    return frame is not None


def _search(top: FrameType | None, wanted: FrameType | None) -> tuple[bool, bool]:
    """Whether a frame is on the stack below ``top``, and whether a checkpoint is above it."""
    frame, checkpointed = top, False
    while frame is not None and frame is not wanted:
        checkpointed = checkpointed or frame.f_code.co_filename == _CHECKPOINT
        frame = frame.f_back
    return frame is not None, checkpointed
