"""``fastrope draw``: draw a prompt on a diffusers pipeline, with one of the methods."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..extras import require_packages
from .methods import METHODS, add_methods, check_method, drawn, written
from .pipelines import load
from .running import TINY, add_out, add_run_options, command, result

DRAWING = "prompt-weights", "regions", "nag", "temperature", "high-resolution"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastrope draw", description="Draw a prompt.")
    add_methods(parser, DRAWING)
    add = parser.add_argument
    add("--model", required=True, help="black-forest-labs/FLUX.1-dev, Qwen/Qwen-Image, another model that draws, a "
        "folder, or tiny: trained on digits of 16 x 16 pixels, offline")  # fmt: skip
    add("--prompt", help='what to draw, for the tiny model in words such as "a red 3 on blue"')
    add("--height", type=int, help="in pixels (default: the pipeline's, tiny 16)")
    add("--width", type=int, help="likewise")
    add_out(add, "FILE", "draw.png")
    add("--plain", action="store_true", help="also draw without the method, to FILE with -plain in its name")
    add_run_options(add, steps="28; Z-Image 9, FLUX.2 klein 4", guidance="what suits the model")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    check_method(parser, options, DRAWING)
    if options.prompt is None:
        if options.model != TINY:
            parser.error("--prompt is needed, for every model but tiny")
        options.prompt = "a 3"


def _run(options: argparse.Namespace) -> list[Path]:
    """Write the picture, and beside it a record of how it was made."""
    require_packages("diffusers", "transformers", "PIL")
    out, entry = result(options, "draw.png"), METHODS[options.method]
    method = entry.make(options)
    model = load(options, taken=entry.taken)
    call = model.call(options.prompt) | model.canvas(options.height, options.width)
    made, method = drawn(options, model, method, options.prompt, call)
    return written(options, out, made, model, method, options.prompt, call)


main = command(_parser, _run, _check)
