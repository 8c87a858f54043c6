"""The author itself: how often it does what it is told."""

from __future__ import annotations

from . import models
from .findings import Findings
from .studio import Studio

USES = ("author", "classifier")  # of the models, whose digests stand beside the numbers


def measure(studio: Studio, samples: int, each) -> Findings:
    """Text to image."""
    return models.measure("author", studio.author, studio, samples, each)


def text(found: Findings) -> str:
    """The section of the page."""
    drawn = [row for row in found.rows if not row.sweep.startswith("real")]
    return f"""## The author

The autoregressive model for ISLock: 64 codes of 2 x 2 pixels, drawn one after the other.

{models.table(drawn, ("digit", "colours"))}"""
