"""Handwritten digits as anti-aliased strokes of 16 x 16 pixels: a new pose at every draw, a fixed split by picture.

The pictures are scikit-learn's ``load_digits`` (1797 of 8 x 8 greys), kept beside the weights so that nothing but torch
is needed to use them; ``python -m fastrope.lab digits`` makes that file again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

WEIGHTS = Path(__file__).parent / "weights"
PATH = WEIGHTS / "digits.safetensors"
SIZE = 16  # pixels per side
HELD_OUT = 360  # of the 1797 pictures
OVERSAMPLE = 3  # strokes are drawn at this multiple of SIZE, then averaged
EXTENT = 0.76  # share of a side that the 8 x 8 picture covers


@dataclass(frozen=True)
class Digits:
    """``greys (n, 8, 8)`` float32 in 0..1 and ``labels (n,)`` long, ordered by label, and where each label
    starts, ``starts (11,)``."""

    greys: torch.Tensor
    labels: torch.Tensor
    starts: torch.Tensor

    def pick(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Index of a random picture of each of ``labels (B,)``."""
        first, count = self.starts[labels], self.starts.diff()[labels]
        return first + (torch.rand(len(labels), generator=generator) * count).long()


@lru_cache
def load(held_out: bool = False) -> Digits:
    """The pictures for training, or those that no training sees."""
    from safetensors.torch import load_file

    stored = load_file(PATH)
    order = torch.randperm(len(stored["labels"]), generator=torch.Generator().manual_seed(0))
    order = order[:HELD_OUT] if held_out else order[HELD_OUT:]
    order = order[stored["labels"][order].argsort(stable=True)]
    labels = stored["labels"][order].long()
    starts = torch.searchsorted(labels, torch.arange(11))
    return Digits(stored["greys"][order].float() / 16, labels, starts)


def store() -> None:
    """Write ``digits.safetensors`` from scikit-learn."""
    from safetensors.torch import save_file
    from sklearn.datasets import load_digits

    found = load_digits()
    tensors = {"greys": torch.from_numpy(found.images), "labels": torch.from_numpy(found.target)}
    WEIGHTS.mkdir(exist_ok=True)
    save_file({name: tensor.to(torch.uint8).contiguous() for name, tensor in tensors.items()}, PATH)


def strokes(greys: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Coverage ``(B, 1, 16, 16)`` in 0..1 of ``greys (B, 8, 8)``; upright and centred without a generator.

    With one, every picture is turned, sheared, stretched and moved a little: up to 9 degrees and 1.3 pixels.
    """
    batch = len(greys)
    turn = torch.eye(2).expand(batch, 2, 2)
    move = torch.zeros(batch, 2)
    if generator is not None:
        angle, shear, wide, high, *move = (2 * torch.rand(6, batch, generator=generator) - 1).unbind(0)
        angle, shear = 0.16 * angle, 0.12 * shear
        wide, high = 1 + 0.08 * wide, 1 + 0.06 * high
        rows = (wide * angle.cos(), shear - angle.sin(), angle.sin() + shear, high * angle.cos())
        turn = torch.stack(rows, dim=-1).view(batch, 2, 2)
        move = 0.16 * torch.stack(move, dim=-1)
    grid = F.affine_grid(
        torch.cat([turn, move[..., None]], dim=-1) / EXTENT, [batch, 1, SIZE * OVERSAMPLE, SIZE * OVERSAMPLE], False
    )
    fine = F.grid_sample(greys[:, None], grid, mode="bicubic", align_corners=False)
    return F.avg_pool2d(((fine - 0.45) * 3 + 0.5).clamp(0, 1), OVERSAMPLE)
