"""What ``fastrope style`` and ``fastrope sweep`` share: options, the pipeline, the reference, the call."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .. import ReferenceCache, UntwistingRoPE, prepare_reference
from ..extras import require_packages
from ..methods.trajectories import GAMMA
from ..methods.untwisting import AXIS0, DEPRECATED, PRESETS
from ..pictures import open_picture, to_picture
from ..sharing import SHARED
from . import editors
from .editors import TINY_PIXELS, Settings, tiny_words
from .running import TINY, add_run_options, ends, file_path, machine, name_of

MODEL = "black-forest-labs/FLUX.1-dev"
TRAJECTORIES = ("linear", "rf_inversion")
CACHES = ("none", "device", "host")

# By the start of the pipeline's class name, as the models' own pages have it; Qwen-Image's 50 steps are shortened.
SETTINGS = {
    "FluxKontext": Settings(28, 2.5),
    "Flux2Klein": Settings(4, 1.0),
    "Flux2": Settings(28, 4.0),
    "Flux": Settings(28, 3.5),
    "QwenImage": Settings(28, 4.0, "true_cfg_scale", " "),
    "ZImage": Settings(9, 0.0),
    "": Settings(28),
}


@dataclass(frozen=True)
class Styling:
    """A pipeline that is ready to be called in the style of a reference.

    Args:
        pipe: the pipeline.
        call: arguments of its call, but for the generator.
        reference: for :func:`fastrope.apply`; None where the reference is the host's own.
        pictures: the reference's, PIL.
        settings: steps and guidance.
        axis0: what the method's argument is on this model, where no option says.
    """

    pipe: object
    call: dict[str, object]
    reference: object | None
    pictures: list
    settings: Settings
    axis0: dict[str, object]

    def run(self, seed: int):
        """One picture."""
        generator = torch.Generator().manual_seed(seed)
        return editors.finished(self.pipe(**self.call, generator=generator, output_type="np").images[0])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that both commands have."""
    add = parser.add_argument
    add("--reference", type=file_path, action="append", metavar="FILE",
        help="picture whose style is wanted; again for more")  # fmt: skip
    add("--prompt", help="what to draw")
    add("--reference-prompt", default="", metavar="TEXT", help="what the reference shows (default: nothing said)")
    add("--model", default=MODEL, help="FLUX.1, FLUX.2, Qwen-Image, Z-Image or kin, a folder, or tiny: random weights, "
        f"offline (default: {MODEL})")  # fmt: skip
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
    """End the program where options contradict each other."""
    if options.model != TINY:
        for name in ("reference", "prompt"):
            if getattr(options, name) is None:
                parser.error(f"--{name} is needed, for every model but tiny")
    if options.gamma is not None and options.trajectory != "rf_inversion":
        parser.error("--gamma belongs to --trajectory rf_inversion")
    if options.native:
        for name in ("cache", "trajectory", "reference_prompt", "reference_seed"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for a shared reference, not for a --native one")


def prepare(options: argparse.Namespace) -> Styling:
    """Open the pictures, load the pipeline, prepare the reference.

    Raises:
        Missing: a file or weights.
        ValueError, NotImplementedError: an argument that does not fit.
        MissingExtra: diffusers, transformers or pillow is not installed.
    """
    require_packages("diffusers", "transformers", "PIL")
    pictures = pictures_of(options)
    method_of(options, {})  # dials are checked before anything is loaded
    pipe = _load(options, *machine(options))
    settings = editors.settings_for(pipe, SETTINGS).with_options(options, pipe)
    axis0 = {"axis0": "match"} if type(pipe).__name__.startswith("ZImage") else {}
    prompt = options.prompt or ""
    if options.native:
        editors.require_editor("--native", pipe)
        call = editors.arguments(pipe, options.model, settings, pictures, prompt, options.seed)
        del call["generator"]
        call |= {n: getattr(options, n) for n in ("height", "width") if getattr(options, n) is not None}
        return Styling(pipe, call, None, pictures, settings, axis0)
    height, width = _size(options, pipe, pictures)
    call = {"height": height, "width": width, "num_inference_steps": settings.steps, **_text(options, pipe, prompt)}
    if settings.guidance is not None:
        call[settings.guidance_name] = settings.guidance
    if settings.negative_prompt is not None and options.model != TINY:
        call["negative_prompt"] = settings.negative_prompt
    reference = _reference(options, pipe, pictures, settings, height, width)
    return Styling(pipe, call, reference, pictures, settings, axis0)


def method_of(options: argparse.Namespace, axis0: dict[str, object], **dials) -> UntwistingRoPE:
    """The method of the options, ``dials`` going before.

    Args:
        axis0: what holds where no option says otherwise, see :class:`Styling`.
    """
    given = {n: getattr(options, n) for n in ("beta", "adain", "axis0", "layers", "blocks")}
    given = {n: value for n, value in given.items() if value is not None}
    where = 0 if options.native else SHARED
    return UntwistingRoPE.from_preset(options.preset, **{**axis0, **given, "reference": where, **dials})


def record(options: argparse.Namespace, styling: Styling) -> dict[str, object]:
    """How a picture was made, but for the dials."""
    pipe = styling.pipe
    return {
        "model": options.model, "pipeline": type(pipe).__name__, "preset": options.preset, "native": options.native,
        "reference": [str(path) for path in options.reference or ()], "reference_prompt": options.reference_prompt,
        "prompt": options.prompt, "negative_prompt": styling.settings.negative_prompt, "seed": options.seed,
        "reference_seed": _reference_seed(options), "trajectory": None if options.native else options.trajectory,
        "gamma": _gamma(options), "cache": options.cache, "steps": styling.settings.steps,
        "guidance": styling.settings.guidance, "height": styling.call.get("height"), "width": styling.call.get("width"),
        "device": str(pipe.device), "dtype": name_of(pipe.transformer.dtype),
    }  # fmt: skip


def dials(method: UntwistingRoPE) -> dict[str, object]:
    """The method's numbers."""
    found = {name: getattr(method, name) for name in ("s_hf", "s_lf", "beta", "adain", "axis0", "blocks")}
    return found | {"layers": ends(method.layers)}


def pictures_of(options: argparse.Namespace) -> list:
    """The references, PIL; for the tiny model one may be drawn."""
    if options.reference is not None:
        return [open_picture("--reference", path) for path in options.reference]
    from ..demo import scene

    return [to_picture("composite", scene.draw_scene().composite)]


def _load(options, device: torch.device, dtype: torch.dtype):
    if options.model != TINY or options.native:
        return editors.load(options.model, device, dtype, options.offload)
    from ..demo import tiny

    return tiny.text_to_image(0, device, dtype)


def _size(options, pipe, pictures: Sequence) -> tuple[int, int]:
    from ..bindings.diffusers.trajectories import picture_size

    if options.model == TINY and options.height is None and options.width is None:
        return TINY_PIXELS, TINY_PIXELS
    return picture_size(pipe, pictures, options.height, options.width)


def _text(options, pipe, prompt: str, rows: int = 1) -> dict[str, object]:
    return tiny_words(pipe, prompt, rows) if options.model == TINY else {"prompt": prompt}


def _reference(options, pipe, pictures: Sequence, settings: Settings, height: int, width: int):
    pipe.set_progress_bar_config(desc=options.trajectory, disable=False)
    first = _reference_seed(options)
    call = {
        "height": height, "width": width, "num_inference_steps": settings.steps,
        "generator": [torch.Generator().manual_seed(first + n) for n in range(len(pictures))],
        **_text(options, pipe, options.reference_prompt, len(pictures)),
    }  # fmt: skip
    if options.gamma is not None:
        call["gamma"] = options.gamma
    distilled = getattr(pipe.transformer.config, "guidance_embeds", False)
    if distilled and settings.guidance is not None and settings.guidance_name == "guidance_scale":
        call["guidance_scale"] = settings.guidance
    reference = prepare_reference(pipe, pictures, options.trajectory, **call)
    if options.model == TINY:  # whose weights look for a reference in the next frame
        ids = reference.arguments["img_ids"]
        ids = torch.cat([torch.ones_like(ids[:, :1]), ids[:, 1:]], dim=1)
        reference = replace(reference, arguments={**reference.arguments, "img_ids": ids})
    elif options.cache == "none":
        return reference
    return ReferenceCache(reference, device="cpu" if options.cache == "host" else None)


def _reference_seed(options) -> int:
    # With the target's own noise the two would start alike, place by place.
    return options.seed + 1 if options.reference_seed is None else options.reference_seed


def _gamma(options) -> float | None:
    """None where no inversion asks for it."""
    if options.trajectory != "rf_inversion" or options.native:
        return None
    return GAMMA if options.gamma is None else options.gamma


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
