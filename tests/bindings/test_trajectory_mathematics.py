"""Trajectories against closed forms and loops of their own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from trajectory_runs import (
    draw,
)

from fastrope.methods.trajectories import LinearTrajectory, PathTrajectory, StepTrajectory, rf_inversion

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.2, 0.0)


def euler_down(velocity, z: torch.Tensor, sigmas) -> torch.Tensor:
    for sigma, following in itertools.pairwise(sigmas):
        z = z + (following - sigma) * velocity(z, sigma)
    return z


def test_gamma_1_on_a_constant_velocity_returns_to_its_start():
    clean, flow = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    path = rf_inversion(lambda z, sigma: flow, clean, draw(2, 3, 4, seed=2), SIGMAS, gamma=1.0)
    top = path(0, 1.0)
    assert torch.allclose(top, clean + flow, rtol=0, atol=1e-14)
    back = euler_down(lambda z, sigma: flow, top, SIGMAS)
    assert torch.allclose(back, clean, rtol=0, atol=1e-14)


def test_gamma_0_ends_on_the_noise_exactly():
    clean, noise = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        c, n = clean.to(dtype), noise.to(dtype)
        path = rf_inversion(lambda z, sigma: 100 * torch.sin(z), c, n, SIGMAS, gamma=0.0)
        assert torch.equal(path(0, 1.0).to(dtype), n)
        assert torch.equal(path(9, 0.0).to(dtype), c)


def test_gamma_0_is_the_linear_trajectory():
    clean, noise = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    path = rf_inversion(lambda z, sigma: z, clean, noise, SIGMAS, gamma=0.0)
    line = LinearTrajectory(clean, noise)
    for sigma in (*SIGMAS, 0.33, 0.97):
        assert torch.allclose(path(0, sigma), line(0, sigma), rtol=0, atol=1e-14)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0])
def test_inversion_is_the_written_formula(gamma):
    """Euler on ``v = gamma v_model + (1 - gamma) (noise - z) / (1 - sigma)``, sigmas given rising or falling."""

    def model(z, sigma):
        return torch.tanh(z) + sigma

    clean, noise = draw(1, 5), draw(1, 5, seed=1)
    rising = SIGMAS[::-1]
    z, expected = clean, {0.0: clean}
    for sigma, following in itertools.pairwise(rising):
        v = gamma * model(z, sigma) + (1 - gamma) * (noise - z) / (1 - sigma)
        z = expected[following] = z + (following - sigma) * v
    for sigmas in (SIGMAS, rising):
        path = rf_inversion(model, clean, noise, sigmas, gamma)
        for sigma, point in expected.items():
            assert torch.allclose(path(0, sigma), point, rtol=0, atol=1e-14)


def test_a_linear_velocity_shrinks_towards_the_exact_flow():
    """``dz/dsigma = a z`` has the flow ``e^a``: the inversion is first order in the step."""
    clean = draw(1, 7)
    gaps = []
    for steps in (50, 100, 200):
        sigmas = torch.linspace(0, 1, steps + 1).double().tolist()
        top = rf_inversion(lambda z, sigma: 0.7 * z, clean, clean, sigmas, gamma=1.0)(0, 1.0)
        gaps.append(float((top - clean * math.exp(0.7)).abs().max()))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.05)


def test_a_path_is_straight_between_its_points():
    points = [draw(3), draw(3, seed=1), draw(3, seed=2)]
    path = PathTrajectory((0.0, 0.4, 1.0), points)
    assert all(path(0, s) is p for s, p in zip((0.0, 0.4, 1.0), points, strict=True))
    assert torch.allclose(path(0, 0.1), 0.75 * points[0] + 0.25 * points[1], rtol=0, atol=1e-15)
    assert torch.allclose(path(0, 0.7), 0.5 * points[1] + 0.5 * points[2], rtol=0, atol=1e-15)
    assert path(0, 1.0 + 1e-7) is points[2]


def test_own_latents_go_by_the_step():
    own = [draw(1, 2, 3, seed=n) for n in range(3)]
    trajectory = StepTrajectory(own)
    assert [trajectory(n, 0.123) is own[n] for n in range(3)] == [True] * 3


def test_own_latents_are_of_their_noise_levels():
    own = [draw(1, 2, 3, seed=n) for n in range(3)]
    trajectory = StepTrajectory(own, sigmas=(1.0, 0.6, 0.3))
    assert trajectory(1, 0.6 + 3e-3) is own[1]  # as bfloat16 tells a timestep
    with pytest.raises(ValueError, match="^sigma: expected noise level 0.6 at step 1, .* received 0.5: another"):
        trajectory(1, 0.5)


def test_results_are_rounded_once():
    """A bfloat16 reference: the formula in float32, then one rounding."""
    clean, noise = draw(1, 64).bfloat16(), draw(1, 64, seed=1).bfloat16()
    out = LinearTrajectory(clean, noise)(0, 0.3)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (0.7 * clean.double() + 0.3 * noise.double()).bfloat16())


@pytest.mark.parametrize(("make", "message"), [
    (lambda: LinearTrajectory(draw(1, 2), draw(1, 3)), r"noise: expected \(1, 2\), as the clean latents, received"),
    (lambda: LinearTrajectory(draw(1), draw(1))(0, 1.5), "sigma: expected a noise level in 0..1, received 1.5"),
    (lambda: PathTrajectory((0.0, 0.0), [draw(1)] * 2), "sigmas: expected noise levels that rise"),
    (lambda: PathTrajectory((0.0, 1.0), [draw(1)]), "points: expected 2, one per sigma, received 1"),
    (lambda: PathTrajectory((0.0, 1.0), [draw(1), draw(2)]), "points: expected tensors of one shape"),
    (lambda: PathTrajectory((0.0, 0.9), [draw(1)] * 2)(0, 0.95), "sigma: expected a noise level of the inverted "),
    (lambda: StepTrajectory([]), "latents: expected one tensor per step"),
    (lambda: StepTrajectory([draw(1), draw(2)]), "latents: expected one tensor per step, of one shape"),
    (lambda: StepTrajectory([draw(1)], sigmas=(1.0, 0.5)), "latents: expected 2, one per step, received 1"),
    (lambda: StepTrajectory([draw(1)])(1, 0.5), "latents: expected latents for step 1, received those of 1 steps"),
    (lambda: rf_inversion(None, draw(1), draw(1), SIGMAS, 1.5), "gamma: expected a number in 0..1, received 1.5"),
    (lambda: rf_inversion(None, draw(1), draw(1), SIGMAS, float("nan")), "gamma: expected a number in 0..1"),
    (lambda: rf_inversion(None, draw(1), draw(2), SIGMAS), "noise: expected"),
    (lambda: rf_inversion(None, draw(1), draw(1), (1.0, 0.5)), "sigmas: expected noise levels between 0 and"),
    (lambda: rf_inversion(None, draw(1), draw(1), (1.5, 0.0)), "sigmas: expected noise levels between 0 and"),
])  # fmt: skip
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
