"""``fastrope style``: a picture in the style of another one (Untwisting RoPE)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import apply
from . import styling
from .editors import TINY, Missing
from .files import few_threads, save_picture


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture, and beside it a record of how it was made (``.json``).

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0; 2 when the command cannot run: an argument, a file, or weights.

    Raises:
        ModuleNotFoundError: diffusers, transformers or pillow is not installed.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    styling.check_options(parser, options)
    try:
        with few_threads(options.model == TINY):
            return _run(options)
    except (Missing, ValueError, NotImplementedError) as error:
        print(f"fastrope style: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrope style",
        description="Draw a prompt in the style of a reference picture: the target attends to the reference's keys, "
        "weighted per frequency band, so that style comes over and places do not.",
    )
    styling.add_options(parser)
    add = parser.add_argument
    add("--s-hf", type=float, nargs="+", metavar="S", help="weight of high frequencies, first and last step, or "
        "one for all: lower copies less (default: the preset's)")  # fmt: skip
    add("--s-lf", type=float, nargs="+", metavar="S", help="weight of low frequencies, likewise: higher takes more")
    add("--plain", action="store_true", help="also draw without the reference, to FILE with -plain in its name")
    add("--out", type=Path, default=Path("style.png"), metavar="FILE", help="(default: style.png)")
    return parser


def _run(options: argparse.Namespace) -> int:
    given = {name: _dial(f"--{name.replace('_', '-')}", getattr(options, name)) for name in ("s_hf", "s_lf")}
    given = {name: value for name, value in given.items() if value is not None}
    styling.method_of(options, {}, **given)
    ready = styling.prepare(options)
    method = styling.method_of(options, ready.axis0, **given)
    ready.pipe.set_progress_bar_config(desc="style", disable=False)
    with apply(ready.pipe, method, reference=ready.reference):
        made = ready.run(options.seed)
    save_picture(made, options.out)
    written = [options.out]
    if options.plain:
        ready.pipe.set_progress_bar_config(desc="plain", disable=False)
        written.append(options.out.with_stem(f"{options.out.stem}-plain"))
        save_picture(ready.run(options.seed), written[-1])
    written.append(options.out.with_suffix(".json"))
    kept = {"dials": styling.dials(method), **styling.record(options, ready)}
    written[-1].write_text(json.dumps(kept, indent=1), encoding="utf-8")
    for path in written:
        print(path)
    return 0


def _dial(option: str, values: Sequence[float] | None) -> float | tuple[float, float] | None:
    if values is None:
        return None
    if len(values) > 2:
        raise ValueError(f"{option}: expected one number, or those of the first and the last step, received {values}")
    return values[0] if len(values) == 1 else tuple(values)
