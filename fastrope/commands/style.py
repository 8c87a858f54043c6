"""``fastrope style``: a picture in the style of another one (Untwisting RoPE)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import apply
from ..outputs import write_picture, write_record
from . import styling
from .running import add_out, command, plain_path, result


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
    add_out(add, "FILE", "style.png")
    return parser


def _run(options: argparse.Namespace) -> list[Path]:
    """Write the picture, and beside it a record of how it was made."""
    given = {name: _dial(f"--{name.replace('_', '-')}", getattr(options, name)) for name in ("s_hf", "s_lf")}
    given = {name: value for name, value in given.items() if value is not None}
    styling.method_of(options, {}, **given)
    out = result(options, "style.png")
    ready = styling.prepare(options)
    method = styling.method_of(options, ready.axis0, **given)
    ready.pipe.set_progress_bar_config(desc="style", disable=False)
    with apply(ready.pipe, method, reference=ready.reference):
        made = ready.run(options.seed)
    record = {"dials": styling.dials(method), **styling.record(options, ready)}
    written = [write_picture(out, made), write_record(out.with_suffix(".json"), record)]
    if options.plain:
        ready.pipe.set_progress_bar_config(desc="plain", disable=False)
        written.append(write_picture(plain_path(out), ready.run(options.seed)))
    return written


def _dial(option: str, values: Sequence[float] | None) -> float | tuple[float, float] | None:
    if values is None:
        return None
    if len(values) > 2:
        raise ValueError(f"{option}: expected one number, or those of the first and the last step, received {values}")
    return values[0] if len(values) == 1 else tuple(values)


main = command(_parser, _run, styling.check_options)
