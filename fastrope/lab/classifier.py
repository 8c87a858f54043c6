"""A classifier of digits in any colours. It judges what the lab's models draw, and was trained separately."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from . import digits, scenes
from .training import Job

BATCH = 128
WIDTH = 48


class Classifier(nn.Module):
    """Pictures ``(B, 3, 16, 16)`` in -1..1 to logits ``(B, 10)``. A picture's own colours are whitened away first."""

    def __init__(self):
        super().__init__()
        w = WIDTH
        self.layers = nn.Sequential(
            nn.Conv2d(3, w, 3, padding=1), nn.GroupNorm(8, w), nn.GELU(),
            nn.Conv2d(w, w, 3, padding=1), nn.GroupNorm(8, w), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(w, 2 * w, 3, padding=1), nn.GroupNorm(8, 2 * w), nn.GELU(),
            nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.GroupNorm(8, 2 * w), nn.GELU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(2 * w * 16, 10),
        )  # fmt: skip

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, 10)`` of ``pictures (B, 3, 16, 16)``."""
        return self.layers(whitened(pictures))


def whitened(pictures: torch.Tensor) -> torch.Tensor:
    """Every picture minus its mean colour, at unit variance over all channels."""
    centred = pictures - pictures.mean((2, 3), keepdim=True)
    return centred / centred.std((1, 2, 3), keepdim=True).clamp(min=1e-3)


def losses(model, generator: torch.Generator, device: torch.device) -> Iterator[torch.Tensor]:
    """The loss on digits in random colours, on grounds of any texture, more or less blurred and noisy."""
    shown = scenes.draw(BATCH, generator)
    pictures = vivid(shown, generator)
    logits = model(pictures.to(device))
    yield F.cross_entropy(logits, shown.digit.to(device), label_smoothing=0.05)


def vivid(shown: scenes.Scenes, generator: torch.Generator) -> torch.Tensor:
    """``shown`` with a random palette, softened and with noise added: ``(B, 3, 16, 16)``."""
    batch = len(shown.digit)
    ink, ground = (2 * torch.rand(2, batch, 3, 1, 1, generator=generator) - 1).unbind(0)
    apart = (ink - ground).abs().amax(1, keepdim=True) > 0.5
    ink = torch.where(apart, ink, -ground.sign() * (0.4 + 0.6 * ink.abs()))
    relief = shown.background() - shown.colour("ground")
    contrast = 1.5 * torch.rand(batch, 1, 1, 1, generator=generator)
    pictures = torch.lerp(ground + contrast * relief, ink, shown.strokes)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = torch.lerp(pictures, soft, torch.rand(batch, 1, 1, 1, generator=generator) ** 2)
    noise = 0.25 * torch.rand(batch, 1, 1, 1, generator=generator) ** 2
    return (pictures + noise * torch.randn(pictures.shape, generator=generator)).clamp(-1, 1)


@torch.no_grad()
def recognised(model, repeats: int = 4) -> torch.Tensor:
    """Which of the held-out digits the model recognises, in random colours and poses, each ``repeats`` times: bool."""
    held_out = digits.load(held_out=True)
    generator = torch.Generator().manual_seed(1)
    right = []
    for _ in range(repeats):
        shown = scenes.draw(len(held_out.labels), generator, held_out=True)
        strokes = digits.strokes(held_out.greys, generator)
        shown = replace(shown, strokes=strokes, digit=held_out.labels)
        right.append(model(shown.render()).argmax(1) == held_out.labels)
    return torch.cat(right)


JOB = Job("classifier", Classifier, losses, samples=BATCH, decay=0.998)
