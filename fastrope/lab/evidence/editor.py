"""The editor itself: how often it does what it is told."""

from __future__ import annotations

from . import models
from .findings import Findings
from .studio import Studio

USES = ("editor", "classifier")  # of the models, whose digests stand beside the numbers


def measure(studio: Studio, samples: int, each) -> Findings:
    """Of every task."""
    return models.measure("editor", studio.editing.transformer, studio, samples, each)


def text(found: Findings) -> str:
    """The section of the page."""
    real = [row for row in found.rows if row.sweep.startswith("real")]
    tasks = sorted((row for row in found.rows if row not in real), key=lambda row: row.value)
    return f"""## The editor

What the classifier recognises in real held-out digits bounds what it can find in drawn ones. Guidance above 1 is
`true_cfg_scale` of the pipeline, away from a prompt whose words are left open. Distances are mean absolute differences
per channel, as a share of a pixel's range. Every held-out real digit is shown four times.

{models.table([*real, *tasks], ("digit", "colours", "distance"))}"""
