"""Resolutions and lengths beyond a model's training, by other RoPE frequencies.

Only the model's own rotary table changes, for all layers at once. So its stock attention runs as before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real

from ..checks import require
from ..modulations import Modulation
from ..rescaling import Rescaling
from ..tokens import Site
from .schedules import Activity, Steps, require_number

KINDS = ("ntk", "yarn", "dype", "dype-ntk")
# Turns of a pair over the trained length at the two ends of DyPE's ramps. The first ramp blends interpolated and NTK
# frequencies, the second one blends these and unchanged ones (DyPE's code, "vision YaRN").
INTERPOLATED, UNCHANGED = (1.25, 0.75), (16.0, 2.0)


@dataclass(frozen=True)
class HighResolution:
    """Pictures larger than in training, by other frequencies on the axes of rows and columns.

    ``s`` is the ratio of the target's rows (or columns) to the trained ones, for an axis of ``d`` channels. An axis
    with ``s <= 1`` does not change.

    * ``"ntk"``: NTK-aware scaling with the base ``theta * s ** (d / (d - 2))``. The highest frequency stays, the lowest
      is divided by ``s``.
    * ``"yarn"``: YaRN (arXiv 2309.00071). Pairs that turn less than ``turns[0]`` times over the trained length are
      interpolated (divided by ``s``); pairs that turn more than ``turns[1]`` times stay; between them there is a ramp.
      Queries and keys are multiplied by ``0.1 ln s + 1`` on the axis.
    * ``"dype"``: DyPE on YaRN (arXiv 2510.20766 and its code). Two ramps blend interpolated, NTK and unchanged
      frequencies. Their ends move with ``kappa = sigma ** exponent``, so less is rescaled towards the end of a run. The
      gain is that of YaRN.
    * ``"dype-ntk"``: DyPE on NTK, with the base ``theta * s ** (2 kappa d / (d - 2))``.

    Args:
        kind: one of these.
        trained: rows and columns of the training, in tokens; (64, 64) for 1024 x 1024 pixels of FLUX, Qwen-Image and
            Z-Image.
        turns: YaRN's alpha and beta.
        exponent: DyPE's lambda_t.
        steps: step indices as in :class:`fastrope.At`, or two fractions of the run; None means all.

    Apply it like any method: ``fr.apply(pipe, fr.HighResolution("dype"))``, alone or with others, which then have the
    rescaled positions. A target within the trained size gets the model's own table, to the same bits.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    kind: str = "dype"
    trained: tuple[int, int] = (64, 64)
    turns: tuple[float, float] = (1.0, 32.0)
    exponent: float = 2.0
    steps: Steps = None
    _active: Activity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "HighResolution.kind", f"one of {KINDS}", repr(self.kind))
        sides = self.trained
        ok = isinstance(sides, (tuple, list)) and len(sides) == 2 and all(_count(n) for n in sides)
        require(ok, "HighResolution.trained", "(rows, columns) in tokens", repr(sides))
        object.__setattr__(self, "trained", tuple(sides))
        turns = self.turns
        ok = isinstance(turns, (tuple, list)) and len(turns) == 2 and all(isinstance(x, Real) for x in turns)
        require(ok and 0 < turns[0] < turns[1], "HighResolution.turns", "alpha < beta, both positive", repr(turns))
        object.__setattr__(self, "turns", tuple(turns))
        require_number("HighResolution.exponent", self.exponent)
        require(self.exponent >= 0, "HighResolution.exponent", "a number of at least 0", self.exponent)
        object.__setattr__(self, "_active", Activity(None, self.steps))

    def modulations(self, site: Site) -> list[Modulation]:
        """No modulations; see :meth:`rescaling`."""
        return []

    def rescaling(self, site: Site) -> Rescaling | None:
        """The factors and gains of a step; None if nothing changes.

        Raises:
            ValueError: for DyPE, a site without a noise level.
        """
        if site not in self._active:
            return None
        factors, gains = [], []
        sides = dict(zip(site.spatial_axes, zip(site.tokens.target_grid, self.trained, strict=True), strict=True))
        for axis, dim in enumerate(site.axes_dim):
            side, trained = sides.get(axis, (1, 1))
            scale = max(1.0, side / trained)
            factors += self._factors(dim, scale, trained, site) if scale > 1 else [1.0] * (dim // 2)
            by_yarn = scale > 1 and self.kind in ("yarn", "dype")
            gains += [0.1 * math.log(scale) + 1 if by_yarn else 1.0] * (dim // 2)
        found = Rescaling(tuple(factors), tuple(gains))
        return None if found.neutral else found

    def _factors(self, dim: int, scale: float, trained: int, site: Site) -> list[float]:
        """The factors of one axis with ``dim`` channels."""
        if self.kind == "ntk":
            return _ntk(dim, scale)
        if self.kind == "yarn":
            alpha, beta = self.turns
            per_turn = [trained * site.theta ** (-2 * c / dim) / (2 * math.pi) for c in range(dim // 2)]
            stay = [min(max((turns - alpha) / (beta - alpha), 0.0), 1.0) for turns in per_turn]
            return [(1 - share) / scale + share for share in stay]
        require(site.sigma is not None, "Site.sigma", "the noise level of the step, as DyPE follows it", None)
        kappa = float(site.sigma or 0.0) ** self.exponent
        if self.kind == "dype-ntk":
            return _ntk(dim, scale ** (2 * kappa))
        ntk = _ntk(dim, scale)
        below = [_ramp(turns, kappa, dim, site.theta, trained) for turns in (INTERPOLATED, UNCHANGED)]
        blended = [_mix(mask, n, 1 / scale) for mask, n in zip(below[0], ntk, strict=True)]
        return [_mix(mask, 1.0, f) for mask, f in zip(below[1], blended, strict=True)]


@dataclass(frozen=True)
class LongVideo:
    """Videos longer than in training, by another frequency on the axis of frames.

    RIFLEx (arXiv 2502.15894, eq. 8): the intrinsic frequency is the one whose period is nearest to the frame at which
    videos begin to repeat themselves. It is lowered until one period is longer than the video:
    ``margin * 2 pi / frames``. A video within the period does not change, to the same bits.

    Args:
        frames: latent frames of the video; for ``n`` frames with temporal compression 4, ``(n - 1) // 4 + 1``.
        repeats: latent frame at which longer videos begin to repeat; if unknown, the frames of training. HunyuanVideo
            48, CogVideoX 20 (RIFLEx's code), Wan 2.1 about 21.
        pair: the intrinsic pair of the axis, from 0; None finds it from ``repeats``.
        margin: share of one period that the video may take; RIFLEx's code has 0.9, its equation 1.
        kind: ``"riflex"``.

    Raises:
        ValueError: naming the argument, what was expected and what came; when bound, a model without an axis of frames.
    """

    frames: int
    repeats: int = 21
    pair: int | None = None
    margin: float = 0.9
    kind: str = "riflex"

    def __post_init__(self) -> None:
        require(self.kind == "riflex", "LongVideo.kind", "'riflex'", repr(self.kind))
        for name in ("frames", "repeats"):
            require(_count(getattr(self, name)), f"LongVideo.{name}", "a positive integer", repr(getattr(self, name)))
        known = self.pair is None or (_count(self.pair + 1) if isinstance(self.pair, int) else False)
        require(known, "LongVideo.pair", "an integer from 0, or None", repr(self.pair))
        require_number("LongVideo.margin", self.margin)
        require(0 < self.margin <= 1, "LongVideo.margin", "a number in (0, 1]", self.margin)

    def modulations(self, site: Site) -> list[Modulation]:
        """No modulations; see :meth:`rescaling`."""
        return []

    def rescaling(self, site: Site) -> Rescaling | None:
        """The factors of the model; None for a video that is short enough.

        Raises:
            ValueError: a model without an axis of frames, or without the pair.
        """
        axis = site.temporal_axis
        require(axis is not None, "LongVideo", "a model with an axis of frames", "one of single pictures")
        start, dim = sum(site.axes_dim[:axis]) // 2, site.axes_dim[axis or 0]
        periods = [2 * math.pi * site.theta ** (2 * c / dim) for c in range(dim // 2)]
        pair = intrinsic_pair(periods, self.repeats) if self.pair is None else self.pair
        require(pair < len(periods), "LongVideo.pair", f"one of {len(periods)} pairs", pair)
        if self.frames <= round(periods[pair]):
            return None
        factor = [1.0] * (sum(site.axes_dim) // 2)
        factor[start + pair] = self.margin * periods[pair] / self.frames
        return Rescaling(tuple(factor), (1.0,) * len(factor))


def intrinsic_pair(periods: Sequence[float], repeats: int) -> int:
    """The pair whose period, in whole frames, is nearest to ``repeats`` (RIFLEx eq. 7)."""
    return min(range(len(periods)), key=lambda c: abs(round(periods[c]) - repeats))


def _ntk(dim: int, scale: float) -> list[float]:
    """Factors on the frequencies of ``theta`` that give those of ``theta * scale ** (dim / (dim - 2))``. An axis of one
    pair has no lower frequency to divide."""
    return [scale ** (-2 * c / (dim - 2)) if dim > 2 else 1.0 for c in range(dim // 2)]


def _ramp(turns: tuple[float, float], kappa: float, dim: int, theta: float, trained: int) -> list[float]:
    """1 for pairs that turn more than ``kappa * turns[0]`` times over the trained length, 0 for pairs that turn less
    than ``kappa * turns[1]`` times, and a ramp between. Its ends are whole pairs, as in DyPE's code. At a noise level
    of nearly 0 every pair turns more; DyPE's code would then divide all of them by the scale."""
    if kappa <= 0:
        return [1.0] * (dim // 2)
    first, last = (
        dim * math.log(trained / (kappa * n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns
    )  # pairs with these numbers of turns
    low, high = max(math.floor(first), 0), min(math.ceil(last), dim // 2)
    if low > high:  # all pairs turn more often, or all turn less often
        return [1.0 if low > 0 else 0.0] * (dim // 2)
    if low == high:
        return [1.0 if c <= low else 0.0 for c in range(dim // 2)]
    return [1 - min(max((c - low) / (high - low), 0.0), 1.0) for c in range(dim // 2)]


def _mix(share: float, there: float, elsewhere: float) -> float:
    return share * there + (1 - share) * elsewhere


def _count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 1
