"""``fastrope sweep``: a contact sheet of Untwisting RoPE over a grid of s_hf and s_lf."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import __version__, apply
from ..checks import require
from ..extras import require_packages
from ..figures import Cell, sheet, short
from ..outputs import check_files, write_picture, write_text
from ..pictures import open_picture
from .running import add_out, command, file_path, flag, given, machine, result
from .style import Styling, add_options, check_options, method_of, pictures_of

HIGH, LOW = (0.0, 0.25, 0.5, 0.75, 1.0), (0.6, 1.0, 1.2, 1.5)
Value = float | tuple[float, float]
FREE = ("s_hf", "s_lf", "out", "cells", "force")  # options that make no difference to a cell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrope sweep",
        description="A contact sheet of s_hf (down) and s_lf (across): prompt, seed and reference are the same in all.",
    )
    add_options(parser)
    add, what = parser.add_argument, "a number for all steps, or FIRST:LAST"
    for name, kind, values in (("--s-hf", "rows", HIGH), ("--s-lf", "columns", LOW)):
        usual = " ".join(map(_name, values))
        add(name, type=_value, nargs="+", default=values, metavar="S", help=f"{kind}, each {what} (default: {usual})")
    add("--cells", type=file_path, metavar="FOLDER", help="keeps every cell in full size as it is drawn; one that an "
        "earlier run with the same options left is not drawn again (default: sweep-cells, after --out)")  # fmt: skip
    add_out(add, "FILE", "sweep.png")
    return parser


def _value(text: str) -> Value:
    try:
        numbers = tuple(float(part) for part in text.split(":"))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"expected a number or FIRST:LAST, received {text!r}")
    return numbers[0] if len(numbers) == 1 else numbers


def _name(value: Value) -> str:
    """A value as text, short if that is exact."""
    numbers = value if isinstance(value, tuple) else (value,)
    return ":".join(f"{n:g}" if float(f"{n:g}") == n else repr(n) for n in numbers)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    check_options(parser, options)
    for name in ("s_hf", "s_lf"):
        values = getattr(options, name)
        twice = [value for n, value in enumerate(values) if value in values[:n]]
        if twice:
            parser.error(f"{flag(name)}: expected values that differ, received {_name(twice[0])} twice")


def _run(options: argparse.Namespace) -> list[Path]:
    """Write every cell when it is drawn, then the contact sheet and a record of how it was made."""
    require_packages("diffusers", "transformers", "matplotlib", "PIL", "tqdm")
    from tqdm.auto import tqdm

    grid = [(high, low) for high in options.s_hf for low in options.s_lf]
    for high, low in grid:
        method_of(options, s_hf=high, s_lf=low)
    out = result(options, "sweep.png")
    folder = options.cells or out.with_name(f"{out.stem}-cells")
    names = [folder / f"s_hf_{_name(high)}_s_lf_{_name(low)}.png".replace(":", "-") for high, low in grid]
    made_by, plain_file = folder / "cells.json", folder / "plain.png"
    files, recipe = [made_by, plain_file, *names], _recipe(options)
    resumed = not options.force and _holds(made_by, recipe)
    check_files("--cells", files if resumed else (), () if resumed else files, options.force)
    require(out not in files and out.with_suffix(".json") not in files, "--out", "a name that no cell has", out)
    ready = Styling(options)
    if not resumed:
        write_text(made_by, json.dumps(recipe, indent=1))
    with tqdm(total=1 + len(grid), desc="sweep", unit="picture") as bar:

        def picture(path: Path):
            """The cell of an earlier run, else a new one, which is stored."""
            if not (resumed and path.exists()):
                write_picture(path, ready.draw())
            bar.update()
            return open_picture("--cells", path)

        plain, drawn = picture(plain_file), []
        with apply(ready.model.pipe, reference=ready.reference) as handle:
            for (high, low), path in zip(grid, names, strict=True):
                method = ready.method(s_hf=high, s_lf=low)
                handle.update(method)
                drawn.append(picture(path))
    made = draw(ready.pictures[0], plain, drawn, options.s_hf, options.s_lf, _caption(options, ready.model.settings))
    return [write_picture(out, made), ready.record(out, method, "s_hf", "s_lf"), *files]


def draw(reference, plain, cells: Sequence, high: Sequence[Value], low: Sequence[Value], caption: str):
    """The contact sheet as a PIL picture: reference and plain picture, then a row of cells per value of ``high``."""
    shown = iter(cells)
    rows = [[Cell(next(shown), f"s_hf {_name(h)}, s_lf {_name(w)}") for w in low] for h in high]
    return sheet([[Cell(reference, "reference"), Cell(plain, "without it")], *rows], caption)


def _caption(options: argparse.Namespace, settings) -> str:
    how = "native reference" if options.native else options.trajectory
    words = f"“{short(options.prompt, 60)}”" if options.prompt else ""
    dials = (f"{name} {value}" for name, value in given(options, "preset", "beta", "adain", "axis0").items())
    parts = words, options.model, how, f"{settings.steps} steps", f"seed {options.seed}", *dials
    return ", ".join(filter(None, parts))


def _recipe(options: argparse.Namespace) -> dict[str, str]:
    """What a cell depends on besides its values: a cell of the same recipe need not be drawn again."""
    pictures = hashlib.sha256()
    for picture in pictures_of(options):
        pictures.update(repr(picture.size).encode() + picture.tobytes())
    told = {name: str(value) for name, value in vars(options).items() if name not in FREE}
    where = {"machine": str(machine(options)), "torch": str(torch.__version__), "fastrope": __version__}
    return told | where | {"pictures": pictures.hexdigest()}


def _holds(path: Path, recipe: dict[str, str]) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")) == recipe
    except (OSError, ValueError, RecursionError):
        return False


main = command(_parser, _run, _check)
