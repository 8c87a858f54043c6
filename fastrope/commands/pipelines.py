"""The diffusers pipelines of the commands: how to load one, and what to call it with."""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .. import PromptWeights
from ..checks import require
from ..pictures import to_picture
from .running import TINY, Missing, flag, given, machine
from .words import Tokenizer, understand

if TYPE_CHECKING:
    from PIL.Image import Image

ENLARGED = 16  # the tiny models' pictures are shown this many times as large


@dataclass(frozen=True)
class Settings:
    """What a family of pipelines is run with, unless the user says otherwise.

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


class Encoding(NamedTuple):
    """How a family of pipelines encodes prompts.

    Args:
        gives: names, among the arguments of a call, of what ``encode_prompt`` returns first.
        tokenizer: attribute of the pipeline, where its text begins with the prompt; else None.
    """

    gives: tuple[str, ...]
    tokenizer: str | None = None


WHOLE = "pooled_prompt_embeds"  # of a whole prompt; all else has tokens
ENCODINGS = {  # by the start of the pipeline's class name
    "Flux2": Encoding(("prompt_embeds",)),
    "Flux": Encoding(("prompt_embeds", WHOLE), "tokenizer_2"),
    "QwenImagePipeline": Encoding(("prompt_embeds", "prompt_embeds_mask"), "tokenizer"),
}


class Model:
    """A pipeline, and what it is called with.

    Args:
        pipe: of diffusers.
        chosen: ``steps``, ``guidance`` and ``negative_prompt`` of the user, which replace the usual ones.
        steps: the command's own default for Qwen-Image.

    Raises:
        ValueError: a negative prompt for a pipeline that makes nothing of it.
    """

    def __init__(self, pipe, chosen: dict[str, object], qwen_steps: int = 28) -> None:
        self.pipe, self.kind = pipe, type(pipe).__name__
        settings = self._defaults()
        if self.kind.startswith("QwenImage"):
            settings = replace(settings, steps=qwen_steps)
        if "negative_prompt" in chosen:
            known = "negative_prompt" in inspect.signature(type(pipe).__call__).parameters
            takes = known and not self.kind.startswith("Flux")  # which ignores it at these settings
            require(takes, "--negative-prompt", "none", f"one; the guidance of {self.kind} is distilled")
        self.settings = replace(settings, **chosen)

    def _defaults(self) -> Settings:
        return next(found for start, found in SETTINGS.items() if self.kind.startswith(start))

    def require_editor(self, option: str) -> None:
        """Require a pipeline that reads a picture."""
        known = "image" in inspect.signature(type(self.pipe).__call__).parameters
        require(known, option, "a model that reads pictures (FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit)", self.kind)

    def call(self, prompt: str) -> dict[str, object]:
        """Arguments of the pipeline's call, but for pictures, sizes and the generator."""
        settings = self.settings
        call = {"num_inference_steps": settings.steps, **self.text("--prompt", prompt)}
        if settings.guidance is not None:
            call[settings.guidance_name] = settings.guidance
        if settings.negative_prompt is not None:
            call["negative_prompt"] = settings.negative_prompt
        return call

    def text(self, option: str, prompt: str, rows: int = 1) -> dict[str, object]:
        """Arguments that carry a prompt, for ``rows`` pictures."""
        return {"prompt": prompt}

    def joined(self, *prompts: tuple[str, str]) -> tuple[dict[str, object], list[slice]]:
        """Arguments that carry several prompts as one text, and the tokens of each.

        They are encoded apart. What stands for a whole prompt is that of the first.

        Args:
            prompts: pairs of the option that a prompt comes from, and the prompt.

        Raises:
            NotImplementedError: a pipeline whose prompts cannot be joined here.
        """
        each = [self._encoded(option, text) for option, text in prompts]
        call = {
            name: found if name == WHOLE else torch.cat([one[name] for one in each], dim=1)
            for name, found in each[0].items()
        }
        stops = [0, *accumulate(one["prompt_embeds"].shape[1] for one in each)]
        return {"prompt": None, **call}, [slice(*ends) for ends in pairwise(stops)]

    def _encoded(self, option: str, prompt: str) -> dict[str, torch.Tensor]:
        encoding = self._encoding()
        alone = {"prompt_2": None} if WHOLE in encoding.gives else {}
        with torch.no_grad():
            found = self.pipe.encode_prompt(prompt=prompt, **alone)
        return {name: x for name, x in zip(encoding.gives, found, strict=False) if x is not None}

    def places(self, prompt: str, word: str) -> list[int]:
        """The text tokens of a word or phrase of the prompt.

        Raises:
            ValueError: a word that the prompt does not have.
            NotImplementedError: a pipeline whose text does not begin with the prompt.
        """
        return list(PromptWeights.of_words(self._tokenizer(), prompt, {word: 1.0}).weights)

    def _tokenizer(self) -> Any:
        name = self._encoding().tokenizer
        if name is None:
            raise NotImplementedError(f"--word: the text of {self.kind} does not begin with the prompt; use "
                                      "fastrope.PromptWeights.of_words(..., start=) in Python")  # fmt: skip
        return getattr(self.pipe, name)

    def _encoding(self) -> Encoding:
        found = next((found for start, found in ENCODINGS.items() if self.kind.startswith(start)), None)
        if found is None:
            raise NotImplementedError(f"--model: prompts of {self.kind} cannot be encoded apart here; FLUX.1, FLUX.1 "
                                      "Kontext, FLUX.2 and Qwen-Image can, others in Python")  # fmt: skip
        return found

    def editing(self, images: Sequence[Image]) -> dict[str, object]:
        """Arguments for pictures to edit: the first is the one whose proportions the result has."""
        call = {"image": images[0] if len(images) == 1 else list(images)}
        if self.kind.startswith("FluxKontext"):  # else it makes a square
            call |= {"width": images[0].width, "height": images[0].height}
        return call

    def size(self, pictures: Sequence[Image], height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of what is drawn, in pixels."""
        from ..bindings.diffusers.trajectories import picture_size

        return picture_size(self.pipe, pictures, height, width)

    def canvas(self, height: int | None, width: int | None) -> dict[str, int]:
        """Arguments for the size of a drawing, in pixels; None leaves it to the pipeline."""
        return {name: n for name, n in (("height", height), ("width", width)) if n is not None}

    def draw(self, call: dict[str, object], seed: int, label: str | None = None) -> Image:
        """One picture, under a progress bar if ``label`` names it."""
        self.pipe.set_progress_bar_config(desc=label, disable=label is None)
        return self.finished(self.pipe(**call, **self.drawing(seed)).images[0])

    def drawing(self, seed: int) -> dict[str, object]:
        """Further arguments of a call; :meth:`finished` takes its picture."""
        return {"generator": torch.Generator().manual_seed(seed), "output_type": "np"}

    def facts(self, prompt: str) -> dict[str, object]:
        """For a record: what a run used where options were left open."""
        settings = self.settings
        return {
            "pipeline": self.kind, "prompt": prompt, "steps": settings.steps, "guidance": settings.guidance,
            "negative_prompt": settings.negative_prompt, "device": self.pipe.device,
            "dtype": self.pipe.transformer.dtype,
        }  # fmt: skip

    def finished(self, pixels: np.ndarray) -> Image:
        """The picture that the pipeline made, ``(H, W, 3)`` in 0..1, of its ``output_type="np"``.

        Raises:
            ValueError: values that are not finite, which would make a black picture.
        """
        advice = "smaller dials, or the --dtype that the model was trained in"
        require(bool(np.isfinite(pixels).all()), "the result", f"finite pixels ({advice})", "some that are not numbers")
        return to_picture("the result", pixels)


class Trained(Model):
    """The tiny model of :mod:`fastrope.lab`: 16 x 16 pixels, prompts of a few words."""

    def __init__(self, pipe, chosen: dict[str, object]) -> None:
        require("guidance" not in chosen, "--guidance", "none with --model tiny", chosen.get("guidance"))
        super().__init__(pipe, chosen)

    def _defaults(self) -> Settings:
        return Settings(16)

    @property
    def _editing(self) -> bool:
        return "Kontext" in self.kind

    def text(self, option: str, prompt: str, rows: int = 1) -> dict[str, object]:
        from .. import lab

        words = lab.prompt(**understand(option, prompt, editing=self._editing))
        where = {"device": self.pipe.transformer.device, "dtype": self.pipe.transformer.dtype}
        return {name: x.expand(rows, *x.shape[1:]).to(**where) for name, x in words.items()}

    def _encoded(self, option: str, prompt: str) -> dict[str, torch.Tensor]:
        return self.text(option, prompt)

    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._editing)

    def editing(self, images: Sequence[Image]) -> dict[str, object]:
        from ..lab import CALL

        require(len(images) == 1, "--image", "one picture for the tiny model", len(images))
        size = {name: CALL[name] for name in ("height", "width", "max_area", "_auto_resize")}
        return size | {"image": images[0].resize((CALL["width"], CALL["height"]))}

    def size(self, pictures: Sequence[Image], height: int | None, width: int | None) -> tuple[int, int]:
        from ..lab import CALL

        sizes = CALL["height"], CALL["width"]
        for name, wanted, size in zip(("--height", "--width"), (height, width), sizes, strict=True):
            require(wanted in (None, size), name, f"{size} with --model tiny", wanted)
        return sizes

    def canvas(self, height: int | None, width: int | None) -> dict[str, int]:
        from ..lab import CALL

        chosen = {"height": height or CALL["height"], "width": width or CALL["width"]}
        for name, n in chosen.items():
            require(n % 2 == 0, flag(name), "an even number with --model tiny", n)
        return chosen

    def finished(self, pixels: np.ndarray) -> Image:
        from PIL import Image

        made = super().finished(pixels)
        return made.resize((made.width * ENLARGED, made.height * ENLARGED), Image.Resampling.NEAREST)


def load(
    options: argparse.Namespace, editor: str | None = None, qwen_steps: int = 28, taken: Sequence[str] = ()
) -> Model:
    """The model of the command line: the name of a published one, a folder, or ``tiny``.

    Args:
        editor: the option that needs a model which reads pictures, if any.
        qwen_steps: see :class:`Model`.
        taken: options of a run that are not for the pipeline, but for a method.

    Raises:
        Missing: no such model, or no connection and nothing in the cache.
        ValueError: a model that does not fit the options.
    """
    device, dtype = machine(options)
    chosen = given(options, *(name for name in ("steps", "guidance", "negative_prompt") if name not in taken))
    if options.model == TINY:
        from ..lab import pipeline

        return Trained(pipeline(device, dtype, edit=editor is not None), chosen)
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with warnings.catch_warnings():  # newer versions would have it called dtype, older ones know no such argument
            warnings.simplefilter("ignore", FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(options.model, torch_dtype=dtype)
    except (OSError, HfHubHTTPError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        advice = "" if Path(options.model).exists() else (
            f" Get it with `hf download {options.model}` (some models want their licence accepted on their page and "
            "`hf auth login` first), or pass a folder; --model tiny needs no download"
        )  # fmt: skip
        raise Missing(f"cannot load {options.model}: {lines[0]}{advice}") from error
    if options.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    model = Model(pipe, chosen, qwen_steps)
    if editor is not None:
        model.require_editor(editor)
    return model
