"""Numbers that may change over the run, and where in it a method acts.

Wherever a method takes a ``Schedule`` it takes a number, one of the three forms below, or any function of the site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from ..checks import require
from ..tokens import Site

Schedule = Real | Callable[[Site], float]
Steps = Collection[int] | tuple[float, float] | None


@dataclass(frozen=True)
class Linear:
    """From ``start`` at the first step to ``end`` at the last: ``start + (end - start) * site.progress``.

    Progress counts steps, never timestep values, so a shifted noise schedule does not bend the line.
    """

    start: float
    end: float

    def __post_init__(self):
        for name in ("start", "end"):
            require_number(f"Linear.{name}", getattr(self, name))

    def __call__(self, site: Site) -> float:
        """The value at a site."""
        return self.start + (self.end - self.start) * site.progress


@dataclass(frozen=True)
class PerStep:
    """One value per denoising step, first step first.

    Raises:
        ValueError: no values, values that are not finite numbers, or (when asked) a run of another number of steps.
    """

    values: Sequence[float]

    def __post_init__(self):
        object.__setattr__(self, "values", _numbers("PerStep.values", self.values))

    def __call__(self, site: Site) -> float:
        """The value at a site."""
        require(len(self.values) == site.num_steps, "PerStep.values", f"{site.num_steps} values, one per step of the "
                "run", len(self.values))  # fmt: skip
        return self.values[site.step]


@dataclass(frozen=True)
class PerLayer:
    """One value per attention layer, in order of execution: on FLUX the double-stream blocks come first.

    Raises:
        ValueError: no values, values that are not finite numbers, or (when asked) a layer beyond the last of them.
    """

    values: Sequence[float]

    def __post_init__(self):
        object.__setattr__(self, "values", _numbers("PerLayer.values", self.values))

    def __call__(self, site: Site) -> float:
        """The value at a site."""
        last = len(self.values) - 1
        require(site.layer <= last, "PerLayer.values", f"a value for layer {site.layer}", f"{last + 1} values")
        return self.values[site.layer]


def check_schedule(name: str, schedule: object) -> None:
    """Require a finite number or a function of the site.

    Raises:
        ValueError: naming the argument.
    """
    if not callable(schedule):
        require_number(name, schedule, "a finite number, Linear(...), PerStep(...), PerLayer(...) or a function of "
                       "the site")  # fmt: skip


def value_at(name: str, schedule: Schedule, site: Site) -> float:
    """The value of a schedule at a site.

    Raises:
        ValueError: the function gave something else than a finite number.
    """
    if not callable(schedule):
        return float(schedule)
    value = schedule(site)
    require_number(name, value, f"a finite number from the schedule at layer {site.layer}, step {site.step}")
    return float(value)


def check_range(layers: Collection[int] | None, steps: Steps) -> tuple[Collection[int] | None, Steps]:
    """Check the layers and steps a method acts in; both come back hashable.

    Args:
        layers: layer indices in order of execution (a ``range``, say); None means all.
        steps: step indices, or two floats ``(start, stop)`` as fractions of the run: a step belongs where its middle
            falls, so any number of steps is cut in proportion. None means all.

    Raises:
        ValueError: naming the argument.
    """
    if layers is not None:
        layers = _indices("layers", layers)
    if is_fraction(steps):
        start, stop = steps
        require(0 <= start < stop <= 1, "steps", "fractions 0 <= start < stop <= 1", steps)
    elif steps is not None:
        steps = _indices("steps", steps)
    return layers, steps


def is_active(layers: Collection[int] | None, steps: Steps, site: Site) -> bool:
    """Whether a site lies in the layers and steps that :func:`check_range` let pass."""
    if layers is not None and site.layer not in layers:
        return False
    if is_fraction(steps):
        start, stop = steps
        return first_step_at(start, site.num_steps) <= site.step < first_step_at(stop, site.num_steps)
    return steps is None or site.step in steps


def is_fraction(steps: Steps) -> bool:
    """Whether ``steps`` are two fractions of the run."""
    return isinstance(steps, tuple) and len(steps) == 2 and all(isinstance(x, float) for x in steps)


def first_step_at(fraction: float, num_steps: int) -> int:
    """The first step whose middle lies at or behind a fraction of the run: how many steps come before it."""
    return math.ceil(fraction * num_steps - 0.5 - 1e-9)  # a middle that falls on the cut belongs behind it


def require_number(name: str, value: object, expected: str = "a finite number") -> None:
    """Require a finite real number that is no bool."""
    ok = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    require(ok, name, expected, repr(value))


def _numbers(name: str, values: object) -> tuple[float, ...]:
    ok = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    require(ok, name, "a non-empty sequence of numbers", repr(values))
    for i, value in enumerate(values):
        require_number(f"{name}[{i}]", value)
    return tuple(float(v) for v in values)


def _indices(name: str, values: object) -> range | frozenset[int]:
    if isinstance(values, range):
        return values
    ok = isinstance(values, Collection) and not isinstance(values, (str, dict))
    ok = ok and all(isinstance(v, Integral) and not isinstance(v, bool) and v >= 0 for v in values)
    require(ok, name, "a range or collection of indices from 0"
            + (", or two floats as fractions of the run" if name == "steps" else ""), repr(values))  # fmt: skip
    return frozenset(int(v) for v in values)
