"""Nested dataclasses of tensors as a list of tensors and a string, and back: what a torch op can carry.

A dataclass becomes {its name: a value per field}, a tensor {"tensor": 0}, a tuple a list; whatever else JSON holds as
it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

Tables = tuple[type, ...]


def tables(*classes: type) -> Tables:
    """Dataclasses that a spec may name.

    Raises:
        ValueError: two of one name.
    """
    if len({cls.__name__ for cls in classes}) < len(classes):
        raise ValueError(f"classes: expected names that differ, received {[cls.__name__ for cls in classes]}")
    return classes


def flatten(table: Any) -> tuple[list[Tensor], str]:
    """All tensors of a table, in order, and its spec."""
    tensors: list[Tensor] = []
    return tensors, json.dumps(_flatten(table, tensors), separators=(",", ":"))


def unflatten(tensors: Sequence[Tensor], spec: str, known: Tables) -> Any:
    """Inverse of :func:`flatten`.

    Raises:
        ValueError: another number of tensors than the spec names.
    """
    count, make = _recipe(spec, known)
    if len(tensors) != count:
        raise ValueError(f"tensors: expected {count}, as the spec of the plan says, received {len(tensors)}")
    return make(iter(tensors))


def tensors_of(table: Any) -> list[Tensor]:
    """All tensors of a table, as :func:`flatten` orders them."""
    tensors: list[Tensor] = []
    _flatten(table, tensors)
    return tensors


def map_tensors(value: Any, function: Callable[[Tensor], Tensor | None]) -> Any:
    """The same table with ``function(tensor)`` in the place of every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return tuple(map_tensors(x, function) for x in value) if isinstance(value, tuple) else value


def _flatten(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": 0}
    if is_dataclass(value):
        return {type(value).__name__: [_flatten(getattr(value, f.name), tensors) for f in fields(value)]}
    return [_flatten(x, tensors) for x in value] if isinstance(value, tuple) else value


@lru_cache(maxsize=256)
def _recipe(spec: str, known: Tables) -> tuple[int, Callable[[Iterator[Tensor]], Any]]:
    """How many tensors a spec names, and a function that takes them from an iterator and makes the table."""
    classes = {cls.__name__: cls for cls in known}
    count = 0

    def recipe(value: Any) -> Callable[[Iterator[Tensor]], Any]:
        nonlocal count
        before = count
        if value == {"tensor": 0}:
            count += 1
            return next
        if isinstance(value, dict):
            ((name, parts),) = value.items()
            make, parts = classes[name], [recipe(part) for part in parts]
        elif isinstance(value, list):
            make, parts = (lambda *found: found), [recipe(part) for part in value]
        else:
            return lambda tensors: value
        if count == before:  # no tensor in it: the same every time
            constant = make(*(part(iter(())) for part in parts))
            return lambda tensors: constant
        return lambda tensors: make(*[part(tensors) for part in parts])

    make = recipe(json.loads(spec))
    return count, make
