#!/usr/bin/env python3
"""``python bench/run.py`` is ``fastrope bench``, from a clone. The package need not be installed."""

import importlib.util
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Run it; where nothing is installed, from links to the clone that last as long as the run."""
    with tempfile.TemporaryDirectory(prefix="fastrope-links-") as folder:
        if importlib.util.find_spec("fastrope") is None:
            from links import CLONE, site  # the folder of this file is where Python looks first

            sys.path[0] = str(site(CLONE, Path(folder)))
        from fastrope.cli import main as fastrope

        return fastrope(["bench", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
