"""The picture that the idea is shown on: a landscape with a balloon pasted in."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 512  # drawn at, pixels
RIDGES = ((330, 46, 0.6, (139, 142, 175)), (372, 38, 2.4, (88, 124, 126)), (424, 30, 4.2, (62, 108, 72)))
TREES = ((60, 440, 34), (112, 470, 46), (430, 452, 40), (476, 486, 52))
STRIPES = ((1.0, (213, 60, 36)), (0.8, (250, 240, 220)), (0.55, (0, 96, 150)), (0.25, (240, 176, 32)))


def draw_scene() -> tuple[torch.Tensor, torch.Tensor]:
    """The composite ``(3, SIZE, SIZE)`` in 0..1, and a mask ``(SIZE, SIZE)`` bool of the pasted pixels."""
    composite = _landscape()
    before = np.asarray(composite)
    _paste_balloon(composite)
    after = np.asarray(composite)
    return torch.from_numpy(after / np.float32(255)).permute(2, 0, 1), torch.from_numpy((after != before).any(2))


def mask_tokens(mask: torch.Tensor, grid: int, dilate: int) -> torch.Tensor:
    """Tokens of the paste on a grid, ``(grid, grid)`` bool, grown ``dilate`` times by a 4-connected cross."""
    inside = F.interpolate(mask[None, None].float(), size=(grid, grid), mode="area") > 0.25
    cross = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])[None, None]
    for _ in range(dilate):
        inside = F.conv2d(inside.float(), cross, padding=1) > 0
    return inside[0, 0]


def _landscape():
    from PIL import Image, ImageDraw, ImageFilter

    high, low = np.array((92, 150, 214)), np.array((250, 222, 178))
    sky = high + (low - high) * np.linspace(0, 1 / 0.62, SIZE).clip(max=1)[:, None]
    image = Image.fromarray(np.broadcast_to(sky[:, None], (SIZE, SIZE, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((330, 214, 410, 294), fill=(255, 241, 200))
    for base, height, phase, colour in RIDGES:
        ridge = ((x, 0.6 * math.sin(x / 83 + phase) + 0.4 * math.sin(x / 37 + 2 * phase)) for x in range(0, 516, 4))
        draw.polygon([*((x, base - height * y) for x, y in ridge), (SIZE, SIZE), (0, SIZE)], fill=colour)
    draw.polygon([(214, SIZE), (322, SIZE), (286, 452), (262, 418), (256, 420), (264, 456)], fill=(206, 186, 140))
    for x, y, size in TREES:
        draw.polygon([(x - size // 2, y), (x + size // 2, y), (x, y - 2 * size)], fill=(32, 70, 52))
        draw.rectangle((x - 3, y, x + 3, y + size // 4), fill=(74, 54, 40))
    return image.filter(ImageFilter.GaussianBlur(1))


def _paste_balloon(image) -> None:
    from PIL import ImageDraw

    draw, x, y, radius = ImageDraw.Draw(image), 190, 170, 100
    for width, colour in STRIPES:
        draw.ellipse((x - radius * width, y - radius, x + radius * width, y + radius), fill=colour)
        wide, narrow = 0.87 * radius * width, 20 * width
        draw.polygon(
            [(x - wide, y + 50), (x + wide, y + 50), (x + narrow, y + 142), (x - narrow, y + 142)], fill=colour
        )
    for side in (-18, 18):
        draw.line((x + side, y + 140, x + 0.8 * side, y + 176), fill=(40, 30, 24), width=4)
    draw.rectangle((x - 22, y + 174, x + 22, y + 206), fill=(120, 76, 40))
