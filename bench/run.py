#!/usr/bin/env python3
"""``python bench/run.py`` is ``fastrope bench``, from a clone whose package is installed (``pip install -e .``)."""

import sys

from fastrope.bench import main

if __name__ == "__main__":
    sys.exit(main())
