"""Emu3: rows end with an end-of-line token, image tokens are part of a larger vocabulary, the host does guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import LogitsProcessorList

from fastrope.checks import require

from ..anchors import Generated, Grid
from ..inputs import check_codes, check_pixels
from .inputs import check_options, check_result, read_prompts
from .processor import ONE_TOKEN_LEFT, AnchorProcessor

IMAGE_START, IMAGE_TOKEN = "<|image start|>", "<|image token|>"  # "height*width" stands between them
MADE_BY = 'processor.tokenizer.padding_side = "left", then processor(text=..., return_for_image_generation=True, ...)'


def grid(model: Any, height: int, width: int) -> Grid:
    """The raster of ``height`` rows of ``width`` tokens, an end-of-line token after each."""
    mapping = model.model.vocabulary_mapping
    before = mapping.vocab_map.get(IMAGE_TOKEN)
    return Grid(height, width, newline=mapping.eol_token_id, opening=() if before is None else (before,))


def codebook(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries ``(codes, d)`` float32 of the VQ model, and the vocabulary id of each ``(codes,)`` long."""
    entries = model.model.vqmodel.quantize.embedding.weight.detach().float()
    ids = model.model.vocabulary_mapping.img2bpe_mapping_tensor.long().to(entries.device)
    require(len(ids) == len(entries), "vocabulary_map", f"{len(entries)} visual tokens", len(ids))
    return entries, ids


@torch.no_grad()
def encode(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Vocabulary ids ``(B, N)`` long, without end-of-line tokens, of the processor's ``pixels (B, 3, H, W)``."""
    check_pixels(pixels)
    vq = model.model.vqmodel
    factor = vq.spatial_scale_factor
    fits = pixels.shape[2] % factor == 0 and pixels.shape[3] % factor == 0
    require(fits, "pixels", f"sides that are multiples of {factor}", tuple(pixels.shape))
    sizes = [tuple(pixels.shape[2:])] * pixels.shape[0]
    found = vq.encode(pixels.to(device=vq.device, dtype=vq.dtype), sizes)
    codes = torch.stack(list(getattr(found, "image_tokens", found)))  # transformers 4 returns the list itself
    return codebook(model)[1][codes.flatten(1)]


@torch.no_grad()
def decode(model: Any, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixels ``(B, 3, 8 * height, 8 * width)``, about -1..1, of image tokens ``(B, N)``, vocabulary ids."""
    check_codes("tokens", tokens, codebook(model)[1])
    require(tokens.shape[1] == height * width, "tokens", f"{height * width} per row", tokens.shape[1])
    mapping = model.model.vocabulary_mapping.bpe2img_mapping_tensor.to(tokens.device)
    return model.model.vqmodel.decode(mapping[tokens].view(-1, height, width).long())


def generate(
    model: Any,
    inputs: Any,
    height: int,
    width: int,
    *,
    negative: Any = None,
    matcher: Any = None,
    anchors: torch.Tensor | None = None,
    guidance: float | None = 3.0,
    temperature: float = 1.0,
    top_k: int = 2048,
    top_p: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    processors: Sequence = (),
    **options: Any,
) -> Generated:
    """Generate an image of ``height x width`` tokens with the host's own ``generate``; with anchors, edit.

    Guidance is the host's (on log-probabilities, before our processor), and needs ``negative``.

    Args:
        model: an ``Emu3ForConditionalGeneration``.
        inputs: ``input_ids`` and ``attention_mask``, ``(B, S)`` each, which end right before the image:
            ``processor(text=..., return_for_image_generation=True)``, padded on the left. The processor adds
            ``image_sizes``, which must be ``height`` and ``width``.
        negative: ``input_ids`` and ``attention_mask`` of the negative prompt, ``(B, S')`` or ``(1, S')`` each, prepared
            in the same way.
        matcher: ``lock.matcher(entries, num_tokens=height * width, token_ids=ids)`` of :func:`codebook`; None samples.
        anchors: the original's image tokens, ``(B, N)`` vocabulary ids: from a run without matcher, or :func:`encode`.
        guidance: the scale; None or 1 means the condition alone.
        temperature, top_k, top_p: after guidance, among image tokens.
        generator: source of the seeds, one for the batch or one per row.
        processors: further logits processors, which run after matching (a progress bar, for example).
        options: of the host's ``generate``: ``num_return_sequences``, and those in
            :data:`fastrope.bindings.transformers.inputs.PASSED`, which do not choose tokens.

    Raises:
        ValueError: as :class:`AnchorProcessor`; guidance without ``negative``; prompts that are padded on the right, of
            another size, with pictures, or not made for image generation; other options, or a
            ``model.generation_config`` that chooses tokens; ``processors`` that change the choice.
    """
    check_options(model, options)
    ids, mask = _read(model, inputs, height, width)
    guided = guidance is not None and guidance != 1
    require(not guided or negative is not None, "negative", "a negative prompt to guide away from", None)
    raster = grid(model, height, width)
    processor = AnchorProcessor(
        raster, matcher=matcher, anchors=anchors, image_ids=codebook(model)[1], temperature=temperature,
        top_k=top_k, top_p=top_p, generator=generator,
    )  # fmt: skip
    if guided:
        # The host repeats prompts for several sequences each, but not negative ones.
        others, hidden = _read(model, negative, height, width, "negative")
        rows = len(ids) * options.get("num_return_sequences", 1)
        require(rows % len(others) == 0, "negative", f"a number of rows that divides the batch of {rows}", len(others))
        for name, given in (("negative_prompt_ids", others), ("negative_prompt_attention_mask", hidden)):
            options[name] = given.repeat_interleave(rows // len(others), dim=0)
    made = model.generate(
        ids,
        attention_mask=mask,
        guidance_scale=float(cast(float, guidance)) if guided else 1.0,
        **ONE_TOKEN_LEFT,
        max_new_tokens=raster.length,
        logits_processor=LogitsProcessorList([processor, *processors]),
        **options,
    )[:, ids.shape[1] :]
    require(made.shape[1] == raster.length, "generate", f"{raster.length} new tokens of the host", made.shape[1])
    check_result(raster.flatten(made), processor.tokens)
    return Generated(processor.tokens, processor.record)


def _read(model: Any, inputs: Any, height: int, width: int, label: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of prompts that end right before an image of ``height x width``, and have no other image."""
    where = f"{label}." if label else ""
    ids, mask = read_prompts(model, inputs, MADE_BY, label, known=("image_sizes",))
    size = f"{height} x {width} tokens"
    if "image_sizes" in inputs:
        found = torch.as_tensor(inputs["image_sizes"], device="cpu").tolist()
        how = f"{size} in every row, as ratio=... and image_area=... of the processor say"
        require(found == [[height, width]] * len(ids), where + "image_sizes", how, found)
    mapping = model.model.vocabulary_mapping
    of_images = [*mapping.image_tokens, *(x for x in (mapping.eol_token_id, mapping.image_token_id) if x is not None)]
    seen = (torch.isin(ids, torch.tensor(of_images, device=ids.device)) & mask.to(ids.device).bool()).any(1)
    rows = seen.nonzero().flatten().tolist()
    require(not rows, where + "input_ids", "prompts without image tokens", f"some in row(s) {rows}")
    names = mapping.vocab_map
    if IMAGE_START in names and IMAGE_TOKEN in names:
        words = {id: name for name, id in names.items()}
        for row, line in enumerate(ids.tolist()):
            _, _, tail = "".join(words.get(id, " ") for id in line).rpartition(IMAGE_START)
            expected = f"{IMAGE_START}{height}*{width}{IMAGE_TOKEN} at the end: {size}, {MADE_BY}"
            require(
                tail == f"{height}*{width}{IMAGE_TOKEN}", where + "input_ids", expected, f"{tail[-40:]!r} in row {row}"
            )
    return ids, mask
