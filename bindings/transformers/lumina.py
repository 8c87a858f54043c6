"""Lumina-mGPT (and other Chameleon vocabularies): ids, rows, and the codebook in which tokens are compared.

transformers' own Chameleon masks the logits of image tokens, so it cannot draw. Lumina-mGPT has its own model class,
whose ``generate`` takes :class:`AnchorProcessor` after its own guidance.
"""

from __future__ import annotations

from typing import Any

import torch

from fastrope.checks import require

from ..anchors import Grid

IMAGE_IDS = range(4, 8196)
IMAGE_END = 8196
IMAGE_START = 8197
NEW_LINE = 8803
SIZE_ZERO = 8804  # plus half the tokens of a side


def grid(height: int, width: int, *, from_start: bool = False) -> Grid:
    """The raster of ``height`` rows of ``width`` image tokens, a new-line token after each, the end of the image last.

    Args:
        from_start: True: image start and sizes are generated, too, as after a question; the processor writes them like
            the ends of rows. False: the prompt ends with them, and this is checked.

    Raises:
        ValueError: an odd side; the model has no token for it.
    """
    opening = tuple(prefix(height, width))
    lead = len(opening) if from_start else 0
    return Grid(height, width, newline=NEW_LINE, lead=lead, end=IMAGE_END, opening=opening)


def prefix(height: int, width: int) -> list[int]:
    """Image start and sizes, for the end of a prompt.

    Raises:
        ValueError: an odd side; the model has no token for it.
    """
    require(height % 2 == 0 and width % 2 == 0, "height, width", "even numbers of tokens", (height, width))
    return [IMAGE_START, SIZE_ZERO + height // 2, SIZE_ZERO + width // 2]


def codebook(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Input embeddings ``(8192, dim)`` float32 of the image tokens (compared by cosine in the paper), and their ids."""
    weight = model.get_input_embeddings().weight.detach()
    ids = torch.arange(IMAGE_IDS.start, IMAGE_IDS.stop, device=weight.device)
    return weight[IMAGE_IDS.start : IMAGE_IDS.stop].float(), ids
