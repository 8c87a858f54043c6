"""Emu3: rows end with an end-of-line token, image tokens are part of a larger vocabulary, the host guides first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessorList

from fastrope.checks import require, require_tensor

from ..anchors import Generated, Grid
from .processor import ONE_TOKEN_LEFT, AnchorProcessor


def grid(model, height: int, width: int) -> Grid:
    """The raster of ``height`` rows of ``width`` tokens, an end-of-line token after each."""
    return Grid(height, width, newline=model.model.vocabulary_mapping.eol_token_id)


def codebook(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries ``(codes, d)`` float32 of the VQ model, and the vocabulary id of each ``(codes,)`` long."""
    entries = model.model.vqmodel.quantize.embedding.weight.detach().float()
    ids = model.model.vocabulary_mapping.img2bpe_mapping_tensor.long().to(entries.device)
    require(len(ids) == len(entries), "vocabulary_map", f"{len(entries)} visual tokens", len(ids))
    return entries, ids


@torch.no_grad()
def encode(model, pixels: torch.Tensor) -> torch.Tensor:
    """Vocabulary ids ``(B, N)`` long, no end-of-line tokens, of ``pixels (B, 3, H, W)`` as the host prepares them."""
    require_tensor("pixels", pixels, (4,), "(B, 3, H, W)")
    vq = model.model.vqmodel
    sizes = [tuple(pixels.shape[2:])] * pixels.shape[0]
    found = vq.encode(pixels.to(device=vq.device, dtype=vq.dtype), sizes)
    codes = torch.stack(list(getattr(found, "image_tokens", found)))  # transformers 4 returns the list itself
    return codebook(model)[1][codes.flatten(1)]


@torch.no_grad()
def decode(model, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixels ``(B, 3, 8 * height, 8 * width)``, about -1..1, of image tokens ``(B, N)``, vocabulary ids."""
    require_tensor("tokens", tokens, (2,), f"(B, {height * width})")
    require(tokens.shape[1] == height * width, "tokens", f"{height * width} per row", tokens.shape[1])
    mapping = model.model.vocabulary_mapping.bpe2img_mapping_tensor.to(tokens.device)
    return model.model.vqmodel.decode(mapping[tokens].view(-1, height, width).long())


def prefix_function(model, grid: Grid, prompt_length: int) -> Callable[[int, torch.Tensor], list[int]]:
    """The host's way to force rows: a ``prefix_allowed_tokens_fn`` of image tokens and row ends.

    :func:`generate` does without, as :class:`AnchorProcessor` forces rows itself in one operation.
    """
    image = model.model.vocabulary_mapping.image_tokens

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        forced = grid.forced(len(ids) - prompt_length)
        return image if forced is None else [forced]

    return allowed


def generate(
    model,
    inputs,
    height: int,
    width: int,
    *,
    negative=None,
    matcher=None,
    anchors: torch.Tensor | None = None,
    guidance: float | None = 3.0,
    temperature: float = 1.0,
    top_k: int = 2048,
    top_p: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    processors: Sequence = (),
    **options,
) -> Generated:
    """Generate an image of ``height x width`` tokens with the host's own ``generate``; with anchors, edit.

    Guidance is the host's (log-probabilities, before this package's processor), and needs ``negative``.

    Args:
        model: an ``Emu3ForConditionalGeneration``.
        inputs: ``input_ids`` and ``attention_mask``, ``(B, S)`` each, that end where the image begins:
            ``processor(text=..., return_for_image_generation=True)``, padded on the left.
        negative: ``input_ids`` and ``attention_mask`` of the negative prompt, ``(B, S')`` or ``(1, S')`` each, prepared
            alike.
        matcher: ``lock.matcher(entries, num_tokens=height * width, token_ids=ids)`` of :func:`codebook`; None samples.
        anchors: the original's image tokens, ``(B, N)`` vocabulary ids: from a run without matcher, or :func:`encode`.
        guidance: the scale; None or 1 is the condition alone.
        temperature, top_k, top_p: after guidance, among image tokens.
        generator: source of the seeds, one for the batch or one per row.
        processors: further logits processors, which run after matching (a progress bar, say).
        options: of the host's ``generate``.

    Raises:
        ValueError: as :class:`AnchorProcessor`; guidance without ``negative``; options that are set here.
    """
    set_here = ("do_sample", "guidance_scale", "logits_processor", "max_new_tokens", "prefix_allowed_tokens_fn")
    for name in set_here:
        require(name not in options, name, "the arguments of this function instead", "it among the options")
    guided = guidance is not None and guidance != 1
    require(not guided or negative is not None, "negative", "a negative prompt to guide away from", None)
    raster = grid(model, height, width)
    processor = AnchorProcessor(
        raster, matcher=matcher, anchors=anchors, image_ids=codebook(model)[1], temperature=temperature,
        top_k=top_k, top_p=top_p, generator=generator,
    )  # fmt: skip
    if guided:
        # The host repeats prompts for several sequences each, but not negative ones.
        rows, given = inputs["input_ids"].shape[0] * options.get("num_return_sequences", 1), len(negative["input_ids"])
        fits = given > 0 and rows % given == 0
        require(fits, "negative", f"a number of rows that divides the batch of {rows}", given)
        for name, mine in (("negative_prompt_ids", "input_ids"), ("negative_prompt_attention_mask", "attention_mask")):
            options[name] = negative[mine].repeat_interleave(rows // given, dim=0)
    model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        guidance_scale=float(guidance) if guided else 1.0,
        **ONE_TOKEN_LEFT,
        max_new_tokens=raster.length,
        logits_processor=LogitsProcessorList([processor, *processors]),
        **options,
    )
    return Generated(processor.tokens, processor.record)
