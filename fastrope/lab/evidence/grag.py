"""GRAG: how much of the source is kept at each delta and lambda, and for comparison at each guidance scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import fastrope as fr

from .. import judge, scenes
from .findings import Findings, Row, outcomes, strip
from .report import BLUE, ORANGE, claim, curve, share, show_strips, table
from .studio import Studio, only

USES = ("editor", "classifier")  # models, whose digests are stored with the numbers
DELTAS = (0.5, 0.75, 1.0, 1.25, 1.5)
LAMBDAS = (0.5, 0.75, 1.0, 1.25, 1.5)
SCALES = (1.0, 2.0, 3.0, 4.0, 5.0)
GUIDANCE = 3.0  # while the other dials move
ON_VALUES = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class ValueDelta:
    """The rule of GRAG on the reference's values instead of its keys, as DCAG (arXiv 2602.18022) adds it."""

    delta: float

    def modulations(self, site: fr.Site) -> list[fr.BiasDelta]:
        """One group."""
        return [fr.BiasDelta(delta=self.delta, keys=site.tokens.reference(0), on="values")]


def measure(studio: Studio, samples: int, each) -> Findings:
    """Edits that ask for another digit, and for another colour, of held-out pictures."""
    rows, pictures = [], {}
    for task, slot in (("digit", "digit"), ("recolour", "ink")):
        generator = torch.Generator().manual_seed(3)
        edits = scenes.to_edit(torch.full((samples,), scenes.TASKS.index(task)), generator, held_out=True)
        prompt = only(edits.prompt, slot)
        settings = [("delta", x, fr.GRAG(delta=x), GUIDANCE) for x in DELTAS]
        if slot == "digit":
            settings += [("lambda", x, fr.GRAG(bias=x, delta=1), GUIDANCE) for x in LAMBDAS]
            settings += [("delta on values", x, ValueDelta(x), GUIDANCE) for x in ON_VALUES]
            settings += [("guidance", x, None, x) for x in SCALES]
            pictures["source"] = strip(edits.reference)
        drawn = {}
        for sweep, value, method, guidance in each(settings):
            neutral = method is None or value == 1
            key = None if neutral else method, guidance
            if key not in drawn:
                drawn[key] = studio.edit(prompt, edits.reference, [] if neutral else [method], guidance)
            made = drawn[key]
            seen = judge.digits(studio.see, made) if slot == "digit" else judge.colours(made)[0]
            rows.append(Row(f"{slot}, {sweep}", value, outcomes(
                asked=seen == getattr(edits.target, slot), source=seen == getattr(edits.source, slot),
                distance=judge.distances(made, edits.reference), layout=judge.layouts(made, edits.reference),
            )))  # fmt: skip
            if (slot, sweep) == ("digit", "delta"):
                pictures[f"delta {value:g}"] = strip(made)
    return Findings("grag", rows, pictures)


def evenness(rows: list[Row]) -> tuple[float, float]:
    """How evenly a dial acts over equal steps: the part of the whole change in mean distance that its largest step
    makes (at best 0.25 of four), and the share of single pictures' steps that go in the direction of the mean."""
    distance = np.array([row.outcomes["distance"] for row in rows])  # (values, samples)
    steps = np.diff(distance.mean(1))
    way = distance[-1].mean() - distance[0].mean()
    return float(np.abs(steps).max() / abs(way)), float((np.diff(distance, axis=0) * way > 0).mean())


MAIN = ("digit, delta", "digit, lambda", "digit, delta on values")
CAPTION = "GRAG: edits under delta and lambda, and samples for delta"


def text(found: Findings) -> str:
    """The section of the page."""
    columns = {"asked": "digit asked for", "source": "source's digit", "distance": "distance to the source",
               "layout": "layout like the source's"}  # fmt: skip
    ink = {"asked": "ink asked for", "source": "source's ink", "distance": "distance to the source"}
    low, one, high = (found.row("digit, delta", x) for x in (0.5, 1.0, 1.5))
    few, many = (found.row("digit, lambda", x) for x in (0.5, 1.5))
    even = {name: evenness(found.sweep(f"digit, {name}")) for name in ("delta", "guidance")}
    neither = 1 - high.mean("asked") - high.mean("source")
    keeps = high.mean("source") > low.mean("source") and high.mean("distance") < low.mean("distance")
    told = claim(keeps, "As published, a higher delta keeps more.", "A higher delta does not keep more.")
    steps, ways = zip(*even.values(), strict=True)
    evener = (
        f"By its largest step delta acts {claim(steps[0] < steps[1], 'more', 'less')} evenly than guidance, by the "
        f"direction of single steps {claim(ways[0] > ways[1], 'more', 'less')}; its whole effect is "
        f"{_change(found, 'delta') / _change(found, 'guidance'):.0f} times as large."
    )
    return f"""## GRAG: how much of the source is kept

The editor gets a picture and a prompt of one word: another digit. True guidance is {GUIDANCE:g}. `fr.GRAG(delta=...)`
decides between picture and word. *Digit asked for* means that the classifier finds the digit of the prompt, *source's
digit* that it finds the digit that was there before.

{table([r for r in found.rows if r.sweep in MAIN], columns)}

DCAG (arXiv 2602.18022) modulates both keys and values. The rows *delta on values* modulate values alone.

{told} From delta 0.5 to 1.5, the share of outputs with the source's digit goes from {share(low, "source")} to
{share(high, "source")}, and the distance to the source from {low.mean("distance"):.3f} to {high.mean("distance"):.3f}.
The edits succeed in {share(low, "asked")} at delta 0.5, in {share(one, "asked")} at 1 and in {share(high, "asked")} at
1.5, where {100 * neither:.0f} % of the pictures show neither digit. Lambda acts in another way. It adds one number per
query to all logits of the group, so it changes how much attention the source gets
([below](#attention-under-the-dials)), but not which of its tokens. From lambda 0.5 to 1.5, the distance goes from
{few.mean("distance"):.3f} to {many.mean("distance"):.3f}.

The same in another edit, where the prompt is one word for the colour of the ink. Here the source gives way at every
delta: the ink is as asked in {share(found.row("ink, delta", 1.5), "asked")} at delta 1.5.

{table(found.sweep("ink, delta"), ink, "delta")}

How evenly does delta act? For comparison, this is the guidance scale, the dial that users have without GRAG:

{table(found.sweep("digit, guidance"), columns, "guidance scale")}

Delta changes the mean distance by {_change(found, "delta"):.3f}. The largest of its four equal steps makes
{100 * even["delta"][0]:.0f} % of this change, and {100 * even["delta"][1]:.0f} % of the steps of single pictures go in
the same direction as the mean. Guidance changes it by {_change(found, "guidance"):.3f}, of which the largest step makes
{100 * even["guidance"][0]:.0f} %, and {100 * even["guidance"][1]:.0f} % of the steps go in the direction of the
mean. {evener}"""


def _change(found: Findings, dial: str) -> float:
    rows = found.sweep(f"digit, {dial}")
    return abs(rows[-1].mean("distance") - rows[0].mean("distance"))


def draw(found: Findings, figure) -> None:
    """Curves at the left, samples at the right."""
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    panels = left.subplots(1, 2, sharey=True)
    for axes, dial in zip(panels, ("delta", "lambda"), strict=True):
        rows = found.sweep(f"digit, {dial}")
        curve(axes, rows, "asked", "digit asked for", BLUE)
        curve(axes, rows, "source", "source's digit", ORANGE)
        axes.set_xlabel(dial)
        axes.set_ylim(-0.02, 1.02)
    panels[0].set_title("another digit is asked for")
    panels[0].set_ylabel("share of outputs")
    panels[0].legend(loc="center left")
    show_strips(right, found, {name: name for name in found.pictures})
