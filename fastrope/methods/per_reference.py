"""Dials that have a value per reference picture: a number or schedule for all of them, or a list with one for each."""

from __future__ import annotations

from collections.abc import Sequence

from ..checks import is_whole, require
from ..tokens import Site, TokenLayout
from .schedules import Schedule, check_schedule, value_at

Dial = Schedule | Sequence[Schedule]


def checked_dial(name: str, value: Dial) -> Dial:
    """A dial whose list, if it is one, is a tuple.

    Raises:
        ValueError: an empty list, or something that is no schedule.
    """
    if not isinstance(value, (list, tuple)):
        check_schedule(name, value)
        return value
    require(len(value) > 0, name, "a value per reference", repr(value))
    for i, v in enumerate(value):
        check_schedule(f"{name}[{i}]", v)
    return tuple(value)


def checked_references(name: str, chosen: Sequence[int] | None) -> tuple[int, ...] | None:
    """Distinct indices of reference pictures, or None for all.

    Raises:
        ValueError: anything else.
    """
    if chosen is None:
        return None
    ok = isinstance(chosen, (list, tuple, range)) and len(chosen) > 0 and all(is_whole(i) and i >= 0 for i in chosen)
    require(ok and len(set(chosen)) == len(chosen), name, "distinct indices from 0, or None", repr(chosen))
    return tuple(chosen)


def values_of(name: str, dial: Dial, site: Site) -> tuple[float, ...]:
    """The values of a dial at a site: one per reference, or one for all."""
    if isinstance(dial, Sequence):
        return tuple(value_at(f"{name}[{i}]", v, site) for i, v in enumerate(dial))
    return (value_at(name, dial, site),)


def present(owner: str, tokens: TokenLayout, chosen: Sequence[int] | None) -> Sequence[int]:
    """The chosen references of a sequence.

    Raises:
        ValueError: a sequence that does not have them.
    """
    count = len(tokens.reference_grids)
    chosen = tuple(range(count)) if chosen is None else chosen
    require(all(i < count for i in chosen), f"{owner}.references", f"references in [0, {count})", chosen)
    return chosen


def require_reference(owner: str, tokens: TokenLayout) -> None:
    """Require a sequence with a reference picture."""
    some = len(tokens.reference_grids) > 0
    require(some, owner, "a sequence with at least one reference picture", repr(tokens))


def for_each(name: str, dial: Dial, values: tuple[float, ...], count: int) -> tuple[float, ...]:
    """The values of a dial for ``count`` references.

    Raises:
        ValueError: a list of another length.
    """
    if not isinstance(dial, Sequence):
        return values * count
    require(len(values) == count, name, f"{count} values, one per reference", len(values))
    return values
