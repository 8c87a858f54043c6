"""Copies of cached keys to the device that computes, one layer ahead of their use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrope.sharing import SharedKeys


class Prefetch:
    """The shared keys of all layers of one step, in order of execution.

    While a layer computes, the entry of the next layer is copied to the device. So the device holds at most two copies
    at a time. Layers may be left out or may ask again; a copy that nobody asked for is dropped. The first copy starts
    here, before the layers run.

    Args:
        entries: the keys of each layer, on any device.
        device: of the computation.
    """

    def __init__(self, entries: Sequence[SharedKeys], device: torch.device) -> None:
        self._entries = entries
        self._device = device
        self._ahead: tuple[int, Copy | StreamedCopy] | None = None
        self._start(0)

    def take(self, n: int) -> SharedKeys:
        """Entry ``n`` on the device. The copy of the next entry starts."""
        entry = self._entries[n]
        if self._moves(n):
            if self._ahead is None or self._ahead[0] != n:
                self._start(n)
            entry = self._ahead[1].finish()
        self._start(n + 1)
        return entry

    def _start(self, n: int) -> None:
        self._ahead = None  # first, so that the next copy can take its memory
        if self._moves(n):
            self._ahead = n, copy_of(self._entries[n], self._device)

    def _moves(self, n: int) -> bool:
        return n < len(self._entries) and self._entries[n].k.device != self._device


def copy_of(keys: SharedKeys, device: torch.device) -> Copy | StreamedCopy:
    """A copy to the device. From page-locked memory to a CUDA device it runs beside the computation."""
    beside = device.type == "cuda" and keys.k.device.type == "cpu" and keys.k.is_pinned()
    return StreamedCopy(keys, device) if beside else Copy(keys, device)


class Copy:
    """A copy that is made on demand."""

    def __init__(self, keys: SharedKeys, device: torch.device) -> None:
        self._keys, self._device = keys, device

    def finish(self) -> SharedKeys:
        """The copy."""
        return self._keys.map(lambda x: x.to(self._device))


class StreamedCopy:
    """A copy on a separate CUDA stream. :meth:`finish` makes the current stream wait for it.

    The memory is allocated on the stream that is current at the start. The copy waits for that stream when it starts,
    and that stream waits for the copy before the memory can have another use. So freeing it needs no further event.
    """

    def __init__(self, keys: SharedKeys, device: torch.device) -> None:
        self._done: Any = None  # an event
        self._device = device
        with torch.cuda.device(device):
            self._moved = keys.map(lambda x: torch.empty_like(x, device=device))
            side = _side_stream(device)
            side.wait_stream(torch.cuda.current_stream(device))  # also for an unfinished copy to the host
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
        self.finish()  # after a broken run: the memory must not be reused while the copy writes to it


_SIDE_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _SIDE_STREAMS:
        _SIDE_STREAMS[device] = torch.cuda.Stream(device)
    return _SIDE_STREAMS[device]
