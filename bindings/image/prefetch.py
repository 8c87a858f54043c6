"""Kept keys of a step on their way to the device that computes, one layer ahead of their use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrope.sharing import SharedKeys


class Prefetch:
    """What the layers of one step share, in order of execution, each on the device when its layer asks for it.

    While a layer computes, the entry of the next one is copied, and no other: at most two are on the device besides
    what is kept there anyway. Layers may be left out or asked for again; an entry that was copied for nothing is
    dropped.

    Args:
        entries: what the layers share, wherever it is kept.
        device: of the computation.

    The first copy starts here, before the layers run.
    """

    def __init__(self, entries: Sequence[SharedKeys], device: torch.device) -> None:
        self._entries = entries
        self._device = device
        self._ahead: tuple[int, Copy | StreamedCopy] | None = None
        self._start(0)

    def take(self, n: int) -> SharedKeys:
        """Entry ``n`` on the device; the copy of the next one starts."""
        entry = self._entries[n]
        if self._moves(n):
            if self._ahead is None or self._ahead[0] != n:
                self._start(n)
            entry = self._ahead[1].finish()
        self._start(n + 1)
        return entry

    def _start(self, n: int) -> None:
        self._ahead = None  # before the next copy takes its memory
        if self._moves(n):
            self._ahead = n, copy_of(self._entries[n], self._device)

    def _moves(self, n: int) -> bool:
        return n < len(self._entries) and self._entries[n].k.device != self._device


def copy_of(keys: SharedKeys, device: torch.device) -> Copy | StreamedCopy:
    """A copy to the device: beside the computation where that is a CUDA device and the memory page-locked."""
    beside = device.type == "cuda" and keys.k.device.type == "cpu" and keys.k.is_pinned()
    return StreamedCopy(keys, device) if beside else Copy(keys, device)


class Copy:
    """A copy that is made when it is asked for."""

    def __init__(self, keys: SharedKeys, device: torch.device) -> None:
        self._keys, self._device = keys, device

    def finish(self) -> SharedKeys:
        """The copy."""
        return self._keys.map(lambda x: x.to(self._device))


class StreamedCopy:
    """A copy on a stream of its own, which :meth:`finish` makes the current stream wait for.

    Its memory belongs to the stream that was current at the start, so that freeing it needs no event of the copy's: the
    copy waits for that stream when it starts, and that stream for the copy before anything else gets the memory.
    """

    def __init__(self, keys: SharedKeys, device: torch.device) -> None:
        self._done: Any = None  # an event
        self._device = device
        with torch.cuda.device(device):
            self._moved = keys.map(lambda x: torch.empty_like(x, device=device))
            side = _side_stream(device)
            side.wait_stream(torch.cuda.current_stream(device))  # also for the copy to the host, if it is under way
            with torch.cuda.stream(side):
                for there, here in zip(self._moved.tensors(), keys.tensors(), strict=True):
                    there.copy_(here, non_blocking=True)
                self._done = side.record_event()

    def finish(self) -> SharedKeys:
        """The copy, for the current stream."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
            self._done = None
        return self._moved

    def __del__(self) -> None:
        self.finish()  # a run that broke off: the memory must not be given away while it is written to


_SIDE_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _SIDE_STREAMS:
        _SIDE_STREAMS[device] = torch.cuda.Stream(device)
    return _SIDE_STREAMS[device]
