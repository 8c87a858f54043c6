"""What a picture shows, judged without knowing how it was made: its digit, colours, texture and layout.

Pictures are ``(B, 3, 16, 16)`` in -1..1. Nothing here presumes a colour: the ground is what the border shows, the ink
is what differs from it.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .scenes import PERIOD, RGB, TEXTURES, patterns

INK_PIXELS = 12  # fewer than any digit covers
TEXTURED = 0.07  # least strength of a texture, in units of a pixel; scenes have 0.22 or none


@torch.no_grad()
def digits(classifier, pictures: torch.Tensor) -> torch.Tensor:
    """The digit ``(B,)`` that the classifier sees."""
    return classifier(pictures).argmax(1)


def palette(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colours ``(B, 3)``: of the ink, the mean of the pixels that differ most from the ground; of the ground, the mean
    of the border."""
    border = _border()
    ground = pictures[..., border].mean(-1)
    inner = pictures[..., ~border]
    distance = (inner - ground[..., None]).square().sum(1)
    places = distance.topk(INK_PIXELS, dim=1).indices
    return inner.gather(2, places[:, None].expand(-1, 3, -1)).mean(-1), ground


def colours(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices ``(B,)`` into the palette: of the ink, and of the ground."""
    ink, ground = palette(pictures)
    return _nearest(ink), _nearest(ground)


def textures(pictures: torch.Tensor) -> torch.Tensor:
    """Index ``(B,)`` of the texture that the border shows most clearly, each at the phase that fits best."""
    border = _border()
    brightness = pictures.mean(1)[..., border]
    brightness = brightness - brightness.mean(1, keepdim=True)
    fits = (brightness @ _reliefs().T).view(len(pictures), len(TEXTURES) - 1, -1).amax(2)  # (B, textures)
    best = fits.max(1)
    return torch.where(best.values > TEXTURED, best.indices + 1, 0)


def contrast(pictures: torch.Tensor) -> torch.Tensor:
    """How much of each pixel is ink, ``(B, 16, 16)``, about 0..1: its place on the line from ground to ink."""
    ink, ground = (colour[..., None, None] for colour in palette(pictures))
    line = ink - ground
    return ((pictures - ground) * line).sum(1) / line.square().sum(1).clamp(min=1e-4)


def layouts(pictures: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Correlation ``(B,)`` in -1..1 of where two pictures have their ink, whatever its colour."""
    ours, theirs = (contrast(p).flatten(1) for p in (pictures, others))
    ours, theirs = (x - x.mean(1, keepdim=True) for x in (ours, theirs))
    return (ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1)).clamp(min=1e-6)


def distances(pictures: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference ``(B,)``, as a share of the range of a pixel."""
    return (pictures - others).abs().mean((1, 2, 3)) / 2


def _nearest(colour: torch.Tensor) -> torch.Tensor:
    return torch.cdist(colour, RGB).argmin(1)


@lru_cache
def _border() -> torch.Tensor:
    """The outermost pixels, ``(16, 16)`` bool."""
    border = torch.ones(16, 16, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border


@lru_cache
def _reliefs() -> torch.Tensor:
    """What every texture adds to the border at every phase, ``(textures * phases, pixels)``, less its mean. Rows are
    scaled so that the product of a row with a border that shows one unit of it is 1."""
    phase = torch.cartesian_prod(torch.arange(PERIOD), torch.arange(PERIOD))
    found = patterns(phase)[:, 1:].transpose(0, 1).flatten(0, 1)[:, _border()]
    found = found - found.mean(1, keepdim=True)
    return found / found.square().sum(1, keepdim=True)
