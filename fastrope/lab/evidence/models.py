"""The models themselves: what the classifier and the judge of colours find in their pictures."""

from __future__ import annotations

from ..evaluation import evaluate
from .findings import Findings, Row, outcomes
from .report import cell
from .studio import STEPS, Studio

SCALES = (1.0, 5.0)  # of guidance
COLUMNS = {"digit": "digit as asked", "colours": "both colours as asked", "distance": "distance to the right answer"}


def measure(name: str, model, studio: Studio, samples: int, each) -> Findings:
    """Success on held-out prompts and pictures, with and without guidance, twice ``samples`` of each task."""
    rows = []
    for scale in each(list(SCALES)):
        found = evaluate({"classifier": studio.see, name: model}, 2 * samples, STEPS, scale)
        real = {row.sweep for row in rows if row.sweep.startswith("real")}
        rows += [Row(task, scale, outcomes(**values)) for task, values in found.items() if task not in real]
    return Findings(name, rows)


def table(rows: list[Row], columns: tuple[str, ...]) -> str:
    """Tasks and guidance against outcomes, in Markdown."""
    lines = [f"| | guidance | {' | '.join(COLUMNS[name] for name in columns)} |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        scale = "" if row.sweep.startswith("real") else f"{row.value:g}"
        cells = [cell(row, name) if name in row.outcomes else "" for name in columns]
        lines.append(f"| {row.sweep.partition(': ')[2] or row.sweep} | {scale} | {' | '.join(cells)} |")
    return "\n".join(lines)
