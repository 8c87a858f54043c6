"""Files that commands write. They are checked before the work, written beside their place, and then moved there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checks import require
from .version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image


def check_files(option: str, named: Sequence[Path], others: Iterable[Path] = (), force: bool = False) -> None:
    """Require that files can be written, before the work that makes them.

    Args:
        option: the option that says where they go.
        named: files that the user named. Existing ones will be replaced.
        others: further files. An existing one is refused unless ``force``.

    Raises:
        ValueError: naming the option: a folder or device of that name, a folder that cannot be written to, a file that
            would be replaced although the user did not name it, two results with one name.
    """
    others = list(others)
    for path in (*named, *others):
        require([*named, *others].count(path) == 1, option, "a file of its own for each result", f"{path} twice")
        found = _look(option, path)
        require(found is None or stat.S_ISREG(found.st_mode), option, "a file", f"{path}, which is something else")
        require(found is None or os.access(path, os.W_OK), option, "a file that may be written", path)
        if found and path in others and not force:
            raise ValueError(f"{option}: {path} is there already; --force replaces it, another name or folder keeps it")
    for folder in dict.fromkeys(path.parent for path in (*named, *others)):
        check_folder(option, folder)


def check_folder(option: str, folder: Path) -> None:
    """Require a folder that can be written to, or that can be made.

    Raises:
        ValueError: naming the option.
    """
    found = next(place for place in (folder, *folder.parents, Path()) if _look(option, place))
    require(found.is_dir(), option, "a folder", f"{found}, which is none")
    try:
        with tempfile.TemporaryFile(dir=found):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot write to {found.absolute()}: {error.strerror}") from None


def check_report(option: str, folder: Path, names: Iterable[str], force: bool) -> None:
    """Require a folder for files with fixed names, by :func:`check_files`.

    Raises:
        ValueError: naming the option; also for a new folder with the name of a picture.
    """
    from PIL import Image

    picture = folder.suffix.lower() in Image.registered_extensions() and not folder.is_dir()
    require(not picture, option, "a folder", f"{folder}, a picture")
    check_folder(option, folder)
    check_files(option, (), [folder / name for name in names], force)


def check_format(option: str, path: Path) -> None:
    """Require a file name with the extension of a picture that pillow can write.

    Raises:
        ValueError: naming the option.
    """
    from PIL import Image

    kind, advice = Image.registered_extensions().get(path.suffix.lower()), f"{path.stem or 'picture'}.png would do"
    if kind is None:
        raise ValueError(f"{option}: unknown file extension: {path.suffix or 'none'}; {advice}")
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError):
        raise ValueError(f"{option}: pictures in {kind} can be read but not written; {advice}") from None


def write(path: Path, save: Callable[[Path], object]) -> Path:
    """Call ``save`` with the name of a new file beside ``path``, then move that file to ``path``, and return ``path``.

    Missing folders are made. An existing file stays as it is until the move, also if ``save`` fails.

    Raises:
        OSError: naming ``path``.
    """
    target = Path(os.path.realpath(path))  # so that a link stays a link
    part = target.with_name(f".fastrope-{secrets.token_hex(6)}{path.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save(part)
        if target.exists():
            shutil.copymode(target, part)
        os.replace(part, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path


def write_text(path: Path, text: str) -> Path:
    """Write text in UTF-8, by :func:`write`."""
    return write(path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_picture(path: Path, picture: Image) -> Path:
    """Write a PIL picture, by :func:`write`."""
    return write(path, picture.save)


def write_record(path: Path, record: dict) -> Path:
    """Write how something was made, with the versions it was made with, as JSON, by :func:`write`. A range is written
    as its ends, and what JSON does not know as text."""
    versions = {"torch": torch.__version__, "fastrope": __version__}
    return write_text(path, json.dumps(record | versions, indent=1, default=_as_json))


def _as_json(value: object) -> object:
    return [value[0], value[-1]] if isinstance(value, range) else str(value).removeprefix("torch.")


def _look(option: str, path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered, a null character
        raise ValueError(f"{option}: {path}: {getattr(error, 'strerror', None) or error}") from None
