"""What ran: the decisions of calls that somebody else writes, such as the layers of a pipeline."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ran:
    """A call that ran.

    Args:
        backend: one of ``"sdpa"``, ``"triton"`` and ``"eager"``; ``reason`` says why, as in :func:`fastrope.explain`.
        queries: ``(B, Sq, H, D)``.
        keys: ``Sk``.
        dtype: of the queries.
    """

    backend: str
    reason: str
    queries: tuple[int, ...]
    keys: int
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = f"{self.queries} queries, {self.keys} keys, {str(self.dtype).removeprefix('torch.')}"
        return f"{self.backend} on {sizes}: {self.reason}"


class Calls(list[Ran]):
    """Calls in the order in which they ran. ``str()`` of it counts those that are alike."""

    def __str__(self) -> str:
        return "\n".join(f"{count} x {ran}" for ran, count in Counter(map(str, self)).items()) or "no call"


_open: list[Calls] = []
_lock = threading.Lock()


@contextlib.contextmanager
def explain_calls() -> Iterator[Calls]:
    """A context that notes every call of FastRoPE's attention that runs in it, in all threads. So it says of the layers
    of a pipeline what :func:`fastrope.explain` says of one call.

    Layers that nothing modulates run the host's own attention and are not noted; nor are calls that a CUDA graph
    replays.

    Yields:
        A list of :class:`fastrope.ran.Ran`, which prints as one line for calls that are alike.
    """
    calls = Calls()
    with _lock:
        _open.append(calls)
    try:
        yield calls
    finally:
        with _lock:
            _open[:] = [each for each in _open if each is not calls]


def note(backend: str, reason: str, queries: tuple[int, ...], keys: int, dtype: torch.dtype) -> None:
    """Tell the open contexts of a call; arguments as in :class:`Ran`."""
    for calls in tuple(_open):
        calls.append(Ran(backend, reason, tuple(queries), keys, dtype))
