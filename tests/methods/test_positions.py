"""Factors of HighResolution and LongVideo against the published formulas, written out once more here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastrope as fr
from fastrope.methods.positions import intrinsic_pair
from fastrope.rescaling import Rescaling, rescaling_of

AXES = (16, 56, 56)


def site(grid=(128, 64), sigma=None, axes=AXES, theta=10_000.0, **more) -> fr.Site:
    return fr.Site(fr.TokenLayout(4, grid), axes_dim=axes, theta=theta, sigma=sigma, **more)


def frequencies(dim: int, base: float) -> np.ndarray:
    return base ** (-np.arange(0, dim, 2) / dim)


def ramp(turns, dim: int, theta: float, trained: int) -> np.ndarray:
    """1 where a frequency of DyPE's first kind is taken, by its rounding of the pairs at both ends."""
    first, last = (dim * math.log(trained / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns)
    low, high = max(math.floor(first), 0), min(math.ceil(last), dim // 2)
    return 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)


def dype(dim: int, theta: float, scale: float, trained: int, kappa: float) -> np.ndarray:
    """Frequencies of DyPE on YaRN."""
    plain = frequencies(dim, theta)
    ntk = frequencies(dim, theta * scale ** (dim / (dim - 2)))
    mask = ramp((1.25 * kappa, 0.75 * kappa), dim, theta, trained)
    mixed = plain / scale * (1 - mask) + ntk * mask
    mask = ramp((16 * kappa, 2 * kappa), dim, theta, trained)
    return mixed * (1 - mask) + plain * mask


def rows_of(found: Rescaling, values: str = "factor") -> np.ndarray:
    """Of the axis of rows."""
    return np.array(getattr(found, values)[8:36])


@pytest.mark.parametrize("grid", [(128, 64), (96, 64), (200, 64)])
def test_ntk_is_the_table_of_another_base(grid):
    found, scale = fr.HighResolution("ntk").rescaling(site(grid)), grid[0] / 64
    base = 10_000.0 * scale ** (56 / 54)
    np.testing.assert_allclose(rows_of(found) * frequencies(56, 1e4), frequencies(56, base), rtol=1e-12)
    assert rows_of(found)[0] == 1
    assert rows_of(found)[-1] == pytest.approx(1 / scale)
    assert set(found.factor[:8]) | set(found.factor[36:]) == {1.0}, "axes that are within training stay"
    assert set(found.gain) == {1.0}


def test_yarn_interpolates_low_frequencies_and_leaves_high_ones():
    """arXiv 2309.00071, eq. 17 to 23, with its alpha, beta and temperature."""
    found = fr.HighResolution("yarn").rescaling(site((128, 64)))
    turns = 64 / (2 * math.pi / frequencies(56, 1e4))
    gamma = np.where(turns < 1, 0, np.where(turns > 32, 1, (turns - 1) / 31))
    np.testing.assert_allclose(rows_of(found), (1 - gamma) / 2 + gamma, rtol=1e-12)
    assert {round(g, 12) for g in rows_of(found, "gain")} == {round(0.1 * math.log(2) + 1, 12)}
    assert set(found.gain[:8]) | set(found.gain[36:]) == {1.0}
    every = fr.HighResolution("yarn", turns=(0.1, 0.2)).rescaling(site((128, 64)))
    assert rows_of(every)[0] == 1
    assert rows_of(every)[-1] == 0.5


@pytest.mark.parametrize(
    ("step", "grid", "theta"),
    [(0, (256, 64), 1e4), (14, (256, 64), 1e4), (27, (256, 64), 1e4), (0, (100, 64), 256.0), (14, (100, 64), 256.0)],
)
def test_dype_follows_the_noise_level(step, grid, theta):
    sigma = 1 - step / 28
    found = fr.HighResolution("dype").rescaling(site(grid, sigma, theta=theta))
    expected = dype(56, theta, grid[0] / 64, 64, sigma**2)
    np.testing.assert_allclose(rows_of(found) * frequencies(56, theta), expected, rtol=1e-12)
    assert rows_of(found, "gain")[0] == pytest.approx(0.1 * math.log(grid[0] / 64) + 1)
    ntk = fr.HighResolution("dype-ntk").rescaling(site(grid, sigma, theta=theta))
    base = theta * (grid[0] / 64) ** (56 / 54 * 2 * sigma**2)
    np.testing.assert_allclose(rows_of(ntk) * frequencies(56, theta), frequencies(56, base), rtol=1e-12)


def test_dype_ends_at_the_frequencies_of_training():
    """Also where the published rounding puts both ends of a ramp behind the last pair."""
    for sigma in (0.0, 1e-9, 0.001):
        assert set(fr.HighResolution("dype").rescaling(site(sigma=sigma)).factor) == {1.0}
    late, early = (fr.HighResolution("dype").rescaling(site(sigma=s)) for s in (0.2, 1.0))
    assert all(a >= b for a, b in zip(late.factor, early.factor, strict=True))


def test_within_training_nothing_changes():
    for kind in ("ntk", "yarn", "dype", "dype-ntk"):
        assert fr.HighResolution(kind).rescaling(site((64, 40), 0.5)) is None
    assert fr.HighResolution("ntk", steps=(0.0, 0.5)).rescaling(site(step=20)) is None
    assert fr.HighResolution("ntk", steps=(0.0, 0.5)).rescaling(site(step=3)) is not None


@pytest.mark.parametrize(
    ("theta", "dim", "repeats", "pair", "period"), [(256.0, 16, 48, 3, 50), (10_000.0, 16, 20, 1, 20)],
    ids=["HunyuanVideo", "CogVideoX"],
)  # fmt: skip
def test_riflex_finds_the_published_pairs(theta, dim, repeats, pair, period):
    """Its code counts pairs from 1: k = 4 and k = 2."""
    periods = list(2 * math.pi / frequencies(dim, theta))
    assert intrinsic_pair(periods, repeats) == pair
    assert round(periods[pair]) == period
    at = site(axes=(dim, 56, 56), theta=theta, temporal_axis=0)
    assert fr.LongVideo(period, repeats).rescaling(at) is None
    found = fr.LongVideo(2 * period + 1, repeats).rescaling(at)
    lowered = found.factor[pair] * frequencies(dim, theta)[pair]
    assert lowered == pytest.approx(0.9 * 2 * math.pi / (2 * period + 1))
    assert [c for c, x in enumerate(found.factor) if x != 1] == [pair]
    assert fr.LongVideo(66, pair=0).rescaling(at).factor[0] == pytest.approx(0.9 * 2 * math.pi / 66)


def test_factors_and_gains_of_several_methods_multiply():
    a, b = Rescaling((2.0, 1.0), (1.0, 3.0)), Rescaling((0.5, 4.0), (1.0, 0.5))
    assert a * b == Rescaling((1.0, 4.0), (1.0, 1.5))
    ntk, at = fr.HighResolution("ntk"), site()
    twice = rescaling_of([ntk, fr.GRAG(), fr.At(ntk, steps=range(5))], at)
    assert twice.factor == pytest.approx([x * x for x in ntk.rescaling(at).factor])
    assert rescaling_of([fr.At(ntk, steps=range(5, 9))], at) is None


def test_rescaled_angles_are_those_of_the_other_base():
    positions = torch.randint(0, 300, (7, 3))
    factor = torch.tensor(fr.HighResolution("ntk").rescaling(site((128, 128))).factor)
    found = fr.RoPE.axial(positions, AXES).rescaled(factor)
    base = 10_000.0 * 2 ** (56 / 54)
    expected = torch.cat([fr.RoPE.axial(positions[:, :1], (16,)).angles,
                          fr.RoPE.axial(positions[:, 1:], (56, 56), base).angles], dim=1)  # fmt: skip
    torch.testing.assert_close(found.angles, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fr.HighResolution("ntl"), "HighResolution.kind: expected one of"),
        (lambda: fr.HighResolution(trained=(64,)), "HighResolution.trained: expected .rows, columns"),
        (lambda: fr.HighResolution("yarn", turns=(3, 1)), "HighResolution.turns"),
        (lambda: fr.HighResolution().rescaling(site()), "Site.sigma: expected the noise level"),
        (lambda: fr.LongVideo(0), "LongVideo.frames"),
        (lambda: fr.LongVideo(9, margin=1.1), "LongVideo.margin"),
        (lambda: fr.LongVideo(99).rescaling(site()), "LongVideo: expected a model with an axis of frames"),
        (lambda: fr.LongVideo(99, pair=8).rescaling(site(temporal_axis=0)), "LongVideo.pair: expected one of 8 pairs"),
        (lambda: fr.At(fr.HighResolution("ntk"), layers=[0]).rescaling(site()), "layers: expected None"),
        (lambda: Rescaling((1.0, 0.0), (1.0, 1.0)), "Rescaling.factor"),
        (lambda: fr.RoPE(torch.zeros(3, 4)).rescaled(torch.ones(3)), r"factor: expected \(4,\)"),
        (lambda: fr.RoPE(torch.zeros(3, 4), applied=True).rescaled(torch.ones(4)), "RoPE.applied"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
