"""The published way from pictures to token maps against plain loops, and where it differs from ours."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.oracle import dilated

import fastrope as fr
from fastrope.methods import front_ends
from fastrope.methods.judges import RegionJudge

# ---- the oracle: numpy, one loop per formula ------------------------------------------------------------------------


def bilinear(x: np.ndarray, h: int, w: int) -> np.ndarray:
    """Samples at the centres of ``h x w`` cells, in between the centres of pixels; edges are repeated."""
    found = np.zeros((h, w))
    for y in range(h):
        for c in range(w):
            v = min(max((y + 0.5) * x.shape[0] / h - 0.5, 0), x.shape[0] - 1)
            u = min(max((c + 0.5) * x.shape[1] / w - 0.5, 0), x.shape[1] - 1)
            top, left = math.floor(v), math.floor(u)
            down, right = min(top + 1, x.shape[0] - 1), min(left + 1, x.shape[1] - 1)
            a, b = v - top, u - left
            upper, lower = (1 - b) * x[top, left] + b * x[top, right], (1 - b) * x[down, left] + b * x[down, right]
            found[y, c] = (1 - a) * upper + a * lower
    return found


def repeated(x: np.ndarray, h: int, w: int, centre: float) -> np.ndarray:
    return np.array([[x[math.floor((y + centre) * x.shape[0] / h), math.floor((c + centre) * x.shape[1] / w)]
                      for c in range(w)] for y in range(h)])  # fmt: skip


def averaged(x: np.ndarray, h: int, w: int) -> np.ndarray:
    def part(cell: int, cells: int, pixel: int, pixels: int) -> float:
        return max(0.0, min((cell + 1) * pixels / cells, pixel + 1) - max(cell * pixels / cells, pixel))

    found = np.zeros((h, w))
    for y in range(h):
        for c in range(w):
            parts = [(part(y, h, i, x.shape[0]) * part(c, w, j, x.shape[1]), x[i, j])
                     for i in range(x.shape[0]) for j in range(x.shape[1])]  # fmt: skip
            found[y, c] = sum(p * v for p, v in parts) / sum(p for p, _ in parts)
    return found


def mirror(at: int, n: int) -> int:
    """gfedcb|abcdefgh|gfedcba"""
    while n > 1 and not 0 <= at < n:
        at = -at if at < 0 else 2 * (n - 1) - at
    return at if n > 1 else 0


def blurred(x: np.ndarray) -> np.ndarray:
    weights, (h, w) = {-2: 1, -1: 4, 0: 6, 1: 4, 2: 1}, x.shape
    return np.array([[sum(weights[a] * weights[b] * x[mirror(y + a, h), mirror(c + b, w)] for a in weights
                          for b in weights) / 256 for c in range(w)] for y in range(h)])  # fmt: skip


def stretched(x: np.ndarray) -> np.ndarray:
    return (x - x.min()) / (x.max() - x.min())


def tokens_inside(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """A mask as an 8-bit picture, 0 and 255, resized, rounded, cut above 128."""
    return np.floor(bilinear(mask * 255.0, *grid) + 0.5) > 128


def published(energy: np.ndarray, mask: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Saliency on the grid; ``size`` is that of what the source saw."""
    inside = repeated(repeated(tokens_inside(mask, grid), *mask.shape, 0.5), *size, 0.0)
    x = stretched(bilinear(stretched(energy), *size))
    x[~inside] = x[inside].min()
    return stretched(blurred(averaged(stretched(x), *grid)))


# ---- against it ------------------------------------------------------------------------------------------------------


def paste(h: int, w: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Composite, mask, energy. The paste covers about the middle half, with a ragged edge."""
    g = np.random.default_rng(seed)
    mask = np.zeros((h, w), dtype=bool)
    for y in range(h // 4, h - h // 4):
        mask[y, w // 4 + g.integers(0, 2) : w - w // 4 - g.integers(0, 2)] = True
    return g.integers(0, 256, (h, w, 3), dtype=np.uint8), mask, g.random((max(2, h // 3), max(2, w // 4)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.sampled_from([(24, 16), (23, 17), (40, 40)]), st.sampled_from([(6, 4), (5, 5), (8, 3)]))
def test_published_maps(seed, size, grid):
    composite, mask, energy = paste(*size, seed)
    method = fr.LooseRoPE.from_images(composite, mask=mask, saliency=energy, front_end="published")
    saliency, inside = method.on_grid(grid)
    np.testing.assert_allclose(saliency[0].numpy(), published(energy, mask, grid, size), rtol=0, atol=1e-12)
    assert torch.equal(inside[0], dilated(torch.from_numpy(tokens_inside(mask, grid)), 2))


def test_a_token_is_cut_at_one_half_of_the_pixels_around_its_centre():
    """16 pixels per token: the centre lies between four of them, three of which must be inside, whatever the rest."""
    composite = np.zeros((32, 64, 3), dtype=np.uint8)
    mask = np.ones((32, 64), dtype=bool)
    mask[7:9, [7, 8, 23, 24, 40, 56]] = False  # none, none, half, half
    mask[7, 40] = True  # three quarters
    method = fr.LooseRoPE.from_images(composite, mask=mask, saliency=np.ones((2, 2)), front_end="published", dilation=0)
    assert method.on_grid((2, 4))[1][0].tolist() == [[False, False, True, False], [True] * 4]
    ours = fr.LooseRoPE.from_images(composite, mask=mask, saliency=np.ones((2, 2)), dilation=0)
    assert bool(ours.on_grid((2, 4))[1].all())


class Pooling(torch.nn.Module):
    """Cells of 4 x 4 pixels; keeps what it saw."""

    def forward(self, x):
        self.seen = x.double()[0].numpy()
        return torch.nn.functional.avg_pool2d(x, 4, ceil_mode=True)


def test_a_detector_sees_the_crop_blackened_and_resized(monkeypatch):
    monkeypatch.setattr(front_ends, "SHORTEST_EDGE", 20)
    composite, mask, _ = paste(24, 16)
    network = Pooling()
    method = fr.LooseRoPE.from_images(composite, mask=mask, saliency=network, front_end="published")
    saliency, _ = method.on_grid((6, 4))
    inside = repeated(tokens_inside(mask, (6, 4)), 24, 16, 0.5)
    black = np.where(inside[..., None], composite / 255.0, 0.0)
    resized = np.stack([bilinear(black[..., c], 30, 20) for c in range(3)])
    mean, deviation = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    np.testing.assert_allclose(network.seen, (resized - mean) / deviation, atol=1e-5)
    cells = torch.from_numpy(np.abs(network(torch.from_numpy(network.seen)[None]).numpy()[0]).mean(axis=0)).numpy()
    np.testing.assert_allclose(saliency[0].numpy(), published(cells, mask, (6, 4), (30, 20)), atol=1e-5)


def test_the_longer_side_is_bounded_as_the_detectors():
    from fastrope.methods.saliency import input_size

    module = Pooling()
    assert input_size(module, (1024, 1024), 800) == (800, 800)
    assert input_size(module, (1024, 768), 800) == (1067, 800)
    assert input_size(module, (500, 2000), 800) == (333, 1333)
    assert input_size("mask_rcnn", (400, 400), 800) == (800, 800)
    assert input_size("spectral_residual", (400, 300), 800) == (400, 300)


def test_saliency_is_computed_once_per_grid_and_for_changed_dials_not_again():
    calls = []

    def energy(image, mask):
        calls.append(mask.sum().item())
        return torch.rand(6, 4)

    composite, mask, _ = paste(24, 16)
    method = fr.LooseRoPE.from_images(composite, mask=mask, saliency=energy, front_end="published", boost=0.9)
    assert calls == []  # the grid is not known yet
    for layout in (fr.TokenLayout(2, (6, 4), [(6, 4)]), fr.TokenLayout(3, (6, 4), [(3, 3)])):
        for changed in (method, replace(method, boost=0.5)):
            changed.modulations(fr.Site(layout))
    assert len(calls) == 1
    method.on_grid((3, 3))
    assert len(calls) == 2


def test_a_batch_is_its_rows():
    pastes = [paste(24, 16, seed) for seed in (1, 2)]
    energies = np.stack([p[2] for p in pastes])
    both = fr.LooseRoPE.from_images(
        np.stack([p[0] for p in pastes]),
        mask=np.stack([p[1] for p in pastes]),
        saliency=energies,
        front_end="published",
    ).on_grid((6, 4))
    for row, (composite, mask, energy) in enumerate(pastes):
        alone = fr.LooseRoPE.from_images(composite, mask=mask, saliency=energy, front_end="published").on_grid((6, 4))
        for a, b in zip(both, alone, strict=True):
            torch.testing.assert_close(a[row], b[0])


def test_the_default_is_ours():
    composite, mask, energy = paste(24, 16)
    default = fr.LooseRoPE.from_images(composite, mask=mask, saliency=energy).on_grid((6, 4))
    ours, theirs = (
        fr.LooseRoPE.from_images(composite, mask=mask, saliency=energy, front_end=name).on_grid((6, 4))
        for name in front_ends.FRONT_ENDS
    )
    assert all(torch.equal(a, b) for a, b in zip(default, ours, strict=True))
    assert not torch.allclose(ours[0], theirs[0], atol=0.01)


@pytest.mark.parametrize("source", ["spectral_residual", "module", "array"])
@pytest.mark.parametrize("front_end", front_ends.FRONT_ENDS)
def test_a_default_device_does_not_reach_maps(front_end, source):
    """Users set it to their GPU; here to one that holds no data."""
    composite, mask, energy = paste(24, 16)
    given = {"module": Pooling(), "array": energy}.get(source, source)
    site = fr.Site(fr.TokenLayout(2, (6, 4), [(6, 4)]))

    def made():
        method = fr.LooseRoPE.from_images(composite, mask=mask, saliency=given, front_end=front_end)
        verdict = RegionJudge(mask)(composite, 255 - composite)
        return [getattr(m, n) for m, n in zip(method.modulations(site), ("scale", "gain"), strict=True)], verdict

    expected, verdict = made()
    with torch.device("meta"):
        found, judged = made()
        weights = fr.UntwistingRoPE().weights(site)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert judged == verdict
    assert torch.equal(weights, fr.UntwistingRoPE().weights(site))


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_paste_between_token_centres_is_named():
    mask = np.zeros((32, 32), dtype=bool)
    mask[1:5, 1:5] = True
    method = fr.LooseRoPE.from_images(np.zeros((32, 32, 3)), mask=mask, front_end="published")
    with pytest.raises(
        ValueError, match=r"^original or mask: expected a paste that covers the centre of a token, on a"
    ):
        method.on_grid((2, 2))
    with pytest.raises(ValueError, match=r"^LooseRoPE\.mask: expected a paste that covers the centre of a token"):
        fr.LooseRoPE(torch.ones(2, 2), torch.from_numpy(mask), mask_rule="centre").on_grid((2, 2))
    assert bool(fr.LooseRoPE.from_images(np.zeros((32, 32, 3)), mask=mask).on_grid((2, 2))[1].any())


@pytest.mark.parametrize(("given", "message"), [
    (lambda grid: torch.ones(3, 3), r"^LooseRoPE\.saliency: expected a map \(4, 4\) of that grid, received"),
    (lambda grid: torch.full(grid, 2.0), r"^LooseRoPE\.saliency: expected values in 0\.\.1"),
    (lambda grid: "x", r"^LooseRoPE\.saliency: expected an array or tensor"),
    (lambda grid: torch.ones(3, *grid), r"^LooseRoPE\.mask: expected 1 or 3 maps"),
])  # fmt: skip
def test_saliency_from_a_function_is_checked(given, message):
    with pytest.raises(ValueError, match=message):
        fr.LooseRoPE(given, torch.ones(2, 4, 4)).on_grid((4, 4))


def test_an_unknown_front_end_is_named():
    with pytest.raises(ValueError, match=r"^front_end: expected one of \('fastrope', 'published'\), received 'opencv'"):
        fr.LooseRoPE.from_images(np.zeros((4, 4, 3)), mask=np.ones((4, 4)), front_end="opencv")
