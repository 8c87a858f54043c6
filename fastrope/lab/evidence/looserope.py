"""LooseRoPE: digits pasted in boxes of another ground: how much of the box stays, and whether the digit does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import torch

import fastrope as fr

from .. import judge, scenes, words
from ..models import CALL
from .findings import Findings, Row, outcomes, strip
from .report import BLUE, ORANGE, claim, curve, share, show_strips, table
from .studio import STEPS, Studio, as_task, only

USES = ("editor", "classifier")  # models, whose digests are stored with the numbers
FACTORS = (1.0, 0.5, 0.0)
BOOSTS = (0.4, 0.83, 1.2)
MOST = 48  # samples: masks per row are slow on a CPU
STEERED = 12  # of the samples: each runs alone
BY_FORMULA = 8  # of the samples: one factor per query and row is slow on a CPU


def settings() -> list[tuple[str, str, float | str, dict | None]]:
    """Tasks, sweeps, values and the dials behind them; None: no method."""
    held = {"range_growth": 1.0, "crop_decay": 1.0}  # the same factor in every step and at every query
    whole = [
        ("whole", "no method", None),
        ("whole", "as published", {}),
        ("whole", "mask grown by two", {"dilation": 2}),
        ("whole", "range factor alone", {"crop_curve": None}),
        ("whole", "crop factor alone", {"range_curve": (1.0, 1.0, 0.0)}),
    ]
    sweeps = [
        *(("boost", x, {"boost": x}) for x in BOOSTS),
        ("formula", 0.83, {"levels": None}),
        *(("range", x, {"range_curve": (x, x, 0.0), "crop_curve": None, **held}) for x in FACTORS),
        *(("crop", x, {"range_curve": (1.0, 1.0, 0.0), "crop_curve": (x, x, 0.0), **held}) for x in FACTORS),
    ]
    return [*(("keep", *x) for x in whole + sweeps), *(("blend", *x) for x in whole[:2])]


def measure(studio: Studio, samples: int, each) -> Findings:
    """Held-out pictures with a paste; the editor is told to blend them, or to keep them."""
    samples, generator = min(samples, MOST), torch.Generator().manual_seed(5)
    task = torch.full((samples,), scenes.TASKS.index("blend"))
    edits = scenes.to_edit(task, generator, held_out=True)
    clean, strokes = edits.target.render(), edits.source.strokes
    box = scenes.box(strokes)[:, 0]
    ring = box & (strokes[:, 0] < 0.05)
    prompts = {name: only(as_task(edits.prompt, name)) for name in ("keep", "blend")}

    def judged(made: torch.Tensor, count: int = samples) -> dict[str, list[float]]:
        return outcomes(
            ring=remaining(made, edits.reference[:count], clean[:count], ring[:count]),
            digit=judge.digits(studio.see, made) == edits.source.digit[:count],
            outside=judge.distances(made, clean[:count]),
        )

    def loose(dials: dict, rows: slice) -> list[fr.LooseRoPE]:
        composite = (edits.reference[rows] + 1) / 2
        return [fr.LooseRoPE.from_images(composite, mask=box[rows], **{"dilation": 0} | dials)]

    rows = [Row("pictures", "with the paste", judged(edits.reference)), Row("pictures", "without", judged(clean))]
    strips = {"with the paste": strip(edits.reference)}
    for task, sweep, value, dials in each(settings()):
        methods = [] if dials is None else partial(loose, dials)
        count, backend = (BY_FORMULA, "auto") if sweep == "formula" else (samples, "eager")
        made = studio.edit(prompts[task][:count], edits.reference[:count], methods, backend=backend)
        rows.append(Row(f"{task}, {sweep}", value, judged(made, len(made))))
        if task == "keep":
            strips[value if sweep == "whole" else f"{sweep} {value:g}"] = strip(made)
    steered = [steer(studio, prompts["keep"][n : n + 1], edits.reference[n], loose({}, slice(n, n + 1))[0], n)
               for n in range(min(STEERED, samples))]  # fmt: skip
    pictures, tries = zip(*steered, strict=True)
    rows.append(Row("keep, whole", "steered", judged(torch.cat(pictures), len(pictures))))
    return Findings("looserope", rows, strips, {"tries": tries})


def steer(studio: Studio, prompt, composite, method, seed: int) -> tuple[torch.Tensor, list[str]]:
    """The picture ``(1, 3, 16, 16)`` of ``fr.steer`` with its built-in judge, and the verdict of every try."""
    from PIL import Image

    tokens, pooled = words.embed(prompt)
    call = CALL | {"output_type": "pt", "num_inference_steps": STEPS, "image": composite[None]}
    shown = Image.fromarray(strip(composite[None])[0])
    steered = fr.steer(
        studio.editing, method, composite=shown, generator=torch.Generator().manual_seed(seed), prompt_embeds=tokens,
        pooled_prompt_embeds=pooled, **call,
    )  # fmt: skip
    return steered.images * 2 - 1, [t.verdict.kind if t.verdict else "last try" for t in steered.tries]


def remaining(made, composite, clean, ring) -> torch.Tensor:
    """Share of the paste's own ground left in ``ring (B, 16, 16)``: 1 as in ``composite``, 0 as in ``clean``."""
    way = (composite - clean) * ring[:, None]
    return ((made - clean) * way).sum((1, 2, 3)) / way.square().sum((1, 2, 3)).clamp(min=1e-6)


CAPTION = "LooseRoPE: the paste's own ground and its digit against the factors, and samples"
COLUMNS = {"ring": "paste's ground left in the ring", "digit": "digit recognised",
           "outside": "distance to the picture without the paste"}  # fmt: skip


def text(found: Findings) -> str:
    """The section of the page."""
    blend = [replace(row, value=f"told to blend, {row.value}") for row in found.sweep("blend, whole")]
    dials = [row for row in found.rows if row.sweep in ("keep, range", "keep, crop")]
    boosts = [*found.sweep("keep, boost"), *found.sweep("keep, formula")]
    starts = [len(tries) for tries in found.facts["tries"]]
    first = {name: _first(found.row("keep, whole", "as published"), n) for name, n in
             (("formula", BY_FORMULA), ("steered", len(starts)))}  # fmt: skip
    steered = found.row("keep, whole", "steered")
    verdicts = Counter(kind for tries in found.facts["tries"] for kind in tries)
    return f"""## LooseRoPE: pasted boxes

A digit is pasted into a picture in a box of another ground, and the editor gets the result as its reference. The
*ring* is the part of the box around the strokes. Its value is 1 if it still shows the paste's ground (neglect) and 0 if
it shows the scene's. If the digit is no longer recognised, that is suppression. The editor was trained to blend boxes
away when it is told to blend. To provoke neglect, it is told to keep the picture. Masks are not grown (`dilation=0`)
unless a row says so: the published two tokens, of 64 on a side, would be a quarter of a token here.

{table([*found.sweep("pictures"), *found.sweep("keep, whole"), *blend], COLUMNS)}

In the next table, one factor is the same for all queries of the paste and all steps of the method: the range factor r
on positions, or the crop factor g on logits.

{table(dials, COLUMNS)}

{_verdict(found)}

Boost with five levels (lower loosens more), and the continuous formula on the first {BY_FORMULA} pictures, on which
five levels leave {first["formula"].mean("ring"):.3f} of the ring at the same boost, and
{share(first["formula"], "digit")} of the digits are recognised:

{table(boosts, COLUMNS)}

`fr.steer` with the built-in judge ran on {len(starts)} of the pictures, with {sum(starts) / len(starts):.1f} starts on
average. Verdicts: {", ".join(f"{kind} {count}" for kind, count in verdicts.most_common())}. On the same pictures,
{first["steered"].mean("ring"):.2f} of the ring is left without steering and {steered.mean("ring"):.2f} with it.
{starts.count(1)} of them were accepted at the first start: the judge accepts a paste that has moved by 0.15 of the way
to its background (`RegionJudge(unchanged=...)`)."""


def _first(row: Row, count: int) -> Row:
    """The row of the first samples alone."""
    return replace(row, outcomes={name: values[:count] for name, values in row.outcomes.items()})


def _verdict(found: Findings) -> str:
    none, published, ranges, crops = (
        found.row("keep, whole", name)
        for name in ("no method", "as published", "range factor alone", "crop factor alone")
    )
    low, zero, half = found.row("keep, boost", 0.4), found.row("keep, range", 0.0), found.row("keep, range", 0.5)
    cropped = found.row("keep, crop", 0.0)
    told, helped = (found.row("blend, whole", name) for name in ("no method", "as published"))
    blends = published.mean("ring") < none.interval("ring")[0]
    alone = claim(
        2 * (none.mean("ring") - zero.mean("ring")) > none.mean("ring") - cropped.mean("ring"),
        "The range factor alone blends, too",
        "**The range factor alone does little on this model**",
    )
    weakly = claim(published.mean("ring") < 0.5, "", ", but weakly")
    act = claim(blends, f"The curves act in the published direction{weakly}", "The curves do not blend")
    reason = claim(
        zero.mean("ring") > 0.5,
        "At r = 0 the queries of the paste see no positions in the reference while the method is active. What is left "
        "of the ring was then found by content: told to keep, this model hardly needs positions.",
        "",
    )
    return f"""{act}: the ring goes from {none.mean("ring"):.2f} to {published.mean("ring"):.2f} at the default boost
and to {low.mean("ring"):.2f} at boost 0.4. The digit is recognised in {share(none, "digit")},
{share(published, "digit")} and {share(low, "digit")}, and in {share(found.row("pictures", "with the paste"), "digit")}
of the pictures before. The crop factor alone brings the ring to {crops.mean("ring"):.2f}; held at 0, it brings it to
{cropped.mean("ring"):.2f}, and the digit is recognised in {share(cropped, "digit")}. {alone}: the ring is at
{ranges.mean("ring"):.2f} with the published curve, at {half.mean("ring"):.2f} with r = 0.5, and at
{zero.mean("ring"):.2f} with r = 0, where the digit is recognised in {share(zero, "digit")}. {reason} When told to
blend, this editor leaves {told.mean("ring"):.2f} of the ring without the method and {helped.mean("ring"):.2f} with
it."""


def draw(found: Findings, figure) -> None:
    """Curves at the left, samples at the right."""
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    panels = left.subplots(1, 2, sharey=True)
    for axes, dial, title in zip(panels, ("range", "crop"), ("range factor r", "crop factor g"), strict=True):
        rows = found.sweep(f"keep, {dial}")
        curve(axes, rows, "ring", "paste's ground left in the ring", ORANGE)
        curve(axes, rows, "digit", "digit recognised (share)", BLUE)
        axes.set_xlabel(title)
        axes.set_title(f"{title}, told to keep")
        axes.set_ylim(-0.05, 1.05)
    panels[0].legend(loc="lower right")
    names = ["with the paste", "no method", "as published", "range 0.5", "range 0", "crop 0"]
    show_strips(right, found, {name: name for name in names})
