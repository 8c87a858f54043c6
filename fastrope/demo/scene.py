"""The picture that the idea is shown on: a landscape with a balloon pasted in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 512  # drawn at, pixels


@dataclass(frozen=True)
class Scene:
    """``composite (3, SIZE, SIZE)`` in 0..1; ``mask (SIZE, SIZE)`` bool, the pasted pixels."""

    composite: torch.Tensor
    mask: torch.Tensor


def draw_scene() -> Scene:
    """Draw it; the same pixels every time."""
    composite, (paste, mask) = _landscape(), _balloon()
    composite.paste(paste, (0, 0), mask)
    return Scene(_tensor(composite), _tensor(mask)[0] > 0.5)


def at_size(scene: Scene, pixels: int) -> torch.Tensor:
    """The composite averaged down to ``(3, pixels, pixels)``."""
    return F.interpolate(scene.composite[None], size=(pixels, pixels), mode="area")[0]


def mask_tokens(scene: Scene, grid: int, dilate: int) -> torch.Tensor:
    """Tokens of the paste on a grid, ``(grid * grid,)`` bool, grown ``dilate`` times by a 4-connected cross."""
    mask = F.interpolate(scene.mask[None, None].float(), size=(grid, grid), mode="area") > 0.25
    cross = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])[None, None]
    for _ in range(dilate):
        mask = F.conv2d(mask.float(), cross, padding=1) > 0
    return mask.flatten()


def _landscape():
    from PIL import Image, ImageDraw, ImageFilter

    image = Image.new("RGB", (SIZE, SIZE))
    draw = ImageDraw.Draw(image)
    for y in range(SIZE):
        t = y / SIZE
        draw.line([(0, y), (SIZE, y)], fill=_mix((92, 150, 214), (250, 222, 178), min(1.0, t / 0.62)))
    draw.ellipse((330, 214, 410, 294), fill=(255, 241, 200))
    for base, height, phase, colour in (
        (330, 46, 0.6, (139, 142, 175)), (372, 38, 2.4, (88, 124, 126)), (424, 30, 4.2, (62, 108, 72)),
    ):  # fmt: skip
        ridge = [0.6 * _sin(x / 83 + phase) + 0.4 * _sin(x / 37 + 2 * phase) for x in range(0, SIZE + 1, 4)]
        wave = [(4 * n, base - height * y) for n, y in enumerate(ridge)]
        draw.polygon([*wave, (SIZE, SIZE), (0, SIZE)], fill=colour)
    draw.polygon([(214, SIZE), (322, SIZE), (286, 452), (262, 418), (256, 420), (264, 456)], fill=(206, 186, 140))
    for x, y, size in ((60, 440, 34), (112, 470, 46), (430, 452, 40), (476, 486, 52)):
        draw.polygon([(x - size // 2, y), (x + size // 2, y), (x, y - 2 * size)], fill=(32, 70, 52))
        draw.rectangle((x - 3, y, x + 3, y + size // 4), fill=(74, 54, 40))
    return image.filter(ImageFilter.GaussianBlur(1))


def _balloon():
    from PIL import Image, ImageDraw

    image, mask = Image.new("RGB", (SIZE, SIZE)), Image.new("L", (SIZE, SIZE), 0)
    cx, cy, radius = 190, 170, 100
    for target, plain in ((image, None), (mask, 255)):
        draw = ImageDraw.Draw(target)
        stripes = ((213, 60, 36), (250, 240, 220), (0, 96, 150), (240, 176, 32))
        widths = (1.0, 0.8, 0.55, 0.25)
        for colour, width in zip(stripes, widths, strict=True):
            fill = colour if plain is None else plain
            draw.ellipse((cx - radius * width, cy - radius, cx + radius * width, cy + radius), fill=fill)
            wide, narrow = 0.87 * radius * width, 20 * width
            corners = [(cx - wide, cy + 50), (cx + wide, cy + 50), (cx + narrow, cy + 142), (cx - narrow, cy + 142)]
            draw.polygon(corners, fill=fill)
        for x in (-18, 18):
            rope = (40, 30, 24) if plain is None else plain
            draw.line((cx + x, cy + 140, cx + 0.8 * x, cy + 176), fill=rope, width=4)
        draw.rectangle((cx - 22, cy + 174, cx + 22, cy + 206), fill=(120, 76, 40) if plain is None else plain)
    return image, mask


def _mix(a, b, t: float) -> tuple[int, int, int]:
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


def _sin(x: float) -> float:
    return float(torch.sin(torch.tensor(x)))


def _tensor(image) -> torch.Tensor:
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
