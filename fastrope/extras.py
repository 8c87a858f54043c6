"""Packages that only some parts need: the extra that installs each, and one error for a missing one."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence

EXTRAS = {"diffusers": "diffusers", "transformers": "transformers"}  # the extra demo installs these and all others


class MissingExtra(ModuleNotFoundError):
    """A package of an extra is missing, or has another version than needed. The message says how to install it."""


def install(packages: Sequence[str], others: str = "demo") -> str:
    """The command that installs ``packages``. ``others`` is the extra of packages without an extra of their name."""
    extras = sorted({EXTRAS.get(name, others) for name in packages})
    return f'pip install "fastrope[{others if others in extras else ",".join(extras)}]"'


def require_packages(*packages: str) -> None:
    """Require all of them to be installed, without importing any.

    Raises:
        MissingExtra: naming the missing ones, and one command that installs them all.
    """
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        raise MissingExtra(f"{', '.join(absent)} {verb} not installed: {install(absent)}", name=absent[0])


@contextlib.contextmanager
def importing(package: str) -> Iterator[None]:
    """A context for imports from ``package``, or of our modules that need it.

    Raises:
        MissingExtra: the package, or one that it needs, is missing; or its version lacks an imported name.
    """
    try:
        yield
    except MissingExtra:
        raise
    except ImportError as error:
        name = (error.name or package).partition(".")[0]
        if name == "fastrope":  # a fault of ours
            raise
        if importlib.util.find_spec(name) is None:
            problem = f"{name} is not installed"
        else:
            version = getattr(sys.modules.get(package), "__version__", "of an unknown version")
            problem = f"{package} {version} is installed, another version is needed ({error})"
        raise MissingExtra(f"{problem}: {install([package])}", name=error.name) from error
