"""``fastrope demo``: the methods at work on trained models, what the modulations do, and whether the backends agree."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..commands.running import QUIET, add_out, find_device
from ..extras import require_packages
from ..outputs import check_report


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``demo.html`` and its pictures.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0; 1 when a backend failed or disagrees with the reference.

    Raises:
        MissingExtra: a package to draw with.
        ValueError: a folder or device that cannot be used, files that would be replaced unasked.
    """
    parser = argparse.ArgumentParser(prog="fastrope demo", description="The methods at work on small trained models.")
    add_out(parser.add_argument, "DIR", "demo")
    parser.add_argument("--quick", action="store_true", help="fewer pictures")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    options = parser.parse_args(argv)
    require_packages("diffusers", "transformers", "matplotlib", "PIL", "tqdm")
    os.environ.setdefault(*QUIET)
    from .build import FILES, build

    out, device = options.out or Path("demo"), find_device(options.device, ("cpu", "cuda"))
    check_report("--out", out, FILES, options.force)
    return build(out, device, options.quick)
