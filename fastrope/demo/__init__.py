"""``fastrope demo``: pictures of what the modulations do, and whether the backends agree, in one report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..commands.running import add_out, find_device
from ..outputs import check_report
from .style import require_extras


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``report.md``, ``report.html``, ``numbers.json`` and the pictures.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0; 1 when a backend failed or disagrees with the reference.

    Raises:
        MissingExtra: a package to draw with.
        ValueError: a folder or device that cannot be used, files that would be replaced unasked.
    """
    parser = argparse.ArgumentParser(prog="fastrope demo", description="Pictures of what the modulations do.")
    add_out(parser.add_argument, "DIR", "demo")
    parser.add_argument("--quick", action="store_true", help="smaller grids and fewer steps")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    arguments = parser.parse_args(argv)
    require_extras()
    from .build import FILES, build

    out, device = arguments.out or Path("demo"), find_device(arguments.device, ("cpu", "cuda"))
    check_report("--out", out, FILES, arguments.force)
    return build(out, device, arguments.quick)
