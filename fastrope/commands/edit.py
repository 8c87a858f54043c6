"""``fastrope edit``: edit a picture with LooseRoPE or GRAG on a diffusers pipeline."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .. import GRAG, LooseRoPE, apply, steer
from ..extras import require_packages
from ..methods.front_ends import FRONT_ENDS
from ..methods.judges import RegionJudge
from ..methods.looserope import TIMINGS
from ..outputs import write_picture, write_record
from ..pictures import open_mask, open_picture, to_picture
from .editors import HARMONISE, SETTINGS, arguments, finished, load, require_editor, settings_for
from .running import (
    TINY,
    Missing,
    add_out,
    add_run_options,
    command,
    ends,
    file_path,
    machine,
    name_of,
    plain_path,
    result,
)  # fmt: skip

SALIENCY = "spectral_residual", "mask_rcnn"  # the first is LooseRoPE.from_images's own choice
DIALS = {
    "looserope": (
        "mask", "original", "boost", "levels", "timing", "saliency", "front_end", "judge", "max_tries",
    ),
    "grag": ("bias", "delta"),
}  # fmt: skip


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for method, names in DIALS.items():
        foreign = [name for name in names if getattr(options, name) is not None]
        if method != options.method and foreign:
            parser.error(f"--{foreign[0].replace('_', '-')} belongs to --method {method}")
    if options.max_tries is not None and options.judge is None:
        parser.error("--max-tries wants a --judge")
    if options.model != TINY:
        if options.image is None:
            parser.error("--image is needed, for every model but tiny")
        if options.method == "looserope" and (options.mask is None) == (options.original is None):
            parser.error("looserope wants --mask or --original, and not both")
        if options.method == "grag" and options.prompt is None:
            parser.error("grag wants a --prompt")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrope edit",
        description="Edit a picture: blend a pasted crop in (looserope), or follow a prompt with a dial for how much "
        "of the picture is kept (grag).",
    )
    add = parser.add_argument
    add("--method", required=True, choices=tuple(DIALS), help="what to edit with; each has options of its own, below")
    add("--model", required=True, help="black-forest-labs/FLUX.1-Kontext-dev, Qwen/Qwen-Image-Edit-2509, another model "
        "of these families, a folder, or tiny: random weights, offline")  # fmt: skip
    add("--image", type=file_path, action="append", metavar="FILE",
        help="picture to edit; again for further references, where the model takes them")  # fmt: skip
    add("--prompt", help="what to do; looserope has one of its own, meaning: make pasted objects belong to the scene")
    add_out(add, "FILE", "edit.png")
    add("--plain", action="store_true", help="also run without the method, to FILE with -plain in its name")
    steps, guidance = "looserope 28; grag 24 on Qwen, else 28", "2.5 on Kontext, true CFG 4.0 on Qwen"
    add_run_options(add, steps=steps, guidance=guidance)
    loose = parser.add_argument_group("looserope").add_argument
    loose(
        "--mask",
        type=file_path,
        metavar="FILE",
        help="where the paste is, white on black or opaque on nothing, as large as the picture",
    )
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


def _run(options: argparse.Namespace) -> list[Path]:
    """Write the edited picture, and beside it a record of how it was made."""
    require_packages("diffusers", "transformers", "PIL")
    out = result(options, "edit.png")
    images, pasted = _pictures(options)
    method = _method(options, images[0], pasted)
    device, dtype = machine(options)
    pipe = load(options.model, device, dtype, options.offload)
    require_editor("--model", pipe)
    settings = settings_for(pipe, SETTINGS[options.method]).with_options(options, pipe)
    prompt = HARMONISE if options.prompt is None else options.prompt
    call = arguments(pipe, options.model, settings, images, prompt, options.seed) | {"output_type": "np"}
    pipe.set_progress_bar_config(desc=options.method, disable=False)
    made, method, tries = _make(options, pipe, method, call, pasted, images[0])
    record = {
        "method": options.method, "dials": _dials(method), "model": options.model, "pipeline": type(pipe).__name__,
        **_sources(options),
        "prompt": prompt, "seed": options.seed, "steps": settings.steps, "guidance": settings.guidance,
        "negative_prompt": settings.negative_prompt, "device": str(device), "dtype": name_of(dtype),
        "layers": ends(options.layers), "judge": options.judge, "tries": tries,
    }  # fmt: skip
    written = [write_picture(out, made), write_record(out.with_suffix(".json"), record)]
    if options.plain:
        pipe.set_progress_bar_config(desc="plain", disable=False)
        call["generator"] = torch.Generator().manual_seed(options.seed)
        written.append(write_picture(plain_path(out), finished(pipe(**call).images[0])))
    return written


def _make(options, pipe, method, call: dict, pasted: dict, composite):
    """The picture, the method that made it, and the record of every try."""
    if options.judge is None:
        with apply(pipe, method):
            return finished(pipe(**call).images[0]), method, []
    tries = 4 if options.max_tries is None else options.max_tries
    judge = _judge(options.judge, method, pasted.get("original"))
    steered = steer(pipe, method, judge, tries, composite=composite, **call)
    for t in steered.tries:
        said = "not judged" if t.verdict is None else f"{t.verdict.kind} ({t.verdict.reasoning})"
        print(f"boost {t.value:.3f}: {said}", file=sys.stderr)
    record = [
        {"boost": t.value, "verdict": t.verdict and {"class": t.verdict.kind, "reasoning": t.verdict.reasoning,
         "readable": t.verdict.readable, "measures": dict(t.verdict.measures)}}
        for t in steered.tries
    ]  # fmt: skip
    return finished(steered.images[0]), steered.method, record


def _judge(name: str, method: LooseRoPE, original):
    if name == "region":
        return RegionJudge(method.mask, original)
    from ..bindings.transformers.judge import ChatJudge

    try:
        return ChatJudge.from_pretrained(name)
    except OSError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        advice = 'a model id or folder is wanted; "region" needs no model'
        raise Missing(f"--judge: cannot load {name}: {lines[0]} ({advice})") from error


def _pictures(options):
    """The pictures to edit, and what tells where the paste is: ``{"mask": ...}`` or ``{"original": ...}``."""
    named = {name: getattr(options, name) for name in ("mask", "original")}
    read = {"mask": open_mask, "original": open_picture}
    pasted = {name: read[name](f"--{name}", path) for name, path in named.items() if path is not None}
    if options.image is not None:
        if options.method == "looserope" and len(pasted) != 1:
            raise ValueError("looserope wants --mask or --original, and not both")
        return [open_picture("--image", path) for path in options.image], pasted
    from ..demo import scene as scenes

    scene = scenes.draw_scene()
    drawn = {name: to_picture(name, getattr(scene, name)) for name in ("composite", "background")}
    return [drawn["composite"]], pasted or {"original": drawn["background"]}


def _method(options, composite, pasted: dict) -> GRAG | LooseRoPE:
    layers = {} if options.layers is None else {"layers": options.layers}
    if options.method == "grag":
        given = {name: getattr(options, name) for name in ("bias", "delta") if getattr(options, name) is not None}
        return GRAG(**{name: v[0] if len(v) == 1 else tuple(v) for name, v in given.items()}, **layers)
    dials = {name: getattr(options, name) for name in ("boost", "levels", "timing", "saliency", "front_end")}
    return LooseRoPE.from_images(composite, **pasted, **{n: v for n, v in dials.items() if v is not None}, **layers)


def _sources(options) -> dict:
    """Which pictures were read, and what told the saliency."""
    read = {name: path and str(path) for name, path in (("mask", options.mask), ("original", options.original))}
    loose = options.method == "looserope"
    saliency, front_end = (
        (options.saliency or SALIENCY[0], options.front_end or FRONT_ENDS[0]) if loose else (None, None)
    )
    images = [str(path) for path in options.image or ()]
    return {"image": images, **read, "saliency": saliency, "front_end": front_end}


def _dials(method: GRAG | LooseRoPE) -> dict:
    if isinstance(method, GRAG):
        return {"bias": method.bias, "delta": method.delta}
    return {"boost": method.boost, "levels": method.levels, "timing": method.timing}


def _levels(text: str) -> int | str:
    if text == "continuous":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected a number or "continuous", received {text!r}') from None


main = command(_parser, _run, _check)
