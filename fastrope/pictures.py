"""Pictures: one way to read a file or PIL picture as a picture, one way to read it as a mask, one way back from pixels.

A picture is turned by its EXIF orientation. Modes of 8 bits are converted to RGB. 16 bits (``I;16``, ``I``) are scaled
from 0..65535, and ``F`` from 0..1. Transparent parts are laid on white.

A mask with transparency is inside where its opacity is at least one half; its colours do not count. Any other mask is
inside where its brightest channel is at least half of white. Other forms are refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .checks import require

if TYPE_CHECKING:
    from PIL.Image import Image

FULL = {"F": 1.0, "I": 65535, "I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I;16N": 65535}  # white, in deep modes
LAYERED = ("MPO", "PSD")  # formats whose further frames are previews or layers of one picture


def open_picture(option: str, path: Path) -> Image:
    """The picture of a file, in RGB.

    Raises:
        ValueError: naming the option: no such file, no picture for pillow, an animation, a mode that :func:`rgb`
            refuses.
    """
    return rgb(option, _load(option, path))


def open_mask(option: str, path: Path) -> np.ndarray:
    """The mask of a file, ``(H, W)`` bool, True inside.

    Raises:
        ValueError: as :func:`open_picture` does.
    """
    return mask_of(option, _load(option, path))


def rgb(name: str, picture: Any) -> Image:
    """A PIL picture, upright and in RGB.

    Raises:
        ValueError: values outside of the range of a deep mode, or a mode that cannot become RGB.
    """
    from PIL import Image

    picture = _upright(name, picture)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def mask_of(name: str, picture: Any) -> np.ndarray:
    """A PIL picture as a mask, ``(H, W)`` bool, True inside.

    Raises:
        ValueError: as :func:`rgb` does.
    """
    picture = _upright(name, picture)
    if picture.mode == "RGBA":
        alpha = np.asarray(picture.getchannel("A"))
        if alpha.min() < alpha.max():
            return alpha >= 128
    return np.asarray(picture.convert("RGB")).max(axis=2) >= 128


def as_pixels(name: str, image: object) -> torch.Tensor:
    """A picture as ``(B, 3, H, W)`` float64 in 0..255 on the CPU.

    Args:
        image: a PIL image, an array ``(H, W, 3)`` or ``(B, H, W, 3)``, or a tensor ``(3, H, W)`` or ``(B, 3, H, W)``;
            integers are in 0..255, floating-point numbers in 0..1.

    Raises:
        ValueError: another type or shape, values out of range.
    """
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        forms = "a PIL image, an array (H, W, 3) or a tensor (3, H, W)"
        require(callable(getattr(image, "convert", None)), name, forms, type(image).__name__)
        image = np.asarray(rgb(name, image))
    channels_last = isinstance(image, np.ndarray)
    x = torch.from_numpy(np.array(image)) if channels_last else image.detach().cpu()
    shape = "(H, W, 3) or (B, H, W, 3)" if channels_last else "(3, H, W) or (B, 3, H, W)"
    ok = x.ndim in (3, 4) and x.numel() > 0 and x.shape[-1 if channels_last else -3] == 3
    require(ok, name, shape, tuple(x.shape))
    x = x.double() * (255 if x.is_floating_point() else 1)
    require(bool(((x >= 0) & (x <= 255)).all()), name, "integers in 0..255 or floating-point numbers in 0..1",
            f"values in {float(x.min()):g}..{float(x.max()):g}")  # fmt: skip
    x = x.reshape(-1, *x.shape[-3:])
    return x.permute(0, 3, 1, 2) if channels_last else x


def to_picture(name: str, pixels: object) -> Image:
    """One picture in any form of :func:`as_pixels`, as a PIL picture in RGB.

    Raises:
        ValueError: a batch, values that are not finite, or anything else that :func:`as_pixels` refuses.
    """
    from PIL import Image

    x = as_pixels(name, pixels)
    require(len(x) == 1, name, "one picture", f"a batch of {len(x)}")
    return Image.fromarray(x[0].round().byte().permute(1, 2, 0).numpy())


def _load(option: str, path: Path):
    from PIL import Image

    try:
        with Image.open(path) as picture:
            frames = getattr(picture, "n_frames", 1)
            picture.load()
    except MemoryError:
        raise
    except FileNotFoundError:
        raise ValueError(f"{option}: no file {path}") from None
    except Exception as error:  # a broken file can make pillow raise anything
        why = "a folder" if isinstance(error, IsADirectoryError) else str(error) or type(error).__name__
        raise ValueError(f"{option}: {path} is no picture that can be read ({why})") from None
    require(frames == 1 or picture.format in LAYERED, option, "one picture", f"{path} with {frames}; save one of them")
    return picture


def _upright(name: str, picture: Any):
    """A picture turned by its EXIF orientation, with 8 bits per channel: RGBA if it may be transparent, else another
    mode."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    mode, clear = picture.mode, picture.has_transparency_data
    if mode in FULL:
        require(not clear, name, f"a picture of mode {mode} without transparency", "one with it")
        values, white = np.asarray(picture, dtype=np.float64), FULL[mode]
        low, high = float(values.min()), float(values.max())
        require(0 <= low <= high <= white, name, f"values in 0..{white:g} in mode {mode}", f"{low:g}..{high:g}")
        return Image.fromarray((values / white * 255).round().astype(np.uint8))
    try:
        if mode in ("La", "RGBa"):
            picture = picture.convert(mode[:-1] + "A")
        return picture.convert("RGBA") if clear else picture.convert("RGB")
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(f"{name}: expected a mode that can become RGB, received {mode} ({error})") from None
