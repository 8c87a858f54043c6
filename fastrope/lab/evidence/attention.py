"""Attention while the dials move: its mass on the reference and the distance it spans, by layer and by step."""

from __future__ import annotations

import torch

import fastrope as fr

from .. import scenes
from .findings import Findings, Row
from .report import BLUE, GREEN, ORANGE
from .studio import Studio, only

USES = ("editor",)  # models, whose digests are stored with the numbers
SAMPLES = 16  # at most; one call per setting
HELD = {"crop_curve": None, "range_growth": 1.0, "dilation": 0}


def settings(composite: torch.Tensor, box: torch.Tensor) -> list[tuple[str, float | str, list]]:
    """Sweeps, values and the methods that are applied."""

    def loose(r: float) -> fr.LooseRoPE:
        return fr.LooseRoPE.from_images(composite, mask=box, range_curve=(r, r, 0.0), **HELD)

    def untwisted(high: float) -> fr.UntwistingRoPE:
        return fr.UntwistingRoPE(s_hf=high, s_lf=1.0, adain=0.0, reference=0)

    return [
        *(("GRAG delta", x, [fr.GRAG(delta=x)]) for x in (0.5, 1.0, 1.5)),
        *(("GRAG lambda", x, [fr.GRAG(bias=x, delta=1)]) for x in (0.5, 1.0, 1.5)),
        *(("LooseRoPE range factor", x, [loose(x)]) for x in (0.0, 0.5, 1.0)),
        *(("Untwisting RoPE s_hf", x, [untwisted(x)]) for x in (0.0, 0.5, 1.0)),
    ]


def measure(studio: Studio, samples: int, each) -> Findings:
    """The target's queries, in edits that ask for another digit; for LooseRoPE, in edits that blend a paste."""
    count, rows = min(samples, SAMPLES), []
    runs = {}
    for task in ("digit", "blend"):
        index = torch.full((count,), scenes.TASKS.index(task))
        runs[task] = scenes.to_edit(index, torch.Generator().manual_seed(8), held_out=True)
    pasted = runs["blend"]
    box = scenes.box(pasted.source.strokes)[:, 0]
    for sweep, value, methods in each(settings((pasted.reference + 1) / 2, box)):
        edits = pasted if sweep.startswith("Loose") else runs["digit"]
        prompt = only(edits.prompt, *(() if edits is pasted else ("digit",)))
        with fr.apply(studio.editing, *methods) as handle, handle.inspect() as record:
            studio.call(prompt, edits.reference)
        found = {}
        for what in ("mass", "distance"):
            for by in ("layer", "step"):
                for group, values in record.mean(what, by).items():
                    found[f"{what} on {group} by {by}"] = [round(v, 4) for v in values.values()]
        rows.append(Row(sweep, value, found))
    return Findings("attention", rows)


CAPTION = "Attention on the reference by layer and by step, as the dials move"
GROUP = "reference 0"


def text(found: Findings) -> str:
    """The section of the page."""
    lines = ["| method and dial | value | mass on text | on the target | on the reference | distance on it |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in found.rows:
        mass = [row.mean(f"mass on {group} by layer") for group in ("text", "target", GROUP)]
        shares = [f"{100 * x:.1f} %" for x in mass]
        lines.append(f"| {row.sweep} | {row.value:g} | {' | '.join(shares)} | {_distance(row):.2f} |")
    rows = "\n".join(lines)
    return f"""## Attention under the dials

`handle.inspect()` measures the editor: the share of the target's attention on each group of tokens, and the distance
between a query and the keys of the reference that it attends to (root mean square, in tokens). Both are means over
layers and steps. GRAG and Untwisting RoPE (here on the host's own reference) act in edits that ask for another digit.
LooseRoPE, with one range factor for the whole paste, acts in edits that blend it. A call holds all {SAMPLES} pictures,
so there are no intervals over samples. Guidance is 1.

{rows}

{_summary(found)}"""


def _distance(row: Row) -> float:
    return row.mean(f"distance on {GROUP} by layer")


def _summary(found: Findings) -> str:
    dials = dict.fromkeys(row.sweep for row in found.rows)
    lines = []
    for dial in dials:
        rows = sorted(found.sweep(dial), key=lambda row: row.value)
        values = ", ".join(f"{row.value:g}" for row in rows)
        mass = ", ".join(f"{100 * row.mean(f'mass on {GROUP} by layer'):.0f} %" for row in rows)
        far = ", ".join(f"{_distance(row):.2f}" for row in rows)
        lines.append(f"* {dial} {values}: mass on the reference {mass}; distance {far} tokens.")
    even = "Attention that is spread evenly over the 8 x 8 tokens has a distance of 4.58. LooseRoPE ends after step 9."
    return "\n".join(lines) + f"\n\n{even}"


def draw(found: Findings, figure) -> None:
    """Mass and distance by layer, then by step; one column per dial, a line per value."""
    dials = list(dict.fromkeys(row.sweep for row in found.rows))
    kinds = [(what, by) for by in ("layer", "step") for what in ("mass", "distance")]
    panels = figure.subplots(len(kinds), len(dials), sharey="row")
    for column, dial in zip(panels.T, dials, strict=True):
        for row, colour in zip(found.sweep(dial), (BLUE, GREEN, ORANGE), strict=True):
            for axes, (what, by) in zip(column, kinds, strict=True):
                values = row.outcomes[f"{what} on {GROUP} by {by}"]
                axes.plot(range(len(values)), values, marker="o", markersize=3, color=colour, label=f"{row.value:g}")
                axes.set_xlabel(by)
        column[0].set_title(dial)
        column[0].legend()
    for axes, (what, _) in zip(panels[:, 0], kinds, strict=True):
        axes.set_ylabel({"mass": "mass on the reference", "distance": "distance, tokens"}[what])
