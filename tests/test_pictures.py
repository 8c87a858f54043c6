"""Pictures and masks as users have them: orientation, every mode, broken and unusual files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import fastrope as fr

pytest.importorskip("PIL")
from PIL import Image, ImageOps

from fastrope.pictures import mask_of, open_mask, open_picture, rgb, to_picture

RED, WHITE, GREY = (255, 0, 0), (255, 255, 255), (128, 128, 128)
LEFT = np.zeros((6, 8), dtype=np.uint8)  # a mask: the left half
LEFT[:, :4] = 255


def turned(picture: Image.Image, path: Path, orientation: int) -> Path:
    """Saved so that EXIF has to turn it to look like ``picture``."""
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.transpose(undo).save(path, exif=exif)
    return path


def wedge() -> Image.Image:
    """Light from left to right, so that sides are told apart."""
    return Image.fromarray(np.tile(np.arange(8, dtype=np.uint8) * 30, (6, 1))).convert("RGB")


# ---- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_pictures_and_masks_are_upright(orientation, tmp_path):
    path = turned(wedge(), tmp_path / "a.png", orientation)
    found = open_picture("--image", path)
    assert (found.mode, found.size) == ("RGB", (8, 6))
    assert np.array_equal(np.asarray(found), np.asarray(wedge()))
    assert not found.getexif().get(0x0112)
    mask = turned(Image.fromarray(LEFT), tmp_path / "m.png", orientation)
    assert np.array_equal(open_mask("--mask", mask), LEFT > 0)


def test_from_images_turns_what_it_is_given(tmp_path):
    """A photo of a phone and a mask that was painted on it, upright."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 16, 3), dtype=np.uint8))
    mask = np.zeros((24, 16), dtype=np.uint8)
    mask[4:12, 2:10] = 255
    expected = fr.LooseRoPE.from_images(noise, mask=mask)
    photo = Image.open(turned(noise, tmp_path / "a.png", 6))
    method = fr.LooseRoPE.from_images(photo, mask=Image.fromarray(mask))
    assert torch.equal(method.mask, expected.mask)
    assert torch.equal(method.saliency, expected.saliency)


# ---- modes -----------------------------------------------------------------------------------------------------------


def deep(mode: str, white: float) -> Image.Image:
    kind = {"F": np.float32, "I": np.int32, "I;16B": ">u2"}.get(mode, np.uint16)
    values = (np.asarray([[0.0, 0.5, 1.0]]) * white).astype(kind)
    return Image.fromarray(values) if mode != "I;16B" else Image.frombytes(mode, (3, 1), values.tobytes())


@pytest.mark.parametrize(("mode", "white"), [("I;16", 65535), ("I;16B", 65535), ("I", 65535), ("F", 1.0)])
def test_deep_modes_keep_their_greys(mode, white):
    picture = deep(mode, white)
    assert picture.mode == mode
    assert np.asarray(rgb("x", picture))[0].tolist() == [[0] * 3, [int(127.5 if mode != "F" else 128)] * 3, [255] * 3]
    assert mask_of("x", picture)[0].tolist() == [False, mode == "F", True]  # one half of 65535, cut, is below


def test_a_16_bit_file_is_not_white(tmp_path):
    Image.fromarray(np.full((2, 2), 257 * 100, dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(open_picture("--image", tmp_path / "a.png")).max() == 100
    assert not open_mask("--mask", tmp_path / "a.png").any()
    values = np.full((24, 16), 600, dtype=np.uint16)
    values[4:12, 2:10] = 65535
    method = fr.LooseRoPE.from_images(np.zeros((24, 16, 3)), mask=values)
    assert int(method.mask.sum()) == 64


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "LA", "PA", "RGBA", "RGBa"]
)
def test_every_mode_of_8_bits_is_read(mode):
    source = Image.new("RGB", (4, 4), WHITE)
    if mode == "LAB":
        source = Image.new("LAB", (4, 4), (255, 128, 128))
    picture = (
        source if mode == "LAB" else source.convert("RGBA").convert(mode) if mode == "RGBa" else source.convert(mode)
    )
    assert picture.mode == mode
    assert np.asarray(rgb("x", picture)).min() >= 253
    assert mask_of("x", picture).all()


def test_what_is_transparent_is_white():
    for clear in (Image.new("RGBA", (2, 2), (0, 0, 0, 0)), Image.new("LA", (2, 2), (0, 0)), Image.new("La", (2, 2))):
        assert np.asarray(rgb("x", clear)).min() == 255
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert np.asarray(rgb("x", palette))[0, 0].tolist() == [200, 0, 0]
    palette.info["transparency"] = 1
    assert np.asarray(rgb("x", palette)).min() == 255


@pytest.mark.parametrize("colour", [WHITE, (0, 0, 0), RED])
def test_a_mask_with_transparency_is_its_alpha(colour):
    picture = Image.new("RGB", (8, 6), colour)
    picture.putalpha(Image.fromarray(LEFT))
    assert np.array_equal(mask_of("x", picture), LEFT > 0)


def test_a_mask_that_is_opaque_is_its_colours():
    picture = Image.merge("RGBA", [Image.fromarray(LEFT)] * 3 + [Image.new("L", (8, 6), 255)])
    assert np.array_equal(mask_of("x", picture), LEFT > 0)
    assert np.array_equal(mask_of("x", Image.fromarray(LEFT // 2)), np.zeros_like(LEFT) > 0)
    assert mask_of("x", Image.new("RGB", (1, 1), GREY)).all()


@pytest.mark.parametrize(("picture", "said"), [
    (Image.new("F", (2, 2), 200.0), r"x: expected values in 0..1 in mode F, received 200..200"),
    (Image.new("F", (2, 2), float("nan")), r"x: expected values in 0..1 in mode F, received nan..nan"),
    (Image.new("I", (2, 2), 1 << 20), r"x: expected values in 0..65535 in mode I, received 1.*"),
])  # fmt: skip
def test_values_out_of_range_are_named(picture, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        rgb("x", picture)


# ---- files -----------------------------------------------------------------------------------------------------------


def broken(path: Path) -> Path:
    """A PNG whose second half is missing."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def animated(path: Path) -> Path:
    Image.new("L", (4, 4)).save(path, save_all=True, append_images=[Image.new("L", (4, 4), 255)])
    return path


@pytest.mark.parametrize(("make", "said"), [
    (broken, "a.png is no picture that can be read (image file is truncated"),
    (lambda path: path.mkdir() or path, "a.png is no picture that can be read (a folder)"),
    (lambda path: path.write_text("x") and path, "a.png is no picture that can be read (cannot identify"),
    (lambda path: path, "no file "),
    (lambda path: animated(path.with_suffix(".gif")), "a.gif with 2; save one of them"),
    (lambda path: animated(path.with_suffix(".webp")), "a.webp with 2; save one of them"),
])  # fmt: skip
@pytest.mark.parametrize("read", [open_picture, open_mask])
def test_files_that_are_no_picture_are_named(make, said, read, tmp_path):
    with pytest.raises(ValueError, match=r"^--image: ") as found:
        read("--image", make(tmp_path / "a.png"))
    assert said in str(found.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"^--image: .* is no picture that can be read \(.*4096 pixels"):
        open_picture("--image", tmp_path / "a.png")


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(ValueError, match=r"^--image: .*Permission denied"):
        open_picture("--image", tmp_path / "a.png")


def test_names_may_hold_anything(tmp_path):
    path = tmp_path / "mein Bild, 画像.png"
    wedge().save(path)
    assert open_picture("--image", path).size == (8, 6)


# ---- from pixels -----------------------------------------------------------------------------------------------------


def test_pixels_that_are_no_numbers_make_no_picture():
    with pytest.raises(ValueError, match=r"^the result: expected .*, received values in nan..nan$"):
        to_picture("the result", np.full((2, 2, 3), np.nan))


def test_a_reference_is_turned_too(tmp_path):
    pytest.importorskip("diffusers")
    from fastrope.bindings.diffusers import encoding

    photo = Image.open(turned(wedge(), tmp_path / "a.png", 8))
    (found,) = encoding.as_pictures(photo)
    assert np.array_equal(np.asarray(found), np.asarray(ImageOps.exif_transpose(photo)))
    assert found.size == (8, 6)
