"""What a picture shows, judged without knowing how it was made: its digit, the colours of ink and ground."""

from __future__ import annotations

import torch

from .scenes import RGB

INK_PIXELS = 12  # fewer than any digit covers


@torch.no_grad()
def digits(classifier, pictures: torch.Tensor) -> torch.Tensor:
    """The digit ``(B,)`` that the classifier sees in each of ``pictures (B, 3, 16, 16)``."""
    return classifier(pictures).argmax(1)


def colours(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices ``(B,)`` into the palette: of the ink, and of the ground.

    The ground is the mean of the border; the ink is the mean of the pixels that differ most from it.
    """
    border = torch.ones(pictures.shape[2:], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    ground = pictures[..., border].mean(-1)
    inner = pictures[..., ~border]
    distance = (inner - ground[..., None]).square().sum(1)
    places = distance.topk(INK_PIXELS, dim=1).indices
    ink = inner.gather(2, places[:, None].expand(-1, 3, -1)).mean(-1)
    return _nearest(ink), _nearest(ground)


def _nearest(colour: torch.Tensor) -> torch.Tensor:
    return torch.cdist(colour, RGB).argmin(1)
