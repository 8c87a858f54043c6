"""``fastrope edit``: edit a picture with LooseRoPE or GRAG on a diffusers pipeline."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import GRAG, LooseRoPE, apply, steer
from ..extras import require_packages
from ..methods.front_ends import FRONT_ENDS
from ..methods.judges import RegionJudge
from ..methods.looserope import TIMINGS
from ..outputs import write_picture
from ..pictures import open_mask, open_picture
from .pipelines import Model, load
from .running import (
    TINY,
    Missing,
    add_out,
    add_run_options,
    command,
    file_path,
    flag,
    given,
    plain_path,
    record,
    result,
)  # fmt: skip

SALIENCY = "spectral_residual", "mask_rcnn"  # the first is LooseRoPE.from_images's own choice
LOOSE = "boost", "levels", "timing", "saliency", "front_end"  # its arguments
DIALS = {"looserope": ("mask", "original", *LOOSE, "judge", "max_tries"), "grag": ("bias", "delta")}
HARMONISE = (
    "Make every object in the picture belong to its scene: match light, colour, shadow, sharpness and perspective, "
    "join edges naturally, and keep each object, the composition and the style of the picture as they are."
)
TINY_PROMPTS = {"looserope": "blend", "grag": "make it a 3"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrope edit",
        description="Edit a picture: blend a pasted crop in (looserope), or follow a prompt with a dial for how much "
        "of the picture is kept (grag).",
    )
    add = parser.add_argument
    add("--method", required=True, choices=tuple(DIALS), help="what to edit with; each has options of its own, below")
    add("--model", required=True, help="black-forest-labs/FLUX.1-Kontext-dev, Qwen/Qwen-Image-Edit-2509, another model "
        "of these families, a folder, or tiny: trained on digits of 16 x 16 pixels, offline")  # fmt: skip
    add("--image", type=file_path, action="append", metavar="FILE",
        help="picture to edit; again for further references, where the model takes them")  # fmt: skip
    add("--prompt", help='what to do, to the tiny model in words such as "make it a 7", "recolour to green"; looserope '
        "has one of its own, meaning: make pasted objects belong to the scene")  # fmt: skip
    add_out(add, "FILE", "edit.png")
    add("--plain", action="store_true", help="also run without the method, to FILE with -plain in its name")
    steps, guidance = "looserope 28; grag 24 on Qwen, else 28", "2.5 on Kontext, true CFG 4.0 on Qwen"
    add_run_options(add, steps=steps, guidance=guidance)
    loose = parser.add_argument_group("looserope").add_argument
    loose("--mask", type=file_path, metavar="FILE", help="where the paste is, white on black or opaque on nothing, as "
          "large as the picture")  # fmt: skip
    loose("--original", type=file_path, metavar="FILE", help="the picture before the paste, instead of a mask")
    loose("--boost", type=float, help="lower blends more, higher keeps more (default: 0.83)")
    loose("--levels", type=_levels, metavar="N", help='levels of saliency, or "continuous" (default: 5)')
    loose("--saliency", choices=SALIENCY, help="the first needs no model, the second torchvision (default: the first)")
    loose("--front-end", choices=FRONT_ENDS, help="how pictures become maps of tokens: ours, or as the authors' code "
          "does it (default: fastrope)")  # fmt: skip
    loose("--timing", choices=TIMINGS, help="phases in proportion to the steps, or after steps 10, 18 and 22 whatever "
          "their number, as published (default: scaled)")  # fmt: skip
    loose("--judge", metavar="JUDGE", help='steer the boost: "region" needs no model; or the name of a vision-language '
          "chat model, Qwen/Qwen3-VL-4B-Instruct for one")  # fmt: skip
    loose("--max-tries", type=int, metavar="N", help="verdicts at most (default: 4)")
    grag = parser.add_argument_group("grag").add_argument
    grag("--delta", type=float, nargs="+", help="above 1 keeps more of the picture, below 1 edits more; 0.8 to 1.7; "
         "one for all references or one each (default: 1.1)")  # fmt: skip
    grag("--bias", type=float, nargs="+", help="weight of the picture against prompt and result (default: 1.0)")
    return parser


def _levels(text: str) -> int | str:
    if text == "continuous":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected a number or "continuous", received {text!r}') from None


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for method, names in DIALS.items():
        foreign = given(options, *names)
        if method != options.method and foreign:
            parser.error(f"{flag(next(iter(foreign)))} belongs to --method {method}")
    if options.max_tries is not None and options.judge is None:
        parser.error("--max-tries wants a --judge")
    if options.model != TINY and options.image is None:
        parser.error("--image is needed, for every model but tiny")
    if options.method == "looserope" and options.image and (options.mask is None) == (options.original is None):
        parser.error("looserope wants --mask or --original, and not both")
    if options.model != TINY and options.method == "grag" and options.prompt is None:
        parser.error("grag wants a --prompt")


def _run(options: argparse.Namespace) -> list[Path]:
    """Write the edited picture, and beside it a record of how it was made."""
    require_packages("diffusers", "transformers", "PIL")
    out = result(options, "edit.png")
    images, pasted = _pictures(options)
    method = _method(options, images[0], pasted)
    model = load(options, editor="--model", qwen_steps=24 if options.method == "grag" else 28)
    usual = TINY_PROMPTS[options.method] if options.model == TINY else HARMONISE
    prompt = usual if options.prompt is None else options.prompt
    call = model.call(prompt) | model.editing(images)
    if options.judge is None:
        with apply(model.pipe, method):
            made, tries = model.draw(call, options.seed, options.method), []
    else:
        made, method, tries = _steer(options, model, method, call, pasted, images[0])
    names = ("bias", "delta") if options.method == "grag" else ("boost", "levels", "timing")
    extra = {} if options.method == "grag" else {
        "saliency": options.saliency or SALIENCY[0], "front_end": options.front_end or FRONT_ENDS[0],
    }  # fmt: skip
    dials = {name: getattr(method, name) for name in names}
    written = [write_picture(out, made), record(out, options, dials=dials, tries=tries, **model.facts(prompt), **extra)]
    if options.plain:
        written.append(write_picture(plain_path(out), model.draw(call, options.seed, "plain")))
    return written


def _pictures(options: argparse.Namespace) -> tuple[list, dict]:
    """The pictures to edit, and what shows where the paste is: ``{"mask": ...}`` or ``{"original": ...}``."""
    read = {"mask": open_mask, "original": open_picture}
    pasted = {name: read[name](flag(name), path) for name, path in given(options, *read).items()}
    if options.image is not None:
        return [open_picture("--image", path) for path in options.image], pasted
    from ..lab import pasted as paste_digit
    from ..lab import pictures

    if options.method == "grag":
        return pictures(1), {}
    composite, original = paste_digit()
    return [composite], pasted or {"original": original}


def _method(options: argparse.Namespace, composite, pasted: dict) -> GRAG | LooseRoPE:
    layers = given(options, "layers")
    if options.method == "looserope":
        return LooseRoPE.from_images(composite, **pasted, **given(options, *LOOSE), **layers)
    dials = given(options, "bias", "delta")
    return GRAG(**{name: v[0] if len(v) == 1 else tuple(v) for name, v in dials.items()}, **layers)


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
