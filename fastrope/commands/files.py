"""Pictures that commands read and write, and the records beside them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .. import __version__
from .running import Missing


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
        raise ValueError(f"--out: unknown file extension: {path.suffix or 'none'}; {path.stem}.png would do")
    require_folder("--out", path.parent)


def require_folder(option: str, folder: Path) -> None:
    """Make a folder, parents included.

    Raises:
        ValueError: naming the option, where that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: {error}") from None


def save_picture(picture, path: Path) -> Path:
    """Write a PIL picture, folders included; gives the path back.

    Raises:
        ValueError: an extension that pillow does not know.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        picture.save(path)
    except ValueError as error:
        raise ValueError(f"--out: {error}") from None
    return path


def plain_path(path: Path) -> Path:
    """Where the picture goes that is drawn without the method."""
    return path.with_stem(f"{path.stem}-plain")


def save_record(record: dict, path: Path) -> Path:
    """Write how a picture was made beside it, as JSON, with the versions it was made with; gives the path back."""
    record = record | {"torch": torch.__version__, "fastrope": __version__}
    path = path.with_suffix(".json")
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return path
