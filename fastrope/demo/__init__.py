"""``fastrope demo``: pictures of what the modulations do, and whether the backends agree, in one report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .style import require_extras


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``report.md``, ``report.html``, ``numbers.json`` and the pictures.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0; 1 when a backend failed or disagrees with the reference; 2 when the demo cannot run here.

    Raises:
        MissingExtra: a package that it draws with is not installed.
    """
    parser = argparse.ArgumentParser(prog="fastrope demo", description="Pictures of what the modulations do.")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where to write (default: demo)")
    parser.add_argument("--quick", action="store_true", help="smaller grids and fewer steps")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    arguments = parser.parse_args(argv)
    require_extras()
    from .build import build, choose_device

    try:
        device = choose_device(arguments.device)
    except (RuntimeError, ValueError) as error:
        print(f"fastrope demo: --device: {error}", file=sys.stderr)
        return 2
    return build(arguments.out, device, arguments.quick)
