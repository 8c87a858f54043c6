"""What commands share that read and write pictures."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch

from .editors import Missing


def open_picture(option: str, path: Path):
    """The picture of an option, RGB.

    Raises:
        Missing: no such file, or none that pillow reads.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise Missing(f"{option}: no file {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise Missing(f"{option}: {path} is no picture ({error})") from None


def as_picture(pixels: torch.Tensor):
    """Pixels ``(3, H, W)`` in 0..1 as a PIL picture."""
    from PIL import Image

    from ..methods.maps import as_pixels

    return Image.fromarray(as_pixels("pixels", pixels)[0].round().byte().permute(1, 2, 0).numpy())


def require_format(path: Path) -> None:
    """Know before hours of work that the result can be written.

    Raises:
        ValueError: an extension that pillow does not know, a folder that cannot be made.
    """
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out: unknown file extension: {path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {error}") from None


def find_device(name: str | None) -> torch.device:
    """The device of that name; by default CUDA where there is one.

    Raises:
        ValueError: torch cannot use it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device: {str(error).splitlines()[0]}") from None
    return device


def save_picture(picture, path: Path) -> None:
    """Write a PIL picture, folders included.

    Raises:
        ValueError: an extension that pillow does not know.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        picture.save(path)
    except ValueError as error:
        raise ValueError(f"--out: {error}") from None


def layer_range(text: str) -> range:
    """``FIRST-LAST`` on the command line, both included."""
    first, _, last = text.partition("-")
    try:
        found = range(int(first), int(last or first) + 1)
    except ValueError:
        found = range(0)
    if len(found) == 0:
        raise argparse.ArgumentTypeError(f"expected FIRST-LAST, received {text!r}")
    return found


@contextlib.contextmanager
def few_threads(few: bool):
    """Tensors as small as the tiny model's lose more to waiting threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if few else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
