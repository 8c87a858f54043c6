"""``fastrope sweep``: one picture of many: Untwisting RoPE over a grid of s_hf and s_lf."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .. import __version__, apply
from ..checks import require
from ..extras import require_packages
from ..outputs import check_files, write_picture, write_record, write_text
from ..pictures import open_picture
from . import styling
from .running import add_out, command, file_path, machine, result

HIGH, LOW = (0.0, 0.25, 0.5, 0.75, 1.0), (0.6, 1.0, 1.2, 1.5)
Value = float | tuple[float, float]
FREE = ("s_hf", "s_lf", "out", "cells", "force")  # options that make no difference to a cell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrope sweep",
        description="A contact sheet of s_hf (down) and s_lf (across): prompt, seed and reference are the same in all.",
    )
    styling.add_options(parser)
    add = parser.add_argument
    what = "a number for all steps, or FIRST:LAST"
    add("--s-hf", type=_value, nargs="+", default=HIGH, metavar="S", help=f"rows, each {what} (default: {_list(HIGH)})")
    add("--s-lf", type=_value, nargs="+", default=LOW, metavar="S", help=f"columns, likewise (default: {_list(LOW)})")
    add("--cells", type=file_path, metavar="FOLDER", help="keeps every cell in full size as it is drawn; one that an "
        "earlier run with the same options left is not drawn again (default: sweep-cells, after --out)")  # fmt: skip
    add_out(add, "FILE", "sweep.png")
    return parser


def _run(options: argparse.Namespace) -> list[Path]:
    """Write every cell when it is drawn, then the contact sheet and a record of how it was made."""
    require_packages("diffusers", "transformers", "matplotlib", "PIL", "tqdm")
    from tqdm.auto import tqdm

    grid = [[styling.method_of(options, {}, s_hf=high, s_lf=low) for low in options.s_lf] for high in options.s_hf]
    out = result(options, "sweep.png")
    folder = options.cells or out.with_name(f"{out.stem}-cells")
    names = [[folder / _cell(high, low) for low in options.s_lf] for high in options.s_hf]
    made_by, plain_file = folder / "cells.json", folder / "plain.png"
    recipe = _recipe(options)
    resumed = not options.force and _holds(made_by, recipe)
    cells = [made_by, plain_file, *(name for row in names for name in row)]
    check_files("--cells", cells if resumed else (), () if resumed else cells, options.force)
    require(out not in cells and out.with_suffix(".json") not in cells, "--out", "a name that no cell has", out)
    ready = styling.prepare(options)
    grid = [[styling.method_of(options, ready.axis0, s_hf=m.s_hf, s_lf=m.s_lf) for m in row] for row in grid]
    ready.pipe.set_progress_bar_config(disable=True)
    if not resumed:
        write_text(made_by, json.dumps(recipe, indent=1))
    with tqdm(total=1 + len(grid) * len(grid[0]), desc="sweep", unit="picture") as bar:

        def picture(path: Path):
            """Of an earlier run, else drawn and kept."""
            if not (resumed and path.exists()):
                write_picture(path, ready.run(options.seed))
            bar.update()
            return open_picture("--cells", path)

        plain, drawn = picture(plain_file), []
        with apply(ready.pipe, reference=ready.reference) as handle:
            for methods, files in zip(grid, names, strict=True):
                drawn.append([])
                for method, file in zip(methods, files, strict=True):
                    handle.update(method)
                    drawn[-1].append(picture(file))
    sheet = draw(ready.pictures, plain, drawn, options.s_hf, options.s_lf, _caption(options, grid[0][0], ready))
    shared = {n: value for n, value in styling.dials(grid[0][0]).items() if n not in ("s_hf", "s_lf")}
    record = {"s_hf": list(options.s_hf), "s_lf": list(options.s_lf), "dials": shared}
    record_file = write_record(out.with_suffix(".json"), record | styling.record(options, ready))
    return [write_picture(out, sheet), record_file, *cells]


def _recipe(options: argparse.Namespace) -> dict[str, str]:
    """What a cell depends on besides its values: a cell of the same recipe need not be drawn again."""
    pictures = hashlib.sha256()
    for picture in styling.pictures_of(options):
        pictures.update(repr(picture.size).encode() + picture.tobytes())
    told = {name: str(value) for name, value in vars(options).items() if name not in FREE}
    where = {"machine": str(machine(options)), "torch": str(torch.__version__), "fastrope": __version__}
    return told | where | {"pictures": pictures.hexdigest()}


def _holds(path: Path, recipe: dict[str, str]) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")) == recipe
    except (OSError, ValueError, RecursionError):
        return False


def _cell(high: Value, low: Value) -> str:
    return f"s_hf_{_name(high)}_s_lf_{_name(low)}.png".replace(":", "-")


def draw(
    pictures: Sequence, plain, cells: Sequence[Sequence], high: Sequence[Value], low: Sequence[Value], caption: str
):
    """The contact sheet as a PIL picture.

    Args:
        pictures: references; the first is shown.
        plain: the prompt without a reference.
        cells: one row per value of ``high``, in it one picture per value of ``low``.
        caption: one line on top.
    """
    from matplotlib import rc_context
    from PIL import Image

    from ..demo import style

    lead = 1 if len(high) > 1 else 2  # columns of what there is to compare with
    columns, shape = lead + len(low), plain.height / plain.width
    with rc_context(style.settings()):
        figure = style.new_figure(2.1 * columns + 0.5, 2.1 * len(high) * shape + 0.9)
        panels = figure.subplots(len(high), columns, squeeze=False)
        beside = [panels[0, 0], panels[0, 1] if lead == 2 else panels[1, 0]]
        for axes, picture, title in zip(beside, (pictures[0], plain), ("reference", "without it"), strict=True):
            _show(axes, picture, title)
        for axes in panels[2:, 0] if lead == 1 else ():
            axes.set_axis_off()
        for row, (value, pictures_of_row) in enumerate(zip(high, cells, strict=True)):
            for column, picture in enumerate(pictures_of_row):
                axes = panels[row, lead + column]
                _show(axes, picture, f"s_lf {_name(low[column])}" if row == 0 else "")
                if column == 0:
                    axes.set_ylabel(f"s_hf {_name(value)}")
        figure.suptitle(caption, fontsize=9)
        data = io.BytesIO()
        figure.savefig(data, dpi=style.DPI, format="png")
    return Image.open(data).convert("RGB")


def _show(axes, picture, title: str) -> None:
    from ..demo import style

    style.picture_axes(axes)
    axes.imshow(picture, interpolation="nearest" if picture.width < 256 else "antialiased")
    axes.set_title(title, loc="center")


def _caption(options, method, ready) -> str:
    words = options.prompt or ""
    words = words if len(words) <= 60 else words[:57].rstrip() + "..."
    how = "native reference" if options.native else options.trajectory
    parts = [f"“{words}”" if words else "", options.model, how, f"{ready.settings.steps} steps", f"seed {options.seed}",
             f"beta {method.beta:g}", f"AdaIN {method.adain:g}", _axes(method.axis0)]  # fmt: skip
    return ", ".join(part for part in parts if part)


def _axes(axis0) -> str:
    if isinstance(axis0, Mapping):
        return "axes as the preset has them"
    return f"axes {', '.join(map(str, axis0))}" if isinstance(axis0, tuple) else f"axis 0 {axis0}"


def _value(text: str) -> Value:
    try:
        numbers = tuple(float(part) for part in text.split(":"))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"expected a number or FIRST:LAST, received {text!r}")
    return numbers[0] if len(numbers) == 1 else numbers


def _name(value: Value) -> str:
    """Short where that tells the value."""
    numbers = value if isinstance(value, tuple) else (value,)
    return ":".join(f"{n:g}" if float(f"{n:g}") == n else repr(n) for n in numbers)


def _list(values: Sequence[Value]) -> str:
    return " ".join(map(_name, values))


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    styling.check_options(parser, options)
    for name in ("s_hf", "s_lf"):
        values = getattr(options, name)
        twice = [value for n, value in enumerate(values) if value in values[:n]]
        if twice:
            parser.error(f"--{name.replace('_', '-')}: expected values that differ, received {_name(twice[0])} twice")


main = command(_parser, _run, _check)
