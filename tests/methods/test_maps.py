"""Maps against brute force: crop mask, dilation, resizing, Gaussian, min-max, and the whole way from pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.oracle import dilated
from PIL import Image

import fastrope as fr
from fastrope import pictures
from fastrope.methods import maps

seeds = st.integers(0, 2**16)
sides = st.integers(1, 9)


def random_map(seed: int, h: int, w: int) -> torch.Tensor:
    return torch.rand(1, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40)
@given(seeds, sides, sides, st.integers(0, 4))
def test_dilation(seed, h, w, times):
    mask = random_map(seed, h, w) > 0.85
    expected = dilated(mask[0], times)
    assert torch.equal(maps.dilate(mask, times)[0], expected)


@settings(max_examples=40)
@given(seeds, sides, sides)
def test_gaussian(seed, h, w):
    x = random_map(seed, h, w)
    weights = {n: math.exp(-n * n / (2 * 1.1**2)) for n in range(-2, 3)}
    total = sum(weights.values()) ** 2
    expected = torch.tensor([[
        sum(weights[a] * weights[b] * float(x[0, min(max(y + a, 0), h - 1), min(max(c + b, 0), w - 1)])
            for a in weights for b in weights) / total
        for c in range(w)] for y in range(h)], dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(maps.blur(x)[0], expected)


@settings(max_examples=40)
@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_area_resize_averages_cells(seed, rows, columns, factor):
    x = random_map(seed, rows * factor, columns * factor)
    expected = torch.stack([
        torch.stack([x[0, y * factor : (y + 1) * factor, c * factor : (c + 1) * factor].mean() for c in range(columns)])
        for y in range(rows)
    ])  # fmt: skip
    torch.testing.assert_close(maps.resize(x, (rows, columns))[0], expected)


def test_mask_on_a_grid():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 0, :4] = True  # a quarter of the first token
    mask[0, 4:, 4] = True  # a quarter of the last
    mask[0, 4, 0] = True  # a sixteenth: too little
    whole = mask.clone()
    whole[0, :4, 4:] = True
    assert maps.resize_mask(whole, (2, 2))[0].tolist() == [[True, True], [False, True]]
    assert maps.resize_mask(mask, (2, 2))[0].tolist() == [[True, False], [False, True]]
    speck = torch.zeros(1, 8, 8, dtype=torch.bool)
    speck[0, 7, 1] = True
    assert maps.resize_mask(speck, (2, 2))[0].tolist() == [[False, False], [True, False]]
    assert not maps.resize_mask(torch.zeros(1, 8, 8), (3, 3)).any()


@given(seeds, sides, sides)
def test_masks_keep_at_least_a_token_on_any_grid(seed, h, w):
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, seed % 16, seed // 16 % 16] = True
    assert 1 <= int(maps.resize_mask(mask, (h, w)).sum()) <= 4  # a pixel that grids share lies in up to four cells


@settings(max_examples=30)
@given(seeds, sides, sides)
def test_areas(seed, h, w):
    """Two cells are in one area when steps along rows and columns lead from one to the other inside the mask."""
    mask = random_map(seed, h, w) > 0.5
    owner = {cell: n for n, cell in enumerate(map(tuple, mask[0].nonzero().tolist()))}
    for _ in owner:
        for y, x in owner:
            owner[y, x] = min(owner[c] for c in ((y, x), (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)) if c in owner)
    found = maps.areas(mask)
    assert torch.equal(sum(found, torch.zeros_like(mask).int()), mask.int())
    labels = [sorted({owner[tuple(cell)] for cell in area[0].nonzero().tolist()}) for area in found]
    assert sorted(labels) == [[n] for n in sorted(set(owner.values()))]


def test_min_max():
    x = torch.tensor([[[2.0, 4.0], [3.0, 6.0]], [[5.0, 5.0], [5.0, 5.0]]], dtype=torch.float64)
    assert maps.normalise(x).tolist() == [[[0.0, 0.5], [0.25, 1.0]], [[0.5, 0.5], [0.5, 0.5]]]


def test_outside_takes_the_least_of_inside():
    x = torch.tensor([[[0.0, 4.0], [3.0, 9.0]]])
    mask = torch.tensor([[[False, True], [True, False]]])
    assert maps.fill_outside(x, mask).tolist() == [[[3.0, 4.0], [3.0, 3.0]]]


# ---- pictures -------------------------------------------------------------------------------------------------------


def paste() -> tuple[np.ndarray, np.ndarray]:
    """A composite and its original, ``(24, 16, 3)`` uint8; the paste covers rows 8-15, columns 4-11."""
    g = np.random.default_rng(0)
    original = g.integers(40, 200, (24, 16, 3), dtype=np.uint8)
    composite = original.copy()
    composite[8:16, 4:12, 1] += 6
    composite[0, 0] += 5  # noise of compression: not over the threshold
    return composite, original


def test_pictures_in_every_form():
    composite, _ = paste()
    tensor = torch.from_numpy(composite).permute(2, 0, 1)
    forms = [composite, Image.fromarray(composite), tensor, tensor.double() / 255, tensor[None], composite[None]]
    for form in forms:
        torch.testing.assert_close(pictures.as_pixels("x", form)[0], tensor.double())


def test_crop_mask_from_an_original():
    composite, original = paste()
    method = fr.LooseRoPE.from_images(composite, original)
    expected = torch.zeros(1, 24, 16, dtype=torch.bool)
    expected[:, 8:16, 4:12] = True
    assert torch.equal(method.mask, expected)
    lower = fr.LooseRoPE.from_images(composite, original, threshold=4)
    assert bool(lower.mask[0, 0, 0])


def test_from_images_step_by_step():
    """Energy to token map by loops: min-max, the least of inside outside, 4 x 4 cells, Gaussian, min-max."""
    composite, original = paste()
    energy = np.random.default_rng(1).random((24, 16))
    saliency, mask = fr.LooseRoPE.from_images(composite, original, saliency=energy).on_grid((6, 4))
    inside = np.zeros((24, 16), dtype=bool)
    inside[8:16, 4:12] = True
    x = (energy - energy.min()) / (energy.max() - energy.min())
    x = np.where(inside, x, x[inside].min())
    cells = x.reshape(6, 4, 4, 4).mean(axis=(1, 3))
    blurred = maps.blur(torch.from_numpy(cells)[None])[0].numpy()  # itself against loops above
    expected = (blurred - blurred.min()) / (blurred.max() - blurred.min())
    np.testing.assert_allclose(saliency[0].numpy(), expected, rtol=1e-12)
    tokens = torch.zeros(6, 4, dtype=torch.bool)
    tokens[2:4, 1:3] = True
    assert torch.equal(mask[0], dilated(tokens, 2))


def test_masks_in_every_form():
    composite, original = paste()
    expected = fr.LooseRoPE.from_images(composite, original)
    inside = expected.mask[0].numpy()
    for mask in (inside, torch.from_numpy(inside), Image.fromarray(inside.astype(np.uint8) * 255)):
        method = fr.LooseRoPE.from_images(composite, mask=mask)
        assert torch.equal(method.mask, expected.mask)
        assert torch.equal(method.saliency, expected.saliency)


def test_what_compression_leaves_outside_a_mask_is_not_inside():
    composite, original = paste()
    expected = fr.LooseRoPE.from_images(composite, original).mask
    soiled = torch.where(expected[0], 255, torch.randint(0, 9, expected[0].shape)).to(torch.uint8)
    for mask in (soiled, soiled.numpy(), Image.fromarray(soiled.numpy())):
        assert torch.equal(fr.LooseRoPE.from_images(composite, mask=mask).mask, expected)
    ones = expected[0].to(torch.uint8)  # no picture
    assert torch.equal(fr.LooseRoPE.from_images(composite, mask=ones).mask, expected)


def test_a_batch_of_pictures_is_its_rows():
    composite, original = paste()
    other = composite.copy()
    other[2:6, 2:6] = 255 - other[2:6, 2:6]
    both = fr.LooseRoPE.from_images(np.stack([composite, other]), np.stack([original, original]))
    for row, picture in enumerate((composite, other)):
        alone = fr.LooseRoPE.from_images(picture, original)
        for a, b in zip(both.on_grid((6, 4)), alone.on_grid((6, 4)), strict=True):
            torch.testing.assert_close(a[row], b[0])


def test_dials_pass_through():
    composite, original = paste()
    method = fr.LooseRoPE.from_images(composite, original, boost=0.5, levels=None, reference=1, smooth=False)
    assert (method.boost, method.levels, method.reference, method.smooth) == (0.5, None, 1, False)


@pytest.mark.parametrize(("kwargs", "name"), [
    ({}, "original"), (dict(original=1, mask=1), "original"), (dict(original="x.png"), "original"),
    (dict(original=np.zeros((4, 4, 3))), "original"), (dict(mask=np.ones((4, 4))), "mask"),
    (dict(mask=np.zeros((24, 16))), "mask"), (dict(mask="m.png"), "mask"), (dict(original=paste()[0]), "original"),
    (dict(mask=np.ones((24, 16)), saliency="magic"), "saliency"),
    (dict(mask=np.ones((24, 16)), saliency=3), "saliency"),
    (dict(mask=np.ones((24, 16)), saliency=np.ones((3, 2, 2))), "saliency"),
    (dict(mask=np.ones((24, 16)), saliency=lambda image, mask: "x"), "saliency"),
])  # fmt: skip
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, received "):
        fr.LooseRoPE.from_images(paste()[0], **kwargs)


@pytest.mark.parametrize(
    "composite", ["x.png", np.zeros((4, 4)), np.full((4, 4, 3), 2.0), torch.zeros(4, 4, 3), np.full((4, 4, 3), -1)]
)
def test_bad_pictures_are_named(composite):
    with pytest.raises(ValueError, match=r"^composite: expected .*, received "):
        fr.LooseRoPE.from_images(composite, mask=np.ones((4, 4)))
