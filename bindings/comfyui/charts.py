"""A record of attention as a picture, drawn with Pillow, which every ComfyUI has."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastrope.extras import importing

from ..image.inspection import Record

with importing("PIL"):
    from PIL import Image, ImageDraw

SIZE, PANEL = (1200, 800), (480, 270)
INK, GRID, PAPER = (40, 40, 40), (225, 225, 225), (255, 255, 255)
COLOURS = ((70, 110, 200), (220, 120, 40), (60, 150, 90), (190, 60, 70), (130, 90, 170), (110, 110, 110))
TITLES = {"mass": "share of attention", "distance": "distance, tokens (RMS)"}


def chart(record: Record) -> Tensor:
    """``(3, H, W)`` in 0..1: what attention of the target's queries goes to, over layers and over steps.

    Raises:
        ValueError: nothing was seen.
    """
    if not record.looks:
        raise ValueError("record: expected a run of the sampler before this node, received an empty one")
    picture = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(picture)
    names: dict[str, tuple[int, int, int]] = {}
    for row, what in enumerate(TITLES):
        for column, by in enumerate(("layer", "step")):
            corner = 90 + column * 580, 60 + row * 370
            draw.text((corner[0], corner[1] - 22), f"{TITLES[what]}, by {by}", INK, font_size=16)
            lines = record.mean(what, by)
            for name in lines:
                names.setdefault(name, COLOURS[len(names) % len(COLOURS)])
            _panel(draw, corner, lines, names)
    for n, (name, colour) in enumerate(names.items()):
        draw.text((90 + 170 * n, 760), f"- {name}", colour, font_size=18)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).movedim(-1, 0)


def _panel(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Mapping[str, Mapping[int, float]],
    colours: Mapping[str, tuple[int, int, int]],
) -> None:
    (left, top), (width, height) = corner, PANEL
    places = sorted({n for line in lines.values() for n in line})
    values = [y for line in lines.values() for y in line.values() if math.isfinite(y)]
    highest, last = max([*values, 1e-6]) * 1.05, max(places[-1] - places[0], 1)
    for n in range(5):
        y = top + height - height * n / 4
        draw.line([(left, y), (left + width, y)], GRID)
        draw.text((left - 50, y - 8), f"{highest * n / 4:.3g}", INK, font_size=13)
    for n in {places[0], places[len(places) // 2], places[-1]}:
        draw.text((left + width * (n - places[0]) / last - 4, top + height + 6), str(n), INK, font_size=13)
    for name, line in lines.items():
        points = [
            (left + width * (n - places[0]) / last, top + height - height * y / highest)
            for n, y in sorted(line.items()) if math.isfinite(y)
        ]  # fmt: skip
        if len(points) > 1:
            draw.line(points, colours[name], width=3)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colours[name])
