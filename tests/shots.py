"""Pictures and records of command lines under test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def photo(name: str, size: tuple[int, int] = (40, 40), seed: int = 0) -> str:
    """Write noise of ``size`` (width, height); the name."""
    noise = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(name)
    return name


def mask(name: str, size: tuple[int, int] = (40, 40)) -> str:
    """Write a mask with a box inside; the name."""
    inside = np.zeros(size[::-1], dtype=np.uint8)
    inside[10:30, 10:20] = 255
    Image.fromarray(inside).save(name)
    return name


def pixels(name: str | Path) -> np.ndarray:
    """``(H, W, 3)`` of a file, integers that can be subtracted."""
    return np.asarray(Image.open(name)).astype(int)


def differ(a: str, b: str) -> bool:
    """Whether two pictures differ anywhere."""
    return bool((pixels(a) != pixels(b)).any())


def record(name: str | Path) -> dict:
    """What a command wrote beside its picture."""
    return json.loads(Path(name).read_text(encoding="utf-8"))
