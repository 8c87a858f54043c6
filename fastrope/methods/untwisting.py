"""Untwisting RoPE (arXiv 2602.05013): the style of a reference image without a copy of its layout."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from typing import Any, cast

import torch

from ..activity import Indices, Where
from ..checks import is_whole, require
from ..modulations import BandWeight
from ..sharing import SHARED, Sharing
from ..tokens import Site
from .schedules import Activity, Schedule, Steps, check_schedule, require_number, value_at

AXIS0 = ("low", "match")
RAMPS = ("run", "active")
Dial = Schedule | tuple[float, float]
Weight = str | float  # of one axis: "low", "match" or a number
Axes = Weight | Sequence[Weight] | Mapping[int, Sequence[Weight]]

# Each name says where the numbers come from, and when: the paper; the defaults of a ComfyUI node; the example workflows
# of that node; version 0.2 of another node. Ports also differ on axes without spatial meaning.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"s_hf": (0.25, 0.75), "s_lf": (1.0, 1.4), "beta": 2.0, "adain": 0.5, "axis0": "low"},
    "bigstationw-2026-06": {
        "s_hf": (1.0, 0.0), "s_lf": (1.0, 3.0), "beta": 50.0, "adain": 0.5,
        "axis0": {3: ("low", "match", "match"), 4: ("low", "match", "match", "match")},
    },
    "bigstationw-workflows-2026-06": {
        "s_hf": (1.0, 0.0), "s_lf": (1.0, 1.4), "beta": 2.5, "adain": 0.5, "axis0": "match",
    },
    "xmarre-0.2": {
        "s_hf": (0.25, 0.75), "s_lf": (1.0, 1.4), "beta": 2.0, "adain": 0.0, "blocks": "single", "ramp": "active",
        "axis0": {3: ("low", "match", "match"), 4: ("match", "match", "match", "match")},
    },
}  # fmt: skip
DEPRECATED = {"community": ("bigstationw-workflows-2026-06", {"axis0": "low"})}  # the same dials: a preset and changes


@dataclass(frozen=True)
class UntwistingRoPE:
    """Weights the keys of a reference image per frequency band (Untwisting RoPE, arXiv 2602.05013).

    Pair d of an axis with n pairs, d = 0 the highest frequency, is multiplied by
    ``s_d = s_hf + (s_lf - s_hf) (d / (n - 1)) ** beta``; d starts at 0 on every axis. High frequencies bind a query to
    its own place in the reference, which copies it. Low frequencies find similar content, which carries its style.
    Values, queries, and the keys of text and target do not change.

    Args:
        s_hf: weight of the highest frequency: ``(first step, last step)``, linear in between by step index (see
            ``ramp``), or a number or schedule of :mod:`fastrope.methods`. Below 1, less is copied.
        s_lf: weight of the lowest frequency, likewise. Above 1, more style is taken. Try 0.6 to 1.5.
        beta: the curve's exponent, above 0.
        axis0: weights of axes without spatial meaning (axis 0; on FLUX.2 axes 0 and 3): ``"low"`` is flat
            ``s_lf``, ``"match"`` the curve of the other axes (Z-Image, where flat weights are too strong), a number is
            itself. Or one of these for every axis of the RoPE, spatial ones included:
            ``("low", "match", "match", "match")``; or such tuples by the number of axes, for more than one host.
        blocks: kinds of block, ``"double"``, ``"single"``, ``"joint"`` or several; None means all.
        layers, steps: where in the run, as in :class:`fastrope.GRAG`; None means all.
        ramp: the meaning of ``(first step, last step)`` if ``steps`` leaves some out. ``"run"``: the first and last
            step of the run. ``"active"``: the first and last active step; steps that :class:`fastrope.At` leaves out
            count as active.
        adain: strength in 0..1 (or a schedule of it) with which queries and keys of the target's image tokens take on
            the mean and deviation of the reference's in the same layer, see :func:`fastrope.sharing.adain`; 0 is off.
        reference: ``"shared"``: the reference is given to ``fr.apply(..., reference=...)`` and is not in the sequence;
            the target's queries also attend to its image keys, in one softmax. Or the index of one of the host's own
            references (Kontext, FLUX.2, Qwen-Image-Edit).

    The defaults are the paper's, with flat ``s_lf`` also on FLUX.2's text axis (ports differ there, see
    :meth:`from_preset`). Where the method is inactive, the target does not attend to a shared reference. With all
    weights 1 and ``adain=0`` it is plain shared attention.

    Raises:
        ValueError: naming the argument, what was expected and what came; in :meth:`modulations` also a site without
            that reference.
    """

    s_hf: Dial = PRESETS["paper"]["s_hf"]
    s_lf: Dial = PRESETS["paper"]["s_lf"]
    beta: float = PRESETS["paper"]["beta"]
    axis0: Axes = PRESETS["paper"]["axis0"]
    blocks: str | Collection[str] | None = None
    layers: Indices | None = None
    steps: Steps = None
    adain: Schedule = PRESETS["paper"]["adain"]
    reference: str | int = SHARED
    ramp: str = "run"
    _active: Activity = field(init=False, repr=False, compare=False)
    _kinds: Where = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("s_hf", "s_lf"):
            value = getattr(self, name)
            if isinstance(value, (tuple, list)):
                require(len(value) == 2, f"UntwistingRoPE.{name}", "(first step, last step)", repr(value))
                for n in value:
                    require_number(f"UntwistingRoPE.{name}", n)
                object.__setattr__(self, name, tuple(value))
            else:
                check_schedule(f"UntwistingRoPE.{name}", value)
        require_number("UntwistingRoPE.beta", self.beta)
        require(self.beta > 0, "UntwistingRoPE.beta", "a number above 0", self.beta)
        object.__setattr__(self, "axis0", _checked_axes(self.axis0))
        require(self.ramp in RAMPS, "UntwistingRoPE.ramp", f"one of {RAMPS}", repr(self.ramp))
        check_schedule("UntwistingRoPE.adain", self.adain)
        if not callable(self.adain):
            _require_strength(self.adain)
        known = is_whole(self.reference) and int(self.reference) >= 0
        known = known or (isinstance(self.reference, str) and self.reference == SHARED)
        require(known, "UntwistingRoPE.reference", f'"{SHARED}" or an index from 0', repr(self.reference))
        object.__setattr__(self, "_active", Activity(self.layers, self.steps))
        object.__setattr__(self, "_kinds", Where(kinds=self.blocks))

    @classmethod
    def from_preset(cls, name: str = "paper", **dials: Any) -> UntwistingRoPE:
        """Published dials; ``dials`` override them.

        Args:
            name: ``"paper"``; ``"bigstationw-2026-06"``, the defaults of the most used ComfyUI node (s_hf *falls*; axis
                0 is flat, all others have the curve; for Z-Image its author advises ``axis0="match"``);
                ``"bigstationw-workflows-2026-06"``, the example workflows of that node (the curve on all axes);
                ``"xmarre-0.2"``, a node for FLUX.1 and FLUX.2 with the paper's numbers (single-stream blocks, no
                AdaIN, axis 0 flat if there are three axes, the curve on all four of FLUX.2, ``ramp="active"``).
                ``"community"`` is deprecated.

        Raises:
            ValueError: another name.
        """
        if name in DEPRECATED:
            now, differing = DEPRECATED[name]
            warnings.warn(f'the preset "{name}" is deprecated: it is "{now}" with {differing}', DeprecationWarning,
                          stacklevel=2)  # fmt: skip
            return cls(**{**PRESETS[now], **differing, **dials})
        require(name in PRESETS, "preset", f"one of {tuple(PRESETS)}", repr(name))
        return cls(**{**PRESETS[name], **dials})

    def weights(self, site: Site) -> torch.Tensor:
        """``s_d`` of all pairs, ``(D/2,)`` float64, in the order of the RoPE's pairs, also at inactive sites."""
        return torch.tensor(self._weights(site), dtype=torch.float64, device="cpu")

    def modulations(self, site: Site) -> list[BandWeight]:
        """One :class:`fastrope.BandWeight` on the reference's keys, unless neutral. Equal values give one object."""
        if not self._acts(site):
            return []
        weights = self._weights(site)
        neutral = set(weights) == {1.0}
        if neutral and self.reference != SHARED:
            return []
        span = self._span(site)
        return [] if neutral else [_band_weight(weights, span.start, span.stop)]

    def sharings(self, site: Site) -> list[Sharing]:
        """Which reference the layer shares, and the strength of AdaIN; see :mod:`fastrope.sharing`."""
        if not self._acts(site):
            return []
        strength = value_at("UntwistingRoPE.adain", self.adain, site)
        _require_strength(strength)
        if strength == 0 and self.reference != SHARED:
            return []
        self._span(site)
        return [Sharing(self.reference, strength)]

    def _weights(self, site: Site) -> tuple[float, ...]:
        high, low = (self._value(name, site) for name in ("s_hf", "s_lf"))
        return _curves(high, low, self.beta, _per_axis(self.axis0, site), site.axes_dim)

    def _value(self, name: str, site: Site) -> float:
        dial = getattr(self, name)
        if not isinstance(dial, tuple):
            return value_at(f"UntwistingRoPE.{name}", dial, site)
        first, last = dial
        return first + (last - first) * (self._active.progress(site) if self.ramp == "active" else site.progress)

    def _acts(self, site: Site) -> bool:
        return site in self._active and site in self._kinds

    def _span(self, site: Site) -> slice:
        tokens = site.tokens
        if isinstance(self.reference, str):
            expected = "a site with a shared reference: fr.apply(pipe, ..., reference=...)"
            require(len(tokens.shared_grids) > 0, "UntwistingRoPE.reference", expected, repr(tokens))
            return tokens.shared
        count = len(tokens.reference_grids)
        require(count > 0, "UntwistingRoPE", "a sequence with at least one reference picture", repr(tokens))
        known = self.reference < count
        require(known, "UntwistingRoPE.reference", f"a reference in [0, {count})", self.reference)
        return tokens.reference(self.reference)


def _require_strength(value: Any) -> None:
    require(0 <= value <= 1, "UntwistingRoPE.adain", "a strength in 0..1", value)


def _checked_axes(axis0: Any) -> Any:
    """A copy of ``axis0``."""
    name = "UntwistingRoPE.axis0"
    if isinstance(axis0, Mapping):
        for count, weights in axis0.items():
            several = isinstance(weights, Sequence) and not isinstance(weights, str) and len(weights) == count
            require(several, name, "a weight per axis, by the number of axes", repr(dict(axis0)))
        return {count: _checked_axes(weights) for count, weights in axis0.items()}
    if isinstance(axis0, Sequence) and not isinstance(axis0, str):
        require(len(axis0) > 0, name, "a weight per axis", repr(axis0))
        return tuple(_checked_weight(name, weight) for weight in axis0)
    return _checked_weight(name, axis0)


def _checked_weight(name: str, weight: Any) -> Weight:
    if isinstance(weight, str) or not isinstance(weight, Real):
        require(weight in AXIS0, name, f"one of {AXIS0}, or a number", repr(weight))
    else:
        require_number(name, weight)
    return cast(Weight, weight)


def _per_axis(axis0: Axes, site: Site) -> tuple[Weight, ...]:
    """The weight of every axis of a site.

    Raises:
        ValueError: no weights for a RoPE with this number of axes.
    """
    count = len(site.axes_dim)
    if isinstance(axis0, Mapping):
        require(count in axis0, "UntwistingRoPE.axis0", f"weights for the model's {count} axes", repr(axis0))
        return tuple(axis0[count])
    if isinstance(axis0, Sequence) and not isinstance(axis0, str):
        require(len(axis0) == count, "UntwistingRoPE.axis0", f"{count} weights, one per axis of the model", repr(axis0))
        return tuple(axis0)
    return tuple("match" if axis in site.spatial_axes else axis0 for axis in range(count))


@lru_cache(maxsize=512)
def _curves(
    high: float, low: float, beta: float, per_axis: tuple[Weight, ...], axes_dim: tuple[int, ...]
) -> tuple[float, ...]:
    """Weights of all pairs, axis after axis. Cached, because all layers of a step have the same."""
    weights: list[float] = []
    for weight, dim in zip(per_axis, axes_dim, strict=True):
        pairs = dim // 2
        if weight == "match":
            weights += [high + (low - high) * (d / max(pairs - 1, 1)) ** beta for d in range(pairs)]
        else:
            weights += [low if weight == "low" else float(weight)] * pairs
    return tuple(weights)


@lru_cache(maxsize=512)
def _band_weight(weights: tuple[float, ...], start: int, stop: int) -> BandWeight:
    """Cached, because a binding reuses its plan for the same object."""
    return BandWeight(torch.tensor(weights, dtype=torch.float64, device="cpu"), keys=slice(start, stop))
