"""From prompts to the features of LlamaGen's text checkpoints: flan-t5-xl, 120 tokens, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrope.checks import require, require_tensor
from fastrope.extras import importing

ENCODER = "google/flan-t5-xl"


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str],
    *,
    encoder: Any = ENCODER,
    tokenizer: Any = None,
    length: int = 120,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``(B, length, channels)`` and mask ``(B, length)`` bool of prompts, as ``generate`` takes them.

    Prompts are lowercased, and runs of white space become one space. The training also removed links, markup, brackets,
    slashes and symbols. That does not change prompts in plain words, and is not repeated here.

    Args:
        prompts: one per image.
        encoder: a T5 encoder of transformers, or the name or folder of one to load.
        tokenizer: its tokenizer; None loads the one with the encoder's name.
        length: tokens per prompt.
        device, dtype: of a loaded encoder.

    Raises:
        MissingExtra: transformers is not installed.
        ValueError: no prompts, or an encoder object without its tokenizer.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    require(len(prompts) > 0, "prompts", "at least one", prompts)
    if isinstance(encoder, str):
        with importing("transformers"):
            from transformers import AutoTokenizer, T5EncoderModel

        tokenizer = AutoTokenizer.from_pretrained(encoder) if tokenizer is None else tokenizer
        loaded: Any = T5EncoderModel.from_pretrained(encoder, dtype=dtype)
        encoder = loaded.to(device).eval()
    require(tokenizer is not None, "tokenizer", "the tokenizer of the encoder", None)
    cleaned = [" ".join(prompt.lower().split()) for prompt in prompts]
    batch = tokenizer(cleaned, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
    batch = {name: batch[name].to(encoder.device) for name in ("input_ids", "attention_mask")}
    return pad_left(encoder(**batch).last_hidden_state, batch["attention_mask"].bool())


def pad_left(features: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the tokens that count from the front of ``(B, T, C)`` to its end, after zeros; the mask likewise."""
    require_tensor("features", features, (3,), "(B, T, C)")
    require(mask.shape == features.shape[:2], "mask", tuple(features.shape[:2]), tuple(mask.shape))
    length = mask.shape[1]
    position = torch.arange(length, device=mask.device)
    source = (position + mask.sum(1, keepdim=True)) % length
    moved = features.gather(1, source[..., None].expand_as(features))
    mask = mask.gather(1, source)
    return moved * mask[..., None], mask
