"""``fastrope evidence``: measure what the methods do on the models of the lab, and write the page about it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial

from ..checks import require
from ..extras import require_packages
from .running import QUIET, file_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; prints what it wrote."""
    options = _parser().parse_args(argv)
    os.environ.setdefault(*QUIET)
    require_packages("diffusers", "transformers", "matplotlib", "tqdm")
    from tqdm.auto import tqdm

    from ..lab.evidence import page, run

    samples = run.QUICK if options.quick else options.samples
    require(samples > 0, "--samples", "a number of at least 1", samples)
    if not options.page:

        def each(part: str):
            return partial(tqdm, desc=part, unit="setting")

        run.measure(options.out / page.FOLDER, samples, options.only or page.PARTS, each)
    for path in page.write(options.out):
        print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    from ..lab.evidence.page import PARTS
    from ..lab.evidence.run import QUICK, SAMPLES

    parser = argparse.ArgumentParser(
        prog="fastrope evidence",
        description="Effects of GRAG, Untwisting RoPE, LooseRoPE and ISLock on the small trained models of "
        "fastrope.lab: numbers per sample, a page with tables and intervals, a picture per method.",
    )  # fmt: skip
    add = parser.add_argument
    add("--out", type=file_path, default="evidence", help="folder of evidence.md and of the numbers (%(default)s)")
    add("--samples", type=int, default=SAMPLES, help="pictures per setting (%(default)s)")
    add("--quick", action="store_true", help=f"{QUICK} pictures per setting")
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=f"measure some of {', '.join(PARTS)}")
    add("--page", action="store_true", help="measure nothing: write the page from the numbers in --out")
    return parser
