"""Python processes of our own, which import what this one imports."""

from __future__ import annotations

import sys


def command(code: str, *flags: str) -> list[str]:
    """How to start a Python that runs ``code`` and looks for packages where this process does.

    On its own it would look in the current folder first. In a clone, that holds a ``fastrope`` without kernels.

    Args:
        flags: of the interpreter.
    """
    folders = [folder for folder in sys.path if isinstance(folder, str)]  # Python ignores others
    return [sys.executable, *flags, "-c", f"import sys; sys.path[:] = {folders!a}; {code}"]
