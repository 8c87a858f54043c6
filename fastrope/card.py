"""What was found out about a GPU, in the user's cache folder.

A file is JSON with a list of entries for each card and the versions they hold for. It is replaced whole, so processes
that share it never see half of it. A file that cannot be read counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from . import backends, kernels, outputs, planning
from . import device as devices
from .version import __version__

FORMAT = 1
_WARNED: set[Path] = set()


def folder() -> Path:
    """``fastrope`` in ``XDG_CACHE_HOME``, in ``LOCALAPPDATA`` on Windows, else in ``~/.cache``.

    Raises:
        RuntimeError: there is no home.
    """
    given = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(given) if given and Path(given).is_absolute() else Path.home() / ".cache") / "fastrope"


def path(name: str) -> Path:
    """The file of entries called ``name``; see :func:`folder`."""
    return folder() / f"{name}.json"


def name_of(device: torch.device) -> str:
    """Name and capability of a GPU."""
    return f"{torch.cuda.get_device_name(device)} ({devices.capability(device)})"


@lru_cache(maxsize=64)
def key(device: torch.device) -> str:
    """A GPU and the versions that entries hold for, in readable form."""
    versions = {
        "driver": devices.driver_version(), "torch": torch.__version__, "triton": devices.triton_version(),
        "fastrope": f"{__version__} {digest(kernels, backends, planning)}",
    }  # fmt: skip
    return ", ".join([name_of(device), *(f"{name} {version}" for name, version in versions.items())])


def read(name: str) -> dict[str, list]:
    """Entries by card and versions. A file that is damaged or has another format holds none; one warning names it."""
    file = None
    try:
        file = path(name)
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or not all(isinstance(x, list) for x in found["cards"].values()):
            raise ValueError("another format")
        return found["cards"]
    except (OSError, RuntimeError):  # not there, or nothing of ours to read
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        ignore(file, f"it is damaged: {error!r}; delete it")
        return {}


def write(name: str, device: torch.device, entries: list) -> Path:
    """Replace the entries of a GPU under the present versions; returns the file.

    Raises:
        OSError, RuntimeError: it cannot be written.
    """
    file, cards = path(name), read(name) | {key(device): entries}
    return outputs.write_text(file, json.dumps({"format": FORMAT, "cards": cards}, indent=1))


def ignore(file: Path | None, why: str) -> None:
    """Say once in a process that a file is ignored."""
    if file is not None and file not in _WARNED:
        _WARNED.add(file)
        warnings.warn(f"fastrope ignores {file}: {why}", stacklevel=2)


def digest(*packages: ModuleType) -> str:
    """Digest of the sources of packages, which can change in a clone while its version stays."""
    folders = [Path(str(package.__file__)).parent for package in packages]
    files = [file for each in folders for file in sorted(each.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
