"""Janus and Janus-Pro: one processor does guidance, warping and matching.

In image mode, the host's ``generate`` runs conditional and unconditional rows together. It gives processors 2B rows of
scores and an ``input_ids`` that never grows, and adds its own guidance *after* them. With ``guidance_scale=1`` it adds
none, and :class:`AnchorProcessor` counts steps itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from torch.nn import functional as F
from transformers import DynamicCache, LogitsProcessorList

from fastrope.checks import require

from ..anchors import Generated, Grid
from ..inputs import check_codes, check_pixels
from .inputs import check_options, check_result, read_prompts
from .processor import ONE_TOKEN_LEFT, AnchorProcessor

MADE_BY = 'processor(text=..., generation_mode="image", padding=True, return_tensors="pt")'


def grid(model: Any) -> Grid:
    """The square raster of a ``JanusForConditionalGeneration``: 24 x 24 in the published models."""
    tokens = model.model.vision_model.config.num_image_tokens
    side = round(tokens**0.5)
    require(side * side == tokens, "num_image_tokens", "a square number", tokens)
    return Grid(side, side)


def codebook(model: Any) -> torch.Tensor:
    """Entries ``(codes, d)`` float32 of norm 1, as the host's decoder normalises them; row = vocabulary id."""
    return F.normalize(model.model.vqmodel.quantize.embedding.weight.detach().float(), dim=-1)


@torch.no_grad()
def encode(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Codes ``(B, N)`` long of ``pixels (B, 3, H, W)`` in -1..1.

    Latents and entries are normalised before they are compared, as in the training of this tokenizer. The host's own
    ``vqmodel.encode`` compares them without this, although its decoder normalises.
    """
    check_pixels(pixels)
    vq = model.model.vqmodel
    pixels = pixels.to(device=vq.quant_conv.weight.device, dtype=vq.quant_conv.weight.dtype)
    latents = vq.quant_conv(vq.encoder(pixels)).float().flatten(2).transpose(1, 2)
    codes = (latents @ codebook(model).T).argmax(-1)  # entries have norm 1, and the latent's norm does not matter
    expected = grid(model).num_tokens
    require(codes.shape[1] == expected, "pixels", f"a picture of {expected} codes", tuple(pixels.shape))
    return codes


@torch.no_grad()
def decode(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Pixels ``(B, 3, H, W)``, about -1..1, of image tokens ``(B, N)``."""
    expected = grid(model).num_tokens
    codes = codebook(model)
    check_codes("tokens", tokens, torch.arange(len(codes), device=codes.device))
    require(tokens.shape[1] == expected, "tokens", f"{expected} per row", tokens.shape[1])
    return model.decode_image_tokens(tokens).permute(0, 3, 1, 2)


def generate(
    model: Any,
    inputs: Any,
    *,
    matcher: Any = None,
    anchors: torch.Tensor | None = None,
    guidance: float | None = 5.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    image_start: int | None = None,
    processors: Sequence = (),
    **options: Any,
) -> Generated:
    """Generate with the host's own ``generate(generation_mode="image")``; with anchors, edit.

    Args:
        model: a ``JanusForConditionalGeneration``.
        inputs: ``input_ids`` and ``attention_mask``, ``(B, S)`` each, from the host's processor with
            ``generation_mode="image"``.
        matcher: ``lock.matcher(janus.codebook(model), num_tokens=janus.grid(model).num_tokens)``; None samples.
        anchors: image tokens of the original, ``(B, N)``: from a run without matcher, or :func:`encode`.
        guidance: scale of ``u + (c - u) * scale``; 5 is the host's default. None or 1 means the condition alone.
        temperature, top_k, top_p: after guidance.
        generator: source of the seeds, one for the batch or one per row.
        image_start: id of the image-start token, ``processor.tokenizer.boi_token_id``. None reads it from the model's
            generation config, which does not always have it.
        processors: further logits processors, which run after matching (a progress bar, for example).
        options: of the host's ``generate``: ``num_return_sequences``, and those in
            :data:`fastrope.bindings.transformers.inputs.PASSED` except the two of the cache.

    Raises:
        ValueError: as :class:`AnchorProcessor`; prompts that are padded on the right, with pictures, or of text mode;
            other options, or a ``model.generation_config`` that chooses tokens; ``processors`` that change the choice.
        NotImplementedError: transformers 5.0 to 5.4, whose Janus does not attend to the tokens it has drawn.
    """
    if Version("5.0") <= Version(transformers.__version__) < Version("5.5"):
        found = transformers.__version__
        raise NotImplementedError(
            f"transformers: expected 5.5 or newer (or 4) for Janus, received {found}, where Janus does not attend to "
            "the tokens it has drawn"
        )
    for name in ("cache_implementation", "cache_config"):
        require(name not in options, name, "no such option: every call makes its cache", "one")
    check_options(model, options)
    ids, mask = read_prompts(model, inputs, MADE_BY)
    config = _generation_config(model, options, image_start)
    _check_image_start(model, ids, mask, config.generation_kwargs["boi_token_id"])
    processor = AnchorProcessor(
        grid(model), matcher=matcher, anchors=anchors, guidance=1.0 if guidance is None else guidance,
        temperature=temperature, top_k=top_k, top_p=top_p, growing=False, generator=generator,
    )  # fmt: skip
    made = model.generate(
        inputs=ids,
        generation_config=config,
        attention_mask=mask,
        generation_mode="image",
        guidance_scale=1.0,
        **ONE_TOKEN_LEFT,
        logits_processor=LogitsProcessorList([processor, *processors]),
        **new_cache(model),
        **options,
    )
    check_result(made, processor.tokens)
    return Generated(processor.tokens, processor.record)


def _generation_config(model: Any, options: dict, image_start: int | None):
    """The model's generation config, with the three tokens that make up the host's unconditional prompt.

    transformers 5 drops the image-start token when it loads a file that says it was derived from the model's config.
    """
    config = copy.deepcopy(model.generation_config)
    given = getattr(config, "generation_kwargs", None) or {}
    if image_start is None:
        image_start = given.get("boi_token_id", getattr(config, "boi_token_id", None))
    advice = "the id that model.generation_config lacks: processor.tokenizer.boi_token_id"
    require(image_start is not None, "image_start", advice, None)
    config.generation_kwargs = {**given, "boi_token_id": int(cast(int, image_start))}
    for name in ("bos_token_id", "pad_token_id"):
        value = options.get(name, getattr(config, name, None))
        require(value is not None, f"model.generation_config.{name}", "an id, for the unconditional prompt", None)
    return config


def _check_image_start(model: Any, ids: torch.Tensor, mask: torch.Tensor, start: int) -> None:
    """Require prompts ``(B, S)`` that end with the image-start token and have no picture before it."""
    for row, last in enumerate(ids[:, -1].tolist()):
        expected = f"prompts of image mode, which end with the image-start token {start}: {MADE_BY}"
        require(last == start, "input_ids", expected, f"{last} at the end of row {row}")
    pictures = (ids[:, :-1] == start) | (ids[:, :-1] == model.config.image_token_id)
    rows = (pictures & mask[:, :-1].to(ids.device).bool()).any(1).nonzero().flatten().tolist()
    require(not rows, "input_ids", "prompts without pictures or a second image start", f"some in row(s) {rows}")


def new_cache(model: Any) -> dict:
    """A new cache for the host's ``generate``. transformers 5.13 to 5.17 fail to make one."""
    parameters = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": DynamicCache()}
