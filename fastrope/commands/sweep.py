"""``fastrope sweep``: one picture of many: Untwisting RoPE over a grid of s_hf and s_lf."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import apply
from ..extras import require_packages
from . import styling
from .files import require_folder, save_picture, save_record
from .running import command

HIGH, LOW = (0.0, 0.25, 0.5, 0.75, 1.0), (0.6, 1.0, 1.2, 1.5)
Value = float | tuple[float, float]


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
    add("--cells", type=Path, metavar="FOLDER", help="also write every cell in full size")
    add("--out", type=Path, default=Path("sweep.png"), metavar="FILE", help="(default: sweep.png)")
    return parser


def _run(options: argparse.Namespace) -> list[Path]:
    """Write the contact sheet, beside it a record of how it was made, and the cells if they are wanted."""
    require_packages("diffusers", "transformers", "matplotlib", "PIL", "tqdm")
    from tqdm.auto import tqdm

    if options.cells is not None:
        require_folder("--cells", options.cells)
    grid = [[styling.method_of(options, {}, s_hf=high, s_lf=low) for low in options.s_lf] for high in options.s_hf]
    ready = styling.prepare(options)
    grid = [[styling.method_of(options, ready.axis0, s_hf=m.s_hf, s_lf=m.s_lf) for m in row] for row in grid]
    ready.pipe.set_progress_bar_config(disable=True)
    cells: list[list] = []
    with tqdm(total=1 + len(grid) * len(grid[0]), desc="sweep", unit="picture") as bar:
        plain = ready.run(options.seed)
        bar.update()
        with apply(ready.pipe, reference=ready.reference) as handle:
            for row in grid:
                cells.append([])
                for method in row:
                    handle.update(method)
                    cells[-1].append(ready.run(options.seed))
                    bar.update()
    sheet = draw(ready.pictures, plain, cells, options.s_hf, options.s_lf, _caption(options, grid[0][0], ready))
    shared = {n: value for n, value in styling.dials(grid[0][0]).items() if n not in ("s_hf", "s_lf")}
    record = {"s_hf": list(options.s_hf), "s_lf": list(options.s_lf), "dials": shared}
    written = [save_picture(sheet, options.out), save_record(record | styling.record(options, ready), options.out)]
    if options.cells is not None:
        for high, row in zip(options.s_hf, cells, strict=True):
            for low, cell in zip(options.s_lf, row, strict=True):
                name = f"s_hf {_name(high)} s_lf {_name(low)}.png".replace(" ", "_").replace(":", "-")
                written.append(save_picture(cell, options.cells / name))
    return written


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
    import io

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
    return ":".join(f"{n:g}" for n in (value if isinstance(value, tuple) else (value,)))


def _list(values: Sequence[Value]) -> str:
    return " ".join(map(_name, values))


main = command(_parser, _run, styling.check_options)
