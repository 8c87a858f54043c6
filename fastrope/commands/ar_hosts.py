"""The models of ``ar-edit`` behind one interface: prompts and pictures to tokens, tokens to pixels."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checks import require
from .running import Missing
from .words import understand

JANUS, EMU3 = "deepseek-community/Janus-Pro-1B", "BAAI/Emu3-Gen-hf"
LLAMAGEN_FILES = (
    "t2i_XL_stage2_512.pt (--size 32) or t2i_XL_stage1_256.pt (--size 16), and vq_ds16_t2i.pt, from the repository "
    "peizesun/llamagen_t2i of the Hugging Face Hub"
)


@dataclass(frozen=True)
class Defaults:
    """The values of a model for options that are not given; ``size`` is in tokens per side."""

    candidates: int
    tau: float
    guidance: float
    top_k: int
    size: int


DEFAULTS = {
    "llamagen": Defaults(150, 1.0, 7.5, 1000, 32),  # the paper's
    "emu3": Defaults(150, 1.0, 3.0, 2048, 90),
    "janus": Defaults(150, 1.0, 5.0, 0, 24),
    "tiny": Defaults(8, 4.0, 2.0, 0, 8),
}


@dataclass(frozen=True)
class Host:
    """A model with what surrounds it.

    Args:
        name: for people.
        grid: (height, width) in tokens.
        patch: pixels per token and side.
        codebook: entries ``(V, d)``.
        ids: the vocabulary id of each entry, None for 0 .. V - 1.
        encoder: normalised pixels ``(1, 3, H, W)`` to vocabulary ids ``(1, N)``.
        decoder: vocabulary ids ``(B, N)`` to normalised pixels.
        run: ``(prompts, label, **matching)``, the label of a progress bar, to a
            :class:`fastrope.bindings.anchors.Generated` of one image per prompt.
        mean, std: of the normalisation, of pixels in 0..1.
        shown: pixels that each is enlarged to.
    """

    name: str
    grid: tuple[int, int]
    patch: int
    codebook: torch.Tensor
    ids: torch.Tensor | None
    encoder: Callable[[torch.Tensor], torch.Tensor]
    decoder: Callable[[torch.Tensor], torch.Tensor]
    run: Callable[..., Any]
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    shown: int = 1

    def _normalisation(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))

    def encode(self, picture) -> torch.Tensor:
        """Vocabulary ids ``(1, N)`` of a PIL picture, cropped around its centre to the proportions of the grid."""
        mean, std = self._normalisation()
        pixels = to_pixels(picture, *(side * self.patch for side in self.grid))
        return self.encoder(((pixels - mean) / std).to(self.codebook.device))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pixels ``(B, 3, H, W)`` in 0..1, float32 on the CPU."""
        mean, std = self._normalisation()
        pixels = (self.decoder(tokens).float().cpu() * std + mean).clamp(0, 1)
        return pixels.repeat_interleave(self.shown, 2).repeat_interleave(self.shown, 3)


def to_pixels(picture, height: int, width: int) -> torch.Tensor:
    """``(1, 3, height, width)`` float32 in 0..1 of an RGB picture, cropped around its centre and resized."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return data.view(height, width, 3).permute(2, 0, 1)[None].float() / 255


def default_size(model: str, weights: str | None) -> int:
    """Tokens per side. For LlamaGen the name of a published file decides, since its weights do not; else the model
    does."""
    found = re.search(r"_(256|384|512)\.pt$", str(weights)) if model == "llamagen" else None
    return int(found[1]) // 16 if found else DEFAULTS[model].size


def build(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Host:
    """The host that the command line asks for, its weights loaded.

    Raises:
        Missing: weights that are not there.
        MissingExtra: transformers is not installed.
    """
    from ..bindings.inputs import check_sampling

    name, defaults = options.model, DEFAULTS[options.model]
    size = default_size(name, options.weights) if options.size is None else options.size
    require(size >= 1, "--size", "a whole number from 1", size)
    fixed = name in ("janus", "tiny") and options.size not in (None, defaults.size)
    require(not fixed, "--size", f"nothing else than {defaults.size} with {name}", options.size)
    told = {name: getattr(options, name) for name in ("guidance", "temperature", "top_k", "top_p")}
    settings = {name: getattr(defaults, name) if value is None else value for name, value in told.items()}
    check_sampling(**settings)
    if name == "tiny":
        return tiny(settings, device, dtype)
    makers = {"llamagen": _llamagen, "janus": _janus, "emu3": _emu3}
    return makers[name](options, size, settings, device, dtype)


def tiny(settings: dict, device: torch.device, dtype: torch.dtype) -> Host:
    """The author of :mod:`fastrope.lab`, which takes prompts of a few words; its pictures are enlarged."""
    from .. import lab
    from ..lab.codes import PATCH, Codebook

    author = lab.load("author").to(device)
    book = Codebook(author.codebook)

    def describe(prompts: Sequence[str]) -> tuple:
        slots = [understand("prompt", prompt, editing=False) for prompt in prompts]
        return torch.cat([lab.prompt(**words)["prompt_embeds"] for words in slots]), None

    run = _llamagen_run(author.transformer.to(dtype), describe, settings)
    title, grid = "tiny (trained on handwritten digits)", (DEFAULTS["tiny"].size,) * 2
    return Host(title, grid, PATCH, book.codebook, None, book.encode, book.decode, run, shown=16)


def _llamagen(options, size: int, settings: dict, device, dtype) -> Host:
    for option in ("weights", "tokenizer"):
        path = getattr(options, option)
        if path is None or not Path(path).is_file():
            where = "is needed" if path is None else f"names no file: {path}"
            raise Missing(f"--{option} {where}; LlamaGen takes {LLAMAGEN_FILES}")
    from transformers import AutoTokenizer, T5EncoderModel

    from ..bindings.llamagen import LlamaGen, VQTokenizer, encode_prompts
    from ..bindings.llamagen.text import ENCODER

    name = options.text_encoder or ENCODER
    wide = torch.float32 if dtype == torch.float16 else dtype  # T5's activations overflow float16
    encoder, words = _pretrained(T5EncoderModel, AutoTokenizer, name, device, wide)
    model = LlamaGen.from_checkpoint(options.weights, grid=size, device=device, dtype=dtype)
    fits = model.config.condition == "text"
    require(fits, "--weights", "a text-conditional (t2i) checkpoint", "a class-conditional one")
    book = VQTokenizer.from_checkpoint(options.tokenizer, device=device, dtype=torch.float32)

    def describe(prompts: Sequence[str]) -> tuple:
        return encode_prompts(prompts, encoder=encoder, tokenizer=words, length=model.config.prefix)

    run, title = _llamagen_run(model, describe, settings), f"LlamaGen ({Path(options.weights).name})"
    return Host(title, (size, size), book.config.factor, book.codebook, None, book.encode, book.decode, run)


def _llamagen_run(model, describe: Callable, settings: dict) -> Callable:
    """``describe(prompts)`` returns features, and the mask of those that count or None."""
    from tqdm import tqdm

    from ..bindings.llamagen import generate

    device = model.tok_embeddings.weight.device

    def run(prompts: Sequence[str], label: str | None, **matching):
        features, mask = describe(prompts)
        return generate(
            model, features.to(device), mask=None if mask is None else mask.to(device),
            progress=lambda positions: tqdm(positions, desc=label, unit="token", disable=label is None), **matching,
            **settings,
        )  # fmt: skip

    return run


def _janus(options, size: int, settings: dict, device, dtype) -> Host:
    from transformers import JanusForConditionalGeneration, JanusProcessor

    from ..bindings.transformers import janus

    name = options.weights or JANUS
    model, processor = _pretrained(JanusForConditionalGeneration, JanusProcessor, name, device, dtype)
    raster = janus.grid(model)

    def run(prompts: Sequence[str], label: str, **matching):
        chats = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
        text = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = processor(text=text, generation_mode="image", padding=True, return_tensors="pt").to(model.device)
        with _ticks(raster.num_tokens, label) as tick:
            return janus.generate(model, inputs, image_start=processor.tokenizer.boi_token_id, processors=[tick],
                                  **matching, **settings)  # fmt: skip

    return Host(
        name, (raster.height, raster.width), 2 ** (len(model.config.vq_config.channel_multiplier) - 1),
        janus.codebook(model), None, lambda pixels: janus.encode(model, pixels), lambda x: janus.decode(model, x), run,
    )  # fmt: skip


def _emu3(options, size: int, settings: dict, device, dtype) -> Host:
    from transformers import Emu3ForConditionalGeneration, Emu3Processor

    from ..bindings.transformers import emu3

    name = options.weights or EMU3
    model, processor = _pretrained(Emu3ForConditionalGeneration, Emu3Processor, name, device, dtype)
    processor.tokenizer.padding_side = "left"
    options_of_text = dict(
        return_for_image_generation=True, ratio="1:1", image_area=(size * processor.downsample_ratio) ** 2,
        padding=True, return_tensors="pt",
    )  # fmt: skip

    def run(prompts: Sequence[str], label: str, **matching):
        # The negative prompt, too, ends where an image begins.
        texts = list(prompts), [options.negative_prompt] * len(prompts)
        inputs, negative = (processor(text=text, **options_of_text).to(model.device) for text in texts)
        with _ticks(emu3.grid(model, size, size).length, label) as tick:
            return emu3.generate(model, inputs, size, size, negative=negative, processors=[tick], **matching,
                                 **settings)  # fmt: skip

    scale = processor.image_processor
    return Host(
        name, (size, size), model.model.vqmodel.spatial_scale_factor, *emu3.codebook(model),
        lambda pixels: emu3.encode(model, pixels), lambda x: emu3.decode(model, x, size, size), run,
        scale.image_mean, scale.image_std,
    )  # fmt: skip


@contextmanager
def _ticks(total: int, label: str) -> Iterator[Callable]:
    """A logits processor that moves a progress bar: each of its calls is a token."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="token") as bar:

        def tick(input_ids, scores):
            bar.update()
            return scores

        yield tick


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
