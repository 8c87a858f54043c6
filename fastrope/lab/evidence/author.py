"""The author itself: how often it draws what the prompt names."""

from __future__ import annotations

from . import models
from .findings import Findings
from .studio import Studio

USES = ("author", "classifier")  # models, whose digests are stored with the numbers


def measure(studio: Studio, samples: int, each) -> Findings:
    """How often pictures show what the prompt names."""
    return models.measure("author", studio.author, studio, samples, each)


def text(found: Findings) -> str:
    """The section of the page."""
    drawn = [row for row in found.rows if not row.sweep.startswith("real")]
    return f"""## The author

The author is the autoregressive model for ISLock. It draws 64 codes of 2 x 2 pixels, one after the other.

{models.table(drawn, ("digit", "colours"))}"""
