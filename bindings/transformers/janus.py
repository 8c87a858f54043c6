"""Janus and Janus-Pro: one processor does guidance, warping and matching.

In image mode the host's ``generate`` runs conditional and unconditional rows together, appends its own guidance
*after* the processors it is given (which see 2B rows), and hands them an ``input_ids`` that never grows. With
``guidance_scale=1`` it appends nothing, and :class:`AnchorProcessor` counts steps itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import DynamicCache, LogitsProcessorList

from fastrope.checks import require, require_tensor

from ..anchors import Generated, Grid
from .processor import ONE_TOKEN_LEFT, AnchorProcessor


def grid(model) -> Grid:
    """The square raster of a ``JanusForConditionalGeneration``: 24 x 24 in the published models."""
    tokens = model.model.vision_model.config.num_image_tokens
    side = round(tokens**0.5)
    require(side * side == tokens, "num_image_tokens", "a square number", tokens)
    return Grid(side, side)


def codebook(model) -> torch.Tensor:
    """Entries ``(codes, d)`` float32 of norm 1, as the host's decoder normalises them; row = vocabulary id."""
    return F.normalize(model.model.vqmodel.quantize.embedding.weight.detach().float(), dim=-1)


@torch.no_grad()
def encode(model, pixels: torch.Tensor) -> torch.Tensor:
    """Codes ``(B, N)`` long of ``pixels (B, 3, H, W)`` in -1..1.

    Latents and entries are normalised before they are compared, as in the training of this tokenizer; the host's own
    ``vqmodel.encode`` compares them as they are, while its decoder normalises.
    """
    require_tensor("pixels", pixels, (4,), "(B, 3, H, W)")
    vq = model.model.vqmodel
    pixels = pixels.to(device=vq.quant_conv.weight.device, dtype=vq.quant_conv.weight.dtype)
    latents = vq.quant_conv(vq.encoder(pixels)).float().flatten(2).transpose(1, 2)
    codes = (latents @ codebook(model).T).argmax(-1)  # of unit entries; the latent's length changes nothing
    expected = grid(model).num_tokens
    require(codes.shape[1] == expected, "pixels", f"a picture of {expected} codes", tuple(pixels.shape))
    return codes


@torch.no_grad()
def decode(model, tokens: torch.Tensor) -> torch.Tensor:
    """Pixels ``(B, 3, H, W)``, about -1..1, of image tokens ``(B, N)``."""
    return model.decode_image_tokens(tokens).permute(0, 3, 1, 2)


def generate(
    model,
    inputs,
    *,
    matcher=None,
    anchors: torch.Tensor | None = None,
    guidance: float | None = 5.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    processors: Sequence = (),
    **options,
) -> Generated:
    """Generate with the host's own ``generate(generation_mode="image")``; with anchors, edit.

    Args:
        model: a ``JanusForConditionalGeneration``.
        inputs: ``input_ids`` and ``attention_mask``, ``(B, S)`` each, from the host's processor with
            ``generation_mode="image"``.
        matcher: ``lock.matcher(janus.codebook(model), num_tokens=janus.grid(model).num_tokens)``; None samples.
        anchors: image tokens of the original, ``(B, N)``: from a run without matcher, or :func:`encode`.
        guidance: scale of ``u + (c - u) * scale``, 5 being the host's default; None or 1 is the condition alone.
        temperature, top_k, top_p: after guidance.
        generator: source of the seeds, one for the batch or one per row.
        processors: further logits processors, which run after matching (a progress bar, say).
        options: of the host's ``generate``.

    Raises:
        ValueError: as :class:`AnchorProcessor`; options that are set here.
    """
    for name in ("do_sample", "guidance_scale", "logits_processor"):
        require(name not in options, name, "guidance=... and processors=... instead", "it among the options")
    processor = AnchorProcessor(
        grid(model), matcher=matcher, anchors=anchors, guidance=1.0 if guidance is None else guidance,
        temperature=temperature, top_k=top_k, top_p=top_p, growing=False, generator=generator,
    )  # fmt: skip
    config = _generation_config(options.pop("generation_config", model.generation_config), inputs["input_ids"])
    model.generate(
        inputs=inputs["input_ids"],
        generation_config=config,
        attention_mask=inputs["attention_mask"],
        generation_mode="image",
        guidance_scale=1.0,
        **ONE_TOKEN_LEFT,
        logits_processor=LogitsProcessorList([processor, *processors]),
        **{"num_return_sequences": 1, **own_cache(model), **options},  # the host of transformers 5.0 knows no default
    )
    return Generated(processor.tokens, processor.record)


def _generation_config(config, input_ids: torch.Tensor):
    """``config`` with the image-start token that the host's ``generate`` looks up in it.

    transformers 5 drops the entry on loading where a file says that it was derived from the model's configuration; the
    host's processor ends prompts with that token.
    """
    config = copy.deepcopy(config)
    if not getattr(config, "generation_kwargs", None):
        last = input_ids[:, -1].unique()
        require(len(last) == 1, "input_ids", "prompts that end with the image-start token", last.tolist())
        config.generation_kwargs = {"boi_token_id": int(last)}
    return config


def own_cache(model) -> dict:
    """A new cache for the host's ``generate``, which fails to make one itself in transformers 5.0 and 5.13 to 5.17."""
    parameters = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": DynamicCache()}
