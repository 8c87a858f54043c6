"""What tensors hold, without reading the same tensor twice: digests to compare, and results to reuse."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import fields
from typing import Any

import torch

KNOWN_TENSORS = 256


class Fingerprints:
    """Digests of tensors. The last ones seen are read again only after torch saw a write to them."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, int], tuple[torch.Tensor, Hashable]] = OrderedDict()

    def of(self, tensors: Iterable[torch.Tensor]) -> list[Hashable]:
        """One digest per tensor, equal for equal dtype, shape and bytes. Waits at most once per device."""
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
        """One hashable value for a mixture of tensors, dataclasses, slices and hashable values."""
        flat: list = []
        shape = tuple(_flatten(part, flat) for part in parts)
        return shape, tuple(self.of(flat))


class Memo:
    """Results of functions of tensors, for tensors that come again in every step: embeddings, ids, noise schedules. A
    result is reused unless torch saw a write to a tensor. Torch does not watch inference tensors, so nothing is
    remembered of those."""

    KNOWN = 64

    def __init__(self) -> None:
        self._known: OrderedDict[tuple, tuple] = OrderedDict()

    def __call__(self, make: Callable, *parts: Any) -> Any:
        """``make(*tensors)`` of the tensors among ``parts``. The other parts, and the code of ``make``, tell calls
        apart."""
        tensors = [x for x in parts if isinstance(x, torch.Tensor)]
        if any(x.is_inference() for x in tensors):
            return make(*tensors)
        rest = tuple(x for x in parts if not isinstance(x, torch.Tensor))
        key = make.__code__, rest, tuple(map(_identity, tensors))
        found = self._known.get(key)
        if found is None:  # if several threads come here at once, each computes the result
            found = self._known[key] = make(*tensors), *tensors  # holding the tensors keeps their ids unique
            if len(self._known) > self.KNOWN:
                self._known.popitem(last=False)
        return found[0]


def values_of(x: torch.Tensor) -> list[float]:
    """All values of a tensor."""
    return x.flatten().tolist()


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
