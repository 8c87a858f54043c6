"""Numbers that may change during a run, and the part of the run where a method acts.

A ``Schedule`` is a number, one of the three forms below, or any function of the site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, cast

from ..activity import Indices, Where
from ..checks import require
from ..tokens import Site

Schedule = float | Callable[[Site], float]
Steps = Indices | tuple[float, float] | None


@dataclass(frozen=True)
class Linear:
    """From ``start`` at the first step to ``end`` at the last: ``start + (end - start) * site.progress``.

    Progress counts steps and not values of timesteps, so a shifted noise schedule does not bend the line.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            require_number(f"Linear.{name}", getattr(self, name))

    def __call__(self, site: Site) -> float:
        """The value at a site."""
        return self.start + (self.end - self.start) * site.progress


@dataclass(frozen=True)
class _Listed:
    """A list of values."""

    values: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _numbers(f"{type(self).__name__}.values", self.values))


@dataclass(frozen=True)
class PerStep(_Listed):
    """One value per denoising step, first step first.

    Raises:
        ValueError: no values, values that are not finite numbers; in a call also a run with another number of steps.
    """

    def __call__(self, site: Site) -> float:
        """The value at a site."""
        require(len(self.values) == site.num_steps, "PerStep.values", f"{site.num_steps} values, one per step of the "
                "run", len(self.values))  # fmt: skip
        return self.values[site.step]


@dataclass(frozen=True)
class PerLayer(_Listed):
    """One value per attention layer, in order of execution: on FLUX the double-stream blocks come first.

    Raises:
        ValueError: no values, values that are not finite numbers; in a call also a layer beyond the last value.
    """

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
        ValueError: the function returned something else than a finite number.
    """
    if not callable(schedule):
        return float(schedule)
    value = schedule(site)
    require_number(name, value, f"a finite number from the schedule at layer {site.layer}, step {site.step}")
    return float(value)


@dataclass(frozen=True, eq=False)
class Activity:
    """The part of a run where a method acts: ``site in activity``.

    Args:
        layers: indices of attention calls in order of execution, as in :class:`fastrope.At`; None means all.
        steps: indices likewise, or two floats ``(start, stop)``, fractions of the run. A step counts if its middle is
            in between, so the cut is in proportion for any number of steps. None means all.

    Raises:
        ValueError: naming the argument.
    """

    layers: Indices | None = None
    steps: Steps = None
    _where: Where = field(init=False, repr=False)
    _fractions: tuple[float, float] | None = field(init=False, repr=False)
    _anywhere: Activity | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        steps: Any = self.steps
        fractions = None
        if isinstance(steps, tuple) and len(steps) == 2 and all(isinstance(x, float) for x in steps):
            steps, fractions = None, steps
            require(0 <= fractions[0] < fractions[1] <= 1, "steps", "fractions 0 <= start < stop <= 1", fractions)
        object.__setattr__(self, "_where", Where(self.layers, steps))
        object.__setattr__(self, "_fractions", fractions)

    def __contains__(self, site: Site) -> bool:
        if site not in self._where:
            return False
        if self._fractions is None:
            return True
        start, stop = self._fractions
        return first_step_at(start, site.num_steps) <= site.step < first_step_at(stop, site.num_steps)

    @property
    def anywhere(self) -> Activity:
        """The same steps, in all layers."""
        if self._anywhere is None:
            object.__setattr__(self, "_anywhere", self if self.layers is None else Activity(None, self.steps))
        return cast(Activity, self._anywhere)

    def at_length(self, num_steps: int) -> Activity:
        """The same activity, with fractions of a run of ``num_steps`` steps turned into step indices of any run."""
        if self._fractions is None:
            return self
        return Activity(self.layers, range(*(first_step_at(fraction, num_steps) for fraction in self._fractions)))

    def progress(self, site: Site) -> float:
        """Place of the site's step among the active steps: 0 at and before the first, 1 at and after the last."""
        active = [n for n in range(site.num_steps) if replace(site, step=n) in self.anywhere]
        if not active:
            return 0.0
        at = (site.step - active[0]) / max(active[-1] - active[0], 1)
        return min(max(at, 0.0), 1.0)


def rests(method: Any, site: Site) -> bool:
    """True if a method of this package is certainly inactive in all layers of a site's step, so that calling it is not
    needed."""
    active = getattr(method, "_active", None)
    return isinstance(active, Activity) and site not in active.anywhere


def first_step_at(fraction: float, num_steps: int) -> int:
    """The first step whose middle lies at or after a fraction of the run."""
    return math.ceil(fraction * num_steps - 0.5 - 1e-9)  # a middle exactly at the fraction counts as after it


def require_number(name: str, value: Any, expected: str = "a finite number") -> None:
    """Require a finite real number, and no bool."""
    ok = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    require(ok, name, expected, repr(value))


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    ok = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    require(ok, name, "a non-empty sequence of numbers", repr(values))
    for i, value in enumerate(values):
        require_number(f"{name}[{i}]", value)
    return tuple(float(v) for v in values)
