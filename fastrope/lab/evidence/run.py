"""Measure every part and store what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from ..digits import WEIGHTS
from . import page
from .studio import STEPS, Studio

SAMPLES, QUICK = 64, 16


def measure(
    folder: Path,
    samples: int = SAMPLES,
    parts: Iterable[str] = page.PARTS,
    each: Callable[[str], Callable[[list], Iterable]] = lambda part: iter,
) -> None:
    """Write ``NAME.json`` of every part into ``folder``.

    Args:
        samples: pictures per setting.
        each: for the name of a part, a function that wraps the list of its settings (``tqdm``).
    """
    folder.mkdir(parents=True, exist_ok=True)
    studio = Studio()
    made = {
        "samples": samples, "steps": STEPS, "torch": str(torch.__version__).partition("+")[0],
    }  # fmt: skip
    sums = (WEIGHTS / "SHA256SUMS").read_text().splitlines()
    for part in parts:
        started = time.monotonic()
        found = page.module(part).measure(studio, samples, each(part))
        made["weights"] = [line for line in sums if line.split()[1].split(".")[0] in page.module(part).USES]
        replace(found, made=made | {"seconds": round(time.monotonic() - started)}).save(folder)
