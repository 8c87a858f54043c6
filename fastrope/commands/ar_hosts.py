"""The models ``ar-edit`` can drive, behind one face: prompts and pictures to tokens, tokens to pixels."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checks import require
from . import ar_tiny
from .running import Missing

JANUS, EMU3 = "deepseek-community/Janus-Pro-1B", "BAAI/Emu3-Gen-hf"
LLAMAGEN_FILES = (
    "t2i_XL_stage2_512.pt (--size 32) or t2i_XL_stage1_256.pt (--size 16), and vq_ds16_t2i.pt, from the repository "
    "peizesun/llamagen_t2i of the Hugging Face Hub"
)


@dataclass(frozen=True)
class Defaults:
    """What a model takes where the command line says nothing."""

    candidates: int
    tau: float
    guidance: float
    top_k: int
    size: int


DEFAULTS = {
    "llamagen": Defaults(150, 1.0, 7.5, 1000, 32),  # the paper's
    "emu3": Defaults(150, 1.0, 3.0, 2048, 90),
    "janus": Defaults(150, 1.0, 5.0, 0, 24),
    "tiny": Defaults(24, 1.0, 3.0, 0, 12),
}


class Host:
    """A model with what surrounds it.

    Args:
        name: for people.
        grid: (height, width) in tokens.
        settings: ``guidance``, ``temperature``, ``top_k``, ``top_p`` of generation.
    """

    def __init__(self, name: str, grid: tuple[int, int], settings: dict) -> None:
        self.name, self.grid, self.settings = name, grid, settings
        self.sampling = ", ".join(f"{key} {value:g}" for key, value in settings.items())

    def codebook(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Entries ``(V_img, d)`` and the vocabulary id of each, None for 0 .. V_img - 1."""
        raise NotImplementedError

    def encode(self, picture) -> torch.Tensor:
        """Vocabulary ids ``(1, N)`` of a PIL picture, cut to the aspect of the grid."""
        raise NotImplementedError

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pixels ``(B, 3, H, W)`` in 0..1, float32 on the CPU."""
        raise NotImplementedError

    def generate(self, prompts: Sequence[str], generator, *, matcher=None, anchors=None, label: str):
        """A :class:`fastrope.bindings.anchors.Generated` of one image per prompt."""
        raise NotImplementedError


class LlamaGenHost(Host):
    """LlamaGen, and the tiny random model: ``describe(prompts)`` gives features and mask, ``patch`` is in pixels."""

    def __init__(self, name, model, tokenizer, describe: Callable, patch: int, settings: dict) -> None:
        super().__init__(name, (model.config.grid, model.config.grid), settings)
        self.model, self.tokenizer, self.describe, self.patch = model, tokenizer, describe, patch
        self.device = model.tok_embeddings.weight.device

    def codebook(self):
        return self.tokenizer.codebook, None

    def encode(self, picture):
        pixels = to_pixels(picture, self.grid[0] * self.patch, self.grid[1] * self.patch)
        return self.tokenizer.encode(pixels.to(self.device) * 2 - 1)

    def decode(self, tokens):
        return shown(self.tokenizer.decode(tokens))

    def generate(self, prompts, generator, *, matcher=None, anchors=None, label):
        from tqdm import tqdm

        from ..bindings.llamagen import generate

        features, mask = self.describe(prompts)

        def progress(positions: Iterable[int]) -> Iterable[int]:
            return tqdm(positions, desc=label, unit="token")

        return generate(
            self.model, features.to(self.device), mask=mask.to(self.device), matcher=matcher, anchors=anchors,
            generator=generator, progress=progress, **self.settings,
        )  # fmt: skip


class JanusHost(Host):
    """Janus-Pro of transformers: a square grid of the model's own size, pixels in -1..1, prompts as chats.

    Args:
        model: a ``JanusForConditionalGeneration``.
        processor: its ``JanusProcessor``.
    """

    def __init__(self, name, model, processor, settings: dict) -> None:
        from ..bindings.transformers import janus

        raster = janus.grid(model)
        super().__init__(name, (raster.height, raster.width), settings)
        self.model, self.processor = model, processor
        config = model.config.vq_config
        self.patch = 2 ** (len(config.channel_multiplier) - 1)

    def codebook(self):
        from ..bindings.transformers import janus

        return janus.codebook(self.model), None

    def encode(self, picture):
        from ..bindings.transformers import janus

        return janus.encode(self.model, to_pixels(picture, *(side * self.patch for side in self.grid)) * 2 - 1)

    def decode(self, tokens):
        from ..bindings.transformers import janus

        return shown(janus.decode(self.model, tokens))

    def generate(self, prompts, generator, *, matcher=None, anchors=None, label):
        from ..bindings.transformers import janus

        chats = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
        text = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = self.processor(text=text, generation_mode="image", padding=True, return_tensors="pt")
        with _ticks(self.grid[0] * self.grid[1], label) as tick:
            return janus.generate(
                self.model, inputs.to(self.model.device), matcher=matcher, anchors=anchors, generator=generator,
                image_start=self.processor.tokenizer.boi_token_id, processors=[tick], **self.settings,
            )  # fmt: skip


class Emu3Host(Host):
    """Emu3-Gen of transformers: a square grid of any size, pixels normalised as the processor says.

    Args:
        model: an ``Emu3ForConditionalGeneration``.
        processor: its ``Emu3Processor``, which is told to pad on the left.
        size: tokens per side.
        negative: the prompt of the other branch of guidance.
    """

    def __init__(self, name, model, processor, size: int, negative: str, settings: dict) -> None:
        super().__init__(name, (size, size), settings)
        self.model, self.processor, self.negative = model, processor, negative
        self.patch = model.model.vqmodel.spatial_scale_factor
        scale = processor.image_processor
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) for v in (scale.image_mean, scale.image_std))
        processor.tokenizer.padding_side = "left"

    def codebook(self):
        from ..bindings.transformers import emu3

        return emu3.codebook(self.model)

    def encode(self, picture):
        from ..bindings.transformers import emu3

        pixels = to_pixels(picture, *(side * self.patch for side in self.grid))
        return emu3.encode(self.model, (pixels - self.mean) / self.std)

    def decode(self, tokens):
        from ..bindings.transformers import emu3

        pixels = emu3.decode(self.model, tokens, *self.grid).float().cpu()
        return (pixels * self.std + self.mean).clamp(0, 1)

    def generate(self, prompts, generator, *, matcher=None, anchors=None, label):
        from ..bindings.transformers import emu3

        height, width = self.grid
        area = height * width * self.processor.downsample_ratio**2
        options = dict(
            return_for_image_generation=True, ratio=f"{width}:{height}", image_area=area, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        # The negative prompt, too, ends where an image begins.
        inputs, negative = (
            self.processor(text=texts, **options) for texts in (list(prompts), [self.negative] * len(prompts))
        )
        with _ticks(emu3.grid(self.model, height, width).length, label) as tick:
            return emu3.generate(
                self.model, inputs.to(self.model.device), height, width, negative=negative.to(self.model.device),
                matcher=matcher, anchors=anchors, generator=generator, processors=[tick], **self.settings,
            )  # fmt: skip


class _ticks:
    """A progress bar that is a logits processor: every call of it is a token."""

    def __init__(self, total: int, label: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=label, unit="token")

    def __call__(self, input_ids, scores):
        self.bar.update()
        return scores

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()


def default_size(model: str, weights: str | None) -> int:
    """Tokens per side: what a published file of LlamaGen has in its name, since its weights do not tell; else the
    model's own."""
    found = re.search(r"_(256|384|512)\.pt$", str(weights)) if model == "llamagen" else None
    return int(found[1]) // 16 if found else DEFAULTS[model].size


def build(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Host:
    """The host that the command line asks for, its weights loaded.

    Raises:
        Missing: weights that are not there.
        MissingExtra: transformers is not installed.
    """
    model, defaults = arguments.model, DEFAULTS[arguments.model]
    size = default_size(model, arguments.weights) if arguments.size is None else arguments.size
    require(size >= 1, "--size", "a whole number from 1", size)
    settings = {
        "guidance": defaults.guidance if arguments.guidance is None else arguments.guidance,
        "temperature": arguments.temperature,
        "top_k": defaults.top_k if arguments.top_k is None else arguments.top_k,
        "top_p": arguments.top_p,
    }
    from ..bindings.inputs import check_sampling

    check_sampling(**settings)
    if model == "tiny":
        tiny = ar_tiny.tiny_model(size, device, dtype), ar_tiny.Mosaic(size, device)
        return LlamaGenHost("tiny (random weights)", *tiny, ar_tiny.describe, ar_tiny.PATCH, settings)
    if model == "llamagen":
        return _llamagen(arguments, size, settings, device, dtype)
    if model == "janus":
        from transformers import JanusForConditionalGeneration as Model
        from transformers import JanusProcessor as Processor

        name = arguments.weights or JANUS
        require(arguments.size in (None, defaults.size), "--size", "nothing else than 24 with janus", arguments.size)
        return JanusHost(name, *_pretrained(Model, Processor, name, device, dtype), settings)
    from transformers import Emu3ForConditionalGeneration as Model
    from transformers import Emu3Processor as Processor

    name = arguments.weights or EMU3
    loaded = _pretrained(Model, Processor, name, device, dtype)
    return Emu3Host(name, *loaded, size, arguments.negative_prompt, settings)


def _llamagen(arguments, size: int, settings: dict, device, dtype) -> LlamaGenHost:
    for option in ("weights", "tokenizer"):
        path = getattr(arguments, option)
        if path is None or not Path(path).is_file():
            where = "is needed" if path is None else f"names no file: {path}"
            raise Missing(f"--{option} {where}; LlamaGen takes {LLAMAGEN_FILES}")
    from transformers import AutoTokenizer, T5EncoderModel

    from ..bindings.llamagen import LlamaGen, VQTokenizer, encode_prompts
    from ..bindings.llamagen.text import ENCODER

    name = arguments.text_encoder or ENCODER
    # T5's activations overflow float16.
    wide = torch.float32 if dtype == torch.float16 else dtype
    encoder, words = _pretrained(T5EncoderModel, AutoTokenizer, name, device, wide)
    model = LlamaGen.from_checkpoint(arguments.weights, grid=size, device=device, dtype=dtype)
    require(
        model.config.condition == "text", "--weights", "a text-conditional (t2i) checkpoint", "a class-conditional one"
    )
    tokenizer = VQTokenizer.from_checkpoint(arguments.tokenizer, device=device, dtype=torch.float32)

    def describe(prompts):
        return encode_prompts(prompts, encoder=encoder, tokenizer=words, length=model.config.prefix)

    title = f"LlamaGen ({Path(arguments.weights).name})"
    return LlamaGenHost(title, model, tokenizer, describe, tokenizer.config.factor, settings)


def _pretrained(model, processor, name: str, device, dtype):
    """Model and processor of transformers by id or folder."""
    try:
        return model.from_pretrained(name, dtype=dtype).to(device).eval(), processor.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        option = "--text-encoder" if model.__name__.startswith("T5") else "--weights"
        raise Missing(
            f"cannot load {name} ({first}); download it, or name a folder that has it with {option}"
        ) from error


def to_pixels(picture, height: int, width: int) -> torch.Tensor:
    """``(1, 3, height, width)`` float32 in 0..1 of an RGB picture: the largest centred part of that aspect, resized."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return data.view(height, width, 3).permute(2, 0, 1)[None].float() / 255


def shown(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels of -1..1 as float32 in 0..1 on the CPU."""
    return (pixels.float().cpu() / 2 + 0.5).clamp(0, 1)
