"""The models themselves: what the classifier and the judges of colours find in what they make."""

from __future__ import annotations

from ..evaluation import evaluate
from .findings import Findings, Row, outcomes
from .studio import STEPS, Studio
from .telling import cell

USES = ("editor", "author", "classifier")  # of the models, whose digests stand beside the numbers
SCALES = (1.0, 3.0)  # of guidance
COLUMNS = {"digit": "digit as asked", "colours": "both colours as asked", "distance": "distance to the right answer"}


def measure(studio: Studio, samples: int, each) -> Findings:
    """Success on held-out prompts and pictures, with and without guidance."""
    models = {"classifier": studio.see, "editor": studio.editing.transformer, "author": studio.author}
    rows = []
    for scale in each(list(SCALES)):
        found = evaluate(models, 2 * samples, STEPS, scale)
        known = {row.sweep for row in rows if row.sweep.startswith("real")}
        rows += [Row(name, scale, outcomes(**values)) for name, values in found.items() if name not in known]
    return Findings("models", rows)


def text(found: Findings) -> str:
    """The section of the page."""
    lines = [f"| | guidance | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in sorted(found.rows, key=lambda row: not row.sweep.startswith("real")):
        scale = "" if row.sweep.startswith("real") else f"{row.value:g}"
        told = [cell(row, name) if name in row.outcomes else "" for name in COLUMNS]
        lines.append(f"| {row.sweep} | {scale} | {' | '.join(told)} |")
    rows = "\n".join(lines)
    return f"""## The models

What the classifier recognises in real held-out digits bounds what it can find in drawn ones. Guidance above 1 is
`true_cfg_scale` of the pipeline, or the autoregressive model's own: away from a prompt whose words are left open.
Distances are mean absolute differences per channel, as a share of a pixel's range. Twice the samples of the other
sections, four times every held-out digit.

{rows}"""
