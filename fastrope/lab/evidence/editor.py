"""The editor itself: how often its pictures are what the prompt asks for."""

from __future__ import annotations

from . import models
from .findings import Findings
from .studio import Studio

USES = ("editor", "classifier")  # models, whose digests are stored with the numbers


def measure(studio: Studio, samples: int, each) -> Findings:
    """Success in every task."""
    return models.measure("editor", studio.editing.transformer, studio, samples, each)


def text(found: Findings) -> str:
    """The section of the page."""
    real = [row for row in found.rows if row.sweep.startswith("real")]
    tasks = sorted((row for row in found.rows if row not in real), key=lambda row: row.value)
    return f"""## The editor

The first two rows are real pictures, judged in the same way; every held-out digit is shown four times. Guidance above 1
is true guidance, whose negative prompt names the task and leaves all other words open. Distances are mean absolute
differences per channel, as a share of a pixel's range.

{models.table([*real, *tasks], ("digit", "colours", "distance"))}"""
