"""``fastrope style``: a picture in the style of another one (Untwisting RoPE), and what ``sweep`` shares with it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import ReferenceCache, UntwistingRoPE, apply, prepare_reference
from ..extras import require_packages
from ..methods.trajectories import GAMMA
from ..methods.untwisting import AXIS0, DEPRECATED, PRESETS
from ..outputs import write_picture
from ..pictures import open_picture
from ..sharing import SHARED
from . import pipelines
from .running import TINY, add_out, add_run_options, command, file_path, flag, given, plain_path, record, result

MODEL = "black-forest-labs/FLUX.1-dev"
TRAJECTORIES = ("linear", "rf_inversion")
CACHES = ("none", "device", "host")
TINY_PROMPT = "a 3"
DIALS = ("s_hf", "s_lf", "beta", "adain", "axis0", "blocks", "layers")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that both commands have."""
    add = parser.add_argument
    add("--reference", type=file_path, action="append", metavar="FILE",
        help="picture whose style is wanted; again for more")  # fmt: skip
    add("--prompt", help='what to draw, for the tiny model in words such as "a red 3 on blue"')
    add("--reference-prompt", default="", metavar="TEXT", help="what the reference shows (default: nothing said)")
    add("--model", default=MODEL, help="FLUX.1, FLUX.2, Qwen-Image, Z-Image or kin, a folder, or tiny: trained on "
        f"digits of 16 x 16 pixels, offline (default: {MODEL})")  # fmt: skip
    add("--native", action="store_true", help="give the picture to the model as its own reference (Kontext, FLUX.2, "
        "Qwen-Image-Edit) instead of sharing attention with it")  # fmt: skip
    add("--preset", choices=(*PRESETS, *DEPRECATED), default="paper", metavar="NAME",
        help=f"dials that are not given: {', '.join(PRESETS)} (default: paper)")  # fmt: skip
    add("--beta", type=float, help="exponent of the curve from high to low frequencies (default: the preset's)")
    add("--adain", type=float, metavar="A", help="0 to 1: how far queries and keys take on the reference's "
        "statistics (default: the preset's)")  # fmt: skip
    add("--axis0", type=_axis0, help="weights of axes without spatial meaning: low, match or a number; or one for "
        "every axis, FLUX.2: low,match,match,match (default: the preset's; match on Z-Image)")  # fmt: skip
    add("--blocks", nargs="+", choices=("double", "single", "joint"), help="kinds of block (default: all)")
    add("--trajectory", choices=TRAJECTORIES, default="linear", help="the reference's latents: noised, or inverted by "
        "the model (default: linear)")  # fmt: skip
    add("--gamma", type=float, help="of rf_inversion: 1 follows the model, 0 is linear (default: 0.5)")
    add("--cache", choices=CACHES, default="none", help="keep the reference's keys and values per layer and step, for "
        "further targets; takes much memory (default: none)")  # fmt: skip
    add("--reference-seed", type=int, metavar="SEED", help="noise of the reference (default: the next seed)")
    add_run_options(add, steps="28; Z-Image 9, FLUX.2 klein 4", guidance="what suits the model")
    add("--height", type=int, help="in pixels (default: the reference's proportions, a megapixel at most)")
    add("--width", type=int, help="likewise; one of the two alone keeps the proportions")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where options contradict each other; fill in those that follow from others."""
    for name in ("reference", "prompt"):
        if options.model != TINY and getattr(options, name) is None:
            parser.error(f"--{name} is needed, for every model but tiny")
    if options.gamma is not None and options.trajectory != "rf_inversion":
        parser.error("--gamma belongs to --trajectory rf_inversion")
    for name in ("cache", "trajectory", "reference_prompt", "reference_seed"):
        if options.native and getattr(options, name) != parser.get_default(name):
            parser.error(f"{flag(name)} is for a shared reference, not for a --native one")
    if options.prompt is None:
        options.prompt = "make it a 3" if options.native else TINY_PROMPT
    if options.reference_seed is None:  # with the target's own noise the two would start alike, place by place
        options.reference_seed = options.seed + 1
    if options.trajectory == "rf_inversion" and options.gamma is None:
        options.gamma = GAMMA


class Styling:
    """A pipeline that is ready to draw in the style of a reference.

    Raises:
        Missing: a file or weights.
        ValueError, NotImplementedError: an argument that does not fit.
        MissingExtra: diffusers, transformers or pillow is not installed.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        require_packages("diffusers", "transformers", "PIL")
        self.options, self.pictures = options, pictures_of(options)
        method_of(options)  # dials are checked before anything is loaded
        self.model = pipelines.load(options, editor="--native" if options.native else None)
        self.call, self.reference = self.model.call(options.prompt), None
        if options.native:
            self.call |= self.model.editing(self.pictures) | given(options, "height", "width")
        else:
            height, width = self.model.size(self.pictures, options.height, options.width)
            self.call |= {"height": height, "width": width}
            self.reference = self._share()

    def _share(self):
        options, model, rows = self.options, self.model, len(self.pictures)
        model.pipe.set_progress_bar_config(desc=options.trajectory, disable=False)
        call = {name: self.call[name] for name in ("height", "width", "num_inference_steps")} | given(options, "gamma")
        if getattr(model.pipe.transformer.config, "guidance_embeds", False) and "guidance_scale" in self.call:
            call["guidance_scale"] = self.call["guidance_scale"]
        call["generator"] = [torch.Generator().manual_seed(options.reference_seed + n) for n in range(rows)]
        text = model.text("--reference-prompt", options.reference_prompt, rows)
        reference = prepare_reference(model.pipe, self.pictures, options.trajectory, **call, **text)
        if options.cache == "none":
            return reference
        return ReferenceCache(reference, device="cpu" if options.cache == "host" else None)

    def method(self, **dials: object) -> UntwistingRoPE:
        """The method of the options on this model, ``dials`` going before."""
        usual = {"axis0": "match"} if self.model.kind.startswith("ZImage") else {}
        return method_of(self.options, usual, **dials)

    def draw(self, label: str | None = None):
        """One picture."""
        return self.model.draw(self.call, self.options.seed, label)

    def record(self, out: Path, method: UntwistingRoPE, *without: str) -> Path:
        """Write how the result ``out`` was made; dials ``without`` those that were swept."""
        dials = {name: getattr(method, name) for name in DIALS if name not in without}
        size = {name: self.call.get(name) for name in ("height", "width")}
        if self.options.native:
            size |= {"trajectory": None, "reference_seed": None}
        return record(out, self.options, dials=dials, **self.model.facts(self.options.prompt), **size)


def method_of(options: argparse.Namespace, usual: dict | None = None, **dials: object) -> UntwistingRoPE:
    """The method of the options: ``dials``, then what the user gave, then what is ``usual``, then the preset."""
    told = given(options, "beta", "adain", "axis0", "layers", "blocks")
    where = 0 if options.native else SHARED
    return UntwistingRoPE.from_preset(options.preset, **{**(usual or {}), **told, "reference": where, **dials})


def pictures_of(options: argparse.Namespace) -> list:
    """The references, PIL; for the tiny model one may be drawn."""
    if options.reference is not None:
        return [open_picture("--reference", path) for path in options.reference]
    from ..lab import pictures

    return pictures(1)


def _axis0(text: str) -> str | float | tuple[str | float, ...]:
    parts = tuple(_weight(part) for part in text.split(","))
    return parts[0] if len(parts) == 1 else parts


def _weight(text: str) -> str | float:
    if text in AXIS0:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {', '.join(AXIS0)} or a number, received {text!r}") from None


# ---- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrope style",
        description="Draw a prompt in the style of a reference picture: the target attends to the reference's keys, "
        "weighted per frequency band, so that style comes over and places do not.",
    )
    add_options(parser)
    add = parser.add_argument
    add("--s-hf", type=float, nargs="+", metavar="S", help="weight of high frequencies, first and last step, or "
        "one for all: lower copies less (default: the preset's)")  # fmt: skip
    add("--s-lf", type=float, nargs="+", metavar="S", help="weight of low frequencies, likewise: higher takes more")
    add("--plain", action="store_true", help="also draw without the reference, to FILE with -plain in its name")
    add_out(add, "FILE", "style.png")
    return parser


def _run(options: argparse.Namespace) -> list[Path]:
    """Write the picture, and beside it a record of how it was made."""
    dials = {name: _dial(flag(name), values) for name, values in given(options, "s_hf", "s_lf").items()}
    method_of(options, **dials)
    out = result(options, "style.png")
    ready = Styling(options)
    method = ready.method(**dials)
    with apply(ready.model.pipe, method, reference=ready.reference):
        made = ready.draw("style")
    written = [write_picture(out, made), ready.record(out, method)]
    if options.plain:
        written.append(write_picture(plain_path(out), ready.draw("plain")))
    return written


def _dial(option: str, values: Sequence[float]) -> float | tuple[float, float]:
    if len(values) > 2:
        raise ValueError(f"{option}: expected one number, or those of the first and the last step, received {values}")
    return values[0] if len(values) == 1 else tuple(values)


main = command(_parser, _run, check_options)
