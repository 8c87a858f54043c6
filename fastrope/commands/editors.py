"""The pipelines of ``fastrope edit``: how to load one, and what to call it with."""

from __future__ import annotations

import inspect
import warnings
import zlib
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..checks import require
from ..pictures import to_picture
from .running import TINY, Missing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

TINY_PIXELS, TINY_TEXT = 32, 8

HARMONISE = (
    "Make every object in the picture belong to its scene: match light, colour, shadow, sharpness and perspective, "
    "join edges naturally, and keep each object, the composition and the style of the picture as they are."
)


@dataclass(frozen=True)
class Settings:
    """What a method is run with on a family of pipelines, unless the user says otherwise.

    Args:
        steps: denoising steps.
        guidance: value of the argument ``guidance_name`` of the pipeline; None leaves the pipeline's own.
        guidance_name: ``"guidance_scale"`` (distilled guidance) or ``"true_cfg_scale"`` (two passes).
        negative_prompt: for the latter.
    """

    steps: int
    guidance: float | None = None
    guidance_name: str = "guidance_scale"
    negative_prompt: str | None = None

    def with_options(self, options: Namespace, pipe) -> Settings:
        """With what the user says instead.

        Raises:
            ValueError: a negative prompt for a pipeline that makes nothing of it.
        """
        if options.negative_prompt is not None and not takes_negative(pipe):
            raise ValueError(f"--negative-prompt: {type(pipe).__name__} takes none, its guidance is distilled")
        given = {name: getattr(options, name) for name in ("steps", "guidance", "negative_prompt")}
        return replace(self, **{name: value for name, value in given.items() if value is not None})


# By the start of the pipeline's class name. LooseRoPE on Kontext and GRAG on Qwen are the authors' settings.
SETTINGS = {
    "looserope": {
        "FluxKontext": Settings(28, 2.5),
        "QwenImage": Settings(28, 4.0, "true_cfg_scale", " "),
        "": Settings(28),
    },
    "grag": {
        "FluxKontext": Settings(28, 2.5),
        "QwenImage": Settings(24, 4.0, "true_cfg_scale", " "),
        "": Settings(28),
    },
}


def settings_for(pipe, table: Mapping[str, Settings]) -> Settings:
    """The settings of a pipeline, of a table by the start of its class's name."""
    name = type(pipe).__name__
    return next(found for start, found in table.items() if name.startswith(start))


def takes_negative(pipe) -> bool:
    """True where a negative prompt makes a difference."""
    known = "negative_prompt" in inspect.signature(type(pipe).__call__).parameters
    return known and not type(pipe).__name__.startswith("Flux")  # which ignores it at these settings


def require_editor(option: str, pipe) -> None:
    """Require a pipeline that reads a picture.

    Raises:
        ValueError: naming the option.
    """
    known = "image" in inspect.signature(type(pipe).__call__).parameters
    require(known, option, "a model that reads pictures (FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit)", type(pipe).__name__)


def finished(pixels: np.ndarray) -> Image:
    """The picture that a pipeline made, ``(H, W, 3)`` in 0..1, of its ``output_type="np"``.

    Raises:
        ValueError: values that are not finite, which would make a black picture.
    """
    advice = "smaller dials, or the --dtype that the model was trained in"
    require(bool(np.isfinite(pixels).all()), "the result", f"finite pixels ({advice})", "some that are not numbers")
    return to_picture("the result", pixels)


def load(model: str, device: torch.device, dtype: torch.dtype, offload: bool):
    """A pipeline by the name of its model, a folder, or ``"tiny"``: a Kontext pipeline with random weights, offline.

    Raises:
        Missing: no such model, or no connection and nothing in the cache.
    """
    if model == TINY:
        from ..demo import tiny

        return tiny.pipeline(0, device, dtype)
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with warnings.catch_warnings():  # newer versions would have it called dtype, older ones know no such argument
            warnings.simplefilter("ignore", FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except (OSError, HfHubHTTPError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        advice = "" if Path(model).exists() else (
            f" Get it with `hf download {model}` (some models want their licence accepted on their page and "
            "`hf auth login` first), or pass a folder; --model tiny needs no weights"
        )  # fmt: skip
        raise Missing(f"cannot load {model}: {lines[0]}{advice}") from error
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def arguments(
    pipe, model: str, settings: Settings, images: Sequence[Image], prompt: str, seed: int
) -> dict[str, object]:
    """Arguments of the pipeline's call.

    Args:
        images: the first is the picture to edit, whose proportions the result has.
    """
    generator = torch.Generator().manual_seed(seed)
    if model == TINY:
        return _tiny_arguments(pipe, settings, images, prompt, generator)
    call = {
        "image": images[0] if len(images) == 1 else list(images), "prompt": prompt, "generator": generator,
        "num_inference_steps": settings.steps,
    }  # fmt: skip
    if settings.guidance is not None:
        call[settings.guidance_name] = settings.guidance
    if settings.negative_prompt is not None:
        call["negative_prompt"] = settings.negative_prompt
    if type(pipe).__name__.startswith("FluxKontext"):  # else it makes a square
        call |= {"width": images[0].width, "height": images[0].height}
    return call


def _tiny_arguments(pipe, settings: Settings, images, prompt: str, generator: torch.Generator) -> dict[str, object]:
    if len(images) != 1:
        raise ValueError(f"--image: expected one picture for the tiny model, received {len(images)}")
    side = TINY_PIXELS
    return {
        "image": images[0].resize((side, side)), "width": side, "height": side, "max_area": side**2,
        "_auto_resize": False, "num_inference_steps": settings.steps, "guidance_scale": settings.guidance or 2.5,
        "generator": generator, **tiny_words(pipe, prompt),
    }  # fmt: skip


def tiny_words(pipe, prompt: str, rows: int = 1) -> dict[str, torch.Tensor]:
    """Of a pipeline without text encoders: random embeddings, the same for the same words."""
    words = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
    width = pipe.transformer.config.joint_attention_dim
    where = {"device": pipe.transformer.device, "dtype": pipe.transformer.dtype}
    embeds = torch.randn(1, TINY_TEXT, width, generator=words).expand(rows, -1, -1)
    pooled = torch.randn(1, width, generator=words).expand(rows, -1)
    return {"prompt_embeds": embeds.to(**where), "pooled_prompt_embeds": pooled.to(**where)}
