"""``fastrope edit``: edit a picture on a diffusers pipeline, with one of the methods."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import LooseRoPE, steer
from ..extras import require_packages
from ..methods.front_ends import FRONT_ENDS
from ..methods.judges import RegionJudge
from ..pictures import open_mask, open_picture
from .methods import METHODS, SALIENCY, add_methods, check_method, drawn, written
from .pipelines import Model, load
from .running import TINY, Missing, add_out, add_run_options, command, file_path, flag, given, result

EDITING = "looserope", "grag", "reference-strength", "prompt-weights", "regions", "nag"
HARMONISE = (
    "Make every object in the picture belong to its scene: match light, colour, shadow, sharpness and perspective, "
    "join edges naturally, and keep each object, the composition and the style of the picture as they are."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastrope edit", description="Edit a picture.")
    add_methods(parser, EDITING)
    add = parser.add_argument
    add("--model", required=True, help="black-forest-labs/FLUX.1-Kontext-dev, Qwen/Qwen-Image-Edit-2509, another model "
        "of these families, a folder, or tiny: trained on digits of 16 x 16 pixels, offline")  # fmt: skip
    add("--image", type=file_path, action="append", metavar="FILE",
        help="picture to edit; again for further references, where the model takes them")  # fmt: skip
    add("--prompt", help='what to do, to the tiny model in words such as "make it a 7", "recolour to green"; looserope '
        "has one of its own, meaning: make pasted objects belong to the scene")  # fmt: skip
    add_out(add, "FILE", "edit.png")
    add("--plain", action="store_true", help="also run without the method, to FILE with -plain in its name")
    steps, guidance = "28; grag 24 on Qwen", "2.5 on Kontext, true CFG 4.0 on Qwen"
    add_run_options(add, steps=steps, guidance=guidance)
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    check_method(parser, options, EDITING)
    if options.max_tries is not None and options.judge is None:
        parser.error("--max-tries wants a --judge")
    if options.model != TINY and options.image is None:
        parser.error("--image is needed, for every model but tiny")
    if options.method == "looserope" and options.image and (options.mask is None) == (options.original is None):
        parser.error("looserope wants --mask or --original, and not both")
    if options.model != TINY and options.method != "looserope" and options.prompt is None:
        parser.error(f"{options.method} wants a --prompt")
    if options.prompt is None:
        tiny = "blend" if options.method == "looserope" else "make it a 3"
        options.prompt = tiny if options.model == TINY else HARMONISE


def _run(options: argparse.Namespace) -> list[Path]:
    """Write the edited picture, and beside it a record of how it was made."""
    require_packages("diffusers", "transformers", "PIL")
    out, entry = result(options, "edit.png"), METHODS[options.method]
    images, pasted = _pictures(options)
    method = entry.make(options, images[0], pasted)
    qwen_steps = 24 if options.method == "grag" else 28
    model = load(options, editor="--model", qwen_steps=qwen_steps, taken=entry.taken)
    call, tries = model.call(options.prompt) | model.editing(images), []
    if options.judge is None:
        made, method = drawn(options, model, method, options.prompt, call)
    else:
        made, method, tries = _steer(options, model, method, call, pasted, images[0])
    extra = {} if options.method != "looserope" else {
        "saliency": options.saliency or SALIENCY[0], "front_end": options.front_end or FRONT_ENDS[0],
    }  # fmt: skip
    return written(options, out, made, model, method, options.prompt, call, tries=tries, **extra)


def _pictures(options: argparse.Namespace) -> tuple[list, dict]:
    """The pictures to edit, and what shows where the paste is: ``{"mask": ...}`` or ``{"original": ...}``."""
    read = {"mask": open_mask, "original": open_picture}
    pasted = {name: read[name](flag(name), path) for name, path in given(options, *read).items()}
    if options.image is not None:
        return [open_picture("--image", path) for path in options.image], pasted
    from ..lab import pasted as paste_digit
    from ..lab import pictures

    if options.method != "looserope":
        return pictures(1), {}
    composite, original = paste_digit()
    return [composite], pasted or {"original": original}


def _steer(options: argparse.Namespace, model: Model, method: LooseRoPE, call: dict, pasted: dict, composite):
    """The picture, the method that made it, and the record of every try."""
    judge = RegionJudge(method.mask, pasted.get("original")) if options.judge == "region" else _chat(options.judge)
    tries = 4 if options.max_tries is None else options.max_tries
    model.pipe.set_progress_bar_config(desc=options.method, disable=False)
    steered = steer(model.pipe, method, judge, tries, composite=composite, **call, **model.drawing(options.seed))
    for t in steered.tries:
        said = "not judged" if t.verdict is None else f"{t.verdict.kind} ({t.verdict.reasoning})"
        print(f"boost {t.value:.3f}: {said}", file=sys.stderr)
    described = [
        {"boost": t.value, "verdict": t.verdict and {"class": t.verdict.kind, "reasoning": t.verdict.reasoning,
         "readable": t.verdict.readable, "measures": dict(t.verdict.measures)}}
        for t in steered.tries
    ]  # fmt: skip
    return model.finished(steered.images[0]), steered.method, described


def _chat(name: str):
    from ..bindings.transformers.judge import ChatJudge

    try:
        return ChatJudge.from_pretrained(name)
    except OSError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        advice = 'a model id or folder is wanted; "region" needs no model'
        raise Missing(f"--judge: cannot load {name}: {lines[0]} ({advice})") from error


main = command(_parser, _run, _check)
