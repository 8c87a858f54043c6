"""The picture commands on the tiny pipeline, the files they read and those they make, in the current folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fastrope.cli import main


def edit(*words: str) -> int:
    return main(["edit", "--model", "tiny", "--steps", "4", *words])


def draw(*words: str, command: str = "style") -> int:
    return main([command, "--model", "tiny", "--steps", "3", *words])


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name)).astype(int)


def record(name: str) -> dict:
    return json.loads(Path(name).read_text())


def photo(name: str, size: tuple[int, int] = (40, 40), seed: int = 0) -> str:
    noise = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(name)
    return name


def mask(name: str, size: tuple[int, int] = (40, 40)) -> str:
    inside = np.zeros(size[::-1], dtype=np.uint8)
    inside[10:30, 10:20] = 255
    Image.fromarray(inside).save(name)
    return name
