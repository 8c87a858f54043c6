"""Latents of a reference at each noise level: the mathematics of its trajectory, without any pipeline.

Rectified flow: at noise level sigma a sample is ``z = (1 - sigma) x + sigma noise``, and the model's velocity
``v = noise - x`` is ``dz / dsigma``. All trajectories are called as ``trajectory(step, sigma) -> latents``, which is
what :class:`fastrope.Reference` takes.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..checks import require
from .schedules import require_number

GAMMA = 0.5  # of RF inversion, as in published runs
SLACK = 1e-6  # for noise levels, which pass through single precision
STEP_SLACK = 4e-3  # for noise levels that come from a timestep in bfloat16


class LinearTrajectory:
    """``(1 - sigma) clean + sigma noise`` with one noise for all steps. No model runs.

    Args:
        clean, noise: of one shape and device.
        dtype: of the result; None: that of ``clean``. The computation is in float32, or in float64 if an input is.

    Raises:
        ValueError: shapes that differ.
    """

    def __init__(self, clean: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        _require_pair(clean, noise)
        self.clean, self.noise, self.dtype = clean, noise, dtype or clean.dtype

    def __call__(self, step: int, sigma: float) -> torch.Tensor:
        """The reference at ``sigma``, in 0..1.

        Raises:
            ValueError: a sigma outside.
        """
        require(-SLACK <= sigma <= 1 + SLACK, "sigma", "a noise level in 0..1", sigma)
        clean, noise = _wide(self.clean, self.noise)
        return ((1 - sigma) * clean + sigma * noise).to(self.dtype)


class PathTrajectory:
    """Points at given noise levels, with linear interpolation between them: the path of :func:`rf_inversion`.

    Args:
        sigmas: noise levels, rising.
        points: latents at each of them, all of one shape.
        dtype: of the result; None: that of the points.

    Raises:
        ValueError: levels that do not rise, another number of points, points of different shape.
    """

    def __init__(
        self, sigmas: Sequence[float], points: Sequence[torch.Tensor], dtype: torch.dtype | None = None
    ) -> None:
        self.sigmas, self.points = tuple(float(s) for s in sigmas), tuple(points)
        rising = all(a < b for a, b in itertools.pairwise(self.sigmas))
        require(rising and len(self.sigmas) > 0, "sigmas", "noise levels that rise", self.sigmas)
        require(len(self.points) == len(self.sigmas), "points", f"{len(self.sigmas)}, one per sigma", len(self.points))
        shapes = {tuple(p.shape) for p in self.points}
        require(len(shapes) == 1, "points", "tensors of one shape", sorted(shapes))
        self.dtype = dtype or self.points[0].dtype

    def __call__(self, step: int, sigma: float) -> torch.Tensor:
        """The path at ``sigma``. At one of its noise levels this is the stored point itself.

        Raises:
            ValueError: a sigma outside of the path.
        """
        first, last = self.sigmas[0], self.sigmas[-1]
        require(first - SLACK <= sigma <= last + SLACK, "sigma", f"a noise level of the inverted path, in "
                f"{first:g}..{last:g}", sigma)  # fmt: skip
        above = min(bisect.bisect_left(self.sigmas, sigma), len(self.sigmas) - 1)
        if above == 0 or self.sigmas[above] <= sigma:
            return self.points[above].to(self.dtype)
        low, high = self.sigmas[above - 1 : above + 1]
        start, end = _wide(*self.points[above - 1 : above + 1])
        return start.lerp(end, (sigma - low) / (high - low)).to(self.dtype)


class StepTrajectory:
    """Given latents, one tensor per denoising step, the first step (most noise) first.

    Args:
        latents: of all steps, of one shape.
        dtype: of the result; None: that of the latents.
        sigmas: the noise level of each; a call with another one is refused. None: noise levels are not compared.

    Raises:
        ValueError: no latents, latents of different shape, another number of sigmas. A call raises it for a step beyond
            the last, or for another noise level, which a run with more steps or of another size has.
    """

    def __init__(
        self,
        latents: Sequence[torch.Tensor],
        dtype: torch.dtype | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        self.points = tuple(latents)
        shapes = {tuple(getattr(p, "shape", ())) for p in self.points}
        require(len(shapes) == 1, "latents", "one tensor per step, of one shape", sorted(shapes))
        self.dtype = dtype or self.points[0].dtype
        self.sigmas = None if sigmas is None else tuple(float(s) for s in sigmas)
        count = len(self.points if self.sigmas is None else self.sigmas)
        require(len(self.points) == count, "latents", f"{count}, one per step", len(self.points))

    def __call__(self, step: int, sigma: float) -> torch.Tensor:
        """The latents of a step."""
        require(step < len(self.points), "latents", f"latents for step {step}", f"those of {len(self.points)} steps")
        if self.sigmas is not None:
            known = self.sigmas[step]
            expected = f"noise level {known:g} at step {step}, as the latents of the reference have"
            require(abs(sigma - known) <= STEP_SLACK, "sigma", expected, f"{sigma:g}: another number of steps, or size")
        return self.points[step].to(self.dtype)


def rf_step(
    z: torch.Tensor,
    velocity: torch.Tensor,
    noise: torch.Tensor,
    sigma: float,
    next_sigma: float,
    gamma: float,
) -> torch.Tensor:
    """One Euler step of RF inversion (arXiv 2410.10792), from ``sigma < 1`` to ``next_sigma``:
    ``v = gamma velocity + (1 - gamma) (noise - z) / (1 - sigma)``, ``z + (next_sigma - sigma) v``.

    It is computed as a blend of the model's step and a straight step to the noise. At ``next_sigma = 1`` the straight
    step gives the noise itself, to the last bit.
    """
    step = next_sigma - sigma
    share = step / (1 - sigma)
    return gamma * (z + step * velocity) + (1 - gamma) * ((1 - share) * z + share * noise)


def rf_inversion(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigmas: Sequence[float],
    gamma: float = GAMMA,
) -> PathTrajectory:
    """Clean latents, integrated upwards through a sampler's noise levels (RF inversion, arXiv 2410.10792, Euler).

    Args:
        velocity: ``velocity(z, sigma)`` of the model, as its scheduler takes it.
        clean, noise: latents at sigma 0 and 1.
        sigmas: of the sampler, falling to 0 or rising from 0.
        gamma: 1 follows the model alone, 0 goes straight to the noise (:class:`LinearTrajectory`).

    Returns:
        The path, in float32, or in float64 if an input is; one call of ``velocity`` per step.

    Raises:
        ValueError: naming the argument.
    """
    _require_pair(clean, noise)
    require_gamma(gamma)
    sigmas = tuple(float(s) for s in sigmas)
    sigmas = sigmas if sigmas[:1] < sigmas[-1:] else sigmas[::-1]
    require_sigmas("sigmas", sigmas)
    z, noise = _wide(clean, noise)
    points = [z]
    for sigma, following in itertools.pairwise(sigmas):
        z = rf_step(z, velocity(z, sigma).to(z), noise, sigma, following, gamma)
        points.append(z)
    return PathTrajectory(sigmas, points)


def require_gamma(gamma: Any) -> None:
    """Require a number in 0..1."""
    require_number("gamma", gamma, "a number in 0..1")
    require(0 <= gamma <= 1, "gamma", "a number in 0..1", gamma)


def require_sigmas(name: str, sigmas: Sequence[float]) -> None:
    """Require noise levels that rise from 0 to at most 1."""
    rising = all(a < b for a, b in itertools.pairwise(sigmas))
    ok = len(sigmas) > 1 and sigmas[0] == 0 and sigmas[-1] <= 1 and rising
    require(ok, name, "noise levels between 0 and at most 1, without repetition", tuple(sigmas))


def _require_pair(clean: torch.Tensor, noise: torch.Tensor) -> None:
    require(clean.shape == noise.shape, "noise", f"{tuple(clean.shape)}, as the clean latents", tuple(noise.shape))


def _wide(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)
