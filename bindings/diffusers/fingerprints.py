"""The content of tensors, as something to compare or as numbers, at most one device synchronisation per question."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import fields
from typing import Any

import torch

KNOWN_TENSORS = 256


class Fingerprints:
    """Digests of tensors; the last ones seen are not read again, unless torch saw a write to them."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, int], tuple[torch.Tensor, Hashable]] = OrderedDict()

    def of(self, tensors: Iterable[torch.Tensor]) -> list[Hashable]:
        """One digest per tensor: equal for equal dtype, shape and bytes."""
        tensors = list(tensors)
        keys = [_identity(x) for x in tensors]
        found: dict[int, Hashable] = {}
        fresh: dict[torch.device, list[int]] = {}
        for n, (x, key) in enumerate(zip(tensors, keys, strict=True)):
            if key in self._known:
                self._known.move_to_end(key)
                found[n] = self._known[key][1]
            else:
                fresh.setdefault(x.device, []).append(n)
        for some in fresh.values():
            for n, digest in zip(some, _digests([tensors[n] for n in some]), strict=True):
                found[n] = digest
                if (key := keys[n]) is not None:
                    self._known[key] = tensors[n], digest  # the tensor is held, so that its id stays its own
        while len(self._known) > KNOWN_TENSORS:
            self._known.popitem(last=False)
        return [found[n] for n in range(len(tensors))]

    def key(self, parts: Iterable) -> Hashable:
        """What a mixture of tensors, dataclasses, slices and hashable values says, as one hashable value."""
        flat: list = []
        shape = tuple(_flatten(part, flat) for part in parts)
        return shape, tuple(self.of(flat))


class Readings:
    """The values of a tensor that comes again and again: a run has one schedule and one guidance."""

    def __init__(self) -> None:
        self._known: tuple[torch.Tensor, int, list[float]] | None = None

    def of(self, x: torch.Tensor) -> list[float]:
        """All of ``x``, read once unless torch saw a write to it. Inference tensors, which it does not watch, are read
        every time."""
        if x.is_inference():
            return x.flatten().tolist()
        if self._known is None or self._known[0] is not x or self._known[1] != x._version:
            self._known = x, x._version, x.flatten().tolist()
        return self._known[2]


def _flatten(value: Any, flat: list) -> Hashable:
    if isinstance(value, torch.Tensor):
        flat.append(value)
        return "tensor"
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    if isinstance(value, (list, tuple)):
        return tuple(_flatten(v, flat) for v in value)
    if hasattr(value, "__dataclass_fields__"):
        return type(value), *(_flatten(getattr(value, f.name), flat) for f in fields(value))
    return value


def _identity(x: torch.Tensor) -> tuple[int, int] | None:
    try:
        return id(x), x._version
    except RuntimeError:  # inference tensors have no version
        return None


def _digests(tensors: list[torch.Tensor]) -> list[Hashable]:
    """Of tensors on one device, read together."""
    parts = [x.detach().contiguous().flatten().view(torch.uint8) for x in tensors]
    host = torch.cat(parts).cpu() if parts[0].device.type != "cpu" else None
    content = parts if host is None else host.split([len(p) for p in parts])
    return [
        (x.dtype, tuple(x.shape), hashlib.blake2b(c.numpy().data, digest_size=16).digest())
        for x, c in zip(tensors, content, strict=True)
    ]
