"""ISLock: pictures of the author, edited by another prompt: does the edit succeed, and does the structure stay?"""

from __future__ import annotations

import numpy as np
import torch

import fastrope as fr

from .. import judge, scenes
from .findings import Findings, Row, outcomes, strip
from .report import BLUE, GREEN, claim, curve, share, show_strips, table
from .studio import TOKENS, Studio

USES = ("author", "classifier")  # models, whose digests are stored with the numbers
GUIDANCE = 2.0
TAUS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
TAU, CANDIDATES, ALPHA = 4.0, 8, 0.6  # the paper's K is 150 of 16384 codes: one in a hundred
COUNTS = (1, 4, 8, 16, 64)
NARROW = 4  # the fixed window that is compared with the shrinking one
ALPHAS = (0.0, 0.3, 0.6, 0.9)
EDITS = ("digit", "ground")
GREEDY = "prompt change, likeliest tokens"


def settings() -> list[tuple[str, float | str, fr.ISLock | None]]:
    """Sweeps, values and the ISLock that is used; None: the new prompt alone."""

    def lock(candidates=CANDIDATES, alpha=ALPHA, tau=TAU):
        return fr.ISLock(candidates=candidates, alpha=alpha, tau=tau)

    return [
        ("whole", "prompt change", None),
        ("whole", GREEDY, None),
        *(("tau", x, lock(tau=x)) for x in TAUS),
        *(("K", x, lock(candidates=x, alpha=0.0)) for x in COUNTS),
        *(("alpha", x, lock(alpha=x)) for x in ALPHAS),
    ]


def measure(studio: Studio, samples: int, each) -> Findings:
    """One word of the prompt is changed: the digit, or the colour of the ground."""
    shown = scenes.draw(samples, torch.Generator().manual_seed(6), held_out=True)
    prompt = scenes.describe(torch.zeros(samples, dtype=torch.long), shown)
    original = studio.write(prompt, guidance=GUIDANCE).tokens
    before = studio.codebook.decode(original)
    rows, strips = [], {"original": strip(before)}
    for slot, (sweep, value, lock) in each([(slot, setting) for slot in EDITS for setting in settings()]):
        changed = prompt.clone()
        changed[:, list(scenes.SLOTS).index(slot)] = _other(shown, slot)
        options = {"guidance": GUIDANCE, "top_k": int(value == GREEDY)}
        if lock is not None:
            matcher = lock.matcher(studio.author.codebook, num_tokens=TOKENS)
            options |= {"matcher": matcher, "anchors": original}
        result = studio.write(changed, seed=1000, **options)
        made = studio.codebook.decode(result.tokens)
        ground = judge.colours(made)[1]
        digit = judge.digits(studio.see, made)
        wanted = changed[:, 1] if slot == "digit" else changed[:, 3]
        rows.append(Row(f"{slot}, {sweep}", value, outcomes(
            asked=(digit if slot == "digit" else ground) == wanted, digit=digit == judge.digits(studio.see, before),
            layout=judge.layouts(made, before), distance=judge.distances(made, before),
            kept=(result.tokens == original).float().mean(1),
        )))  # fmt: skip
        if sweep in ("whole", "tau"):
            strips[f"{slot}, {value}" if sweep == "whole" else f"{slot}, tau {value:g}"] = strip(made)
    return Findings("islock", rows, strips)


def _other(shown: scenes.Scenes, slot: str) -> torch.Tensor:
    """Another word for every picture: the next digit but two; the next colour that is not the ink's."""
    if slot == "digit":
        return (shown.digit + 3) % 10
    colour = (shown.ground + 1) % len(scenes.COLOURS)
    return torch.where(colour == shown.ink, (colour + 1) % len(scenes.COLOURS), colour)


CAPTION = "ISLock: edit and structure against tau, and samples"
COLUMNS = {"asked": "asked for", "layout": "layout like the original's", "distance": "distance to the original",
           "kept": "tokens kept"}  # fmt: skip


def text(found: Findings) -> str:
    """The section of the page."""
    plain = {slot: found.row(f"{slot}, whole", "prompt change") for slot in EDITS}
    tables = {slot: [*found.sweep(f"{slot}, whole"), *found.sweep(f"{slot}, tau")] for slot in EDITS}
    ground = COLUMNS | {"digit": "original's digit"}
    windows = [row for row in found.rows if row.sweep in ("ground, K", "ground, alpha")]
    return f"""## ISLock: another prompt, the same structure

The author draws a picture. Then one word of its prompt changes, and it draws again with other noise. ISLock draws K
candidates for every token and takes the one nearest to the token of the original, if its distance is at most tau. This
is the squared distance between codes, here patches of 12 numbers, so values of tau do not carry over to other models.
Where no candidate is near enough, the likeliest token is taken; the second row of the tables takes it everywhere.
K is {CANDIDATES} of 512 codes (the paper's 150 of 16384 are about one in a hundred), alpha is {ALPHA}, guidance
{GUIDANCE:g}.

The prompt names another colour of the ground; the digit should stay:

{table(tables["ground"], ground)}

The prompt names another digit; now structure and edit contradict each other:

{table(tables["digit"], COLUMNS)}

{_summary(found, plain)}

The window of candidates: K at every position (alpha = 0), and a window of {CANDIDATES} that shrinks (tau = {TAU:g}):

{table(windows, ground)}

{_window(found)}"""


def _summary(found: Findings, plain: dict[str, Row]) -> str:
    ground, digit = ({x: found.row(f"{slot}, tau", x) for x in TAUS} for slot in ("ground", "digit"))
    some, most = ground[1.0], ground[TAUS[-1]]
    closer = all(rows[TAUS[-1]].mean("distance") < rows[1.0].mean("distance") < plain[slot].mean("distance")
                 for slot, rows in (("ground", ground), ("digit", digit)))  # fmt: skip
    told = claim(
        closer, "As published, a larger tau stays closer to the original.", "A larger tau is not always closer."
    )
    return f"""{told} For the ground, the distance falls from
{plain["ground"].mean("distance"):.3f} without ISLock to {some.mean("distance"):.3f} at tau = 1 and
{most.mean("distance"):.3f} at {TAUS[-1]:g}; for the digit, from {plain["digit"].mean("distance"):.3f} to
{digit[1.0].mean("distance"):.3f} and {digit[TAUS[-1]].mean("distance"):.3f}. At tau = 1 the new ground is found in
{share(some, "asked")} ({share(plain["ground"], "asked")} without ISLock), and the layouts correlate by
{some.mean("layout"):.2f} ({plain["ground"].mean("layout"):.2f}); at tau = {TAUS[-1]:g} in {share(most, "asked")}, by
{most.mean("layout"):.2f}. For the ground, a smaller distance mostly means that the edit failed: among pictures with the
new ground it is {_of_successes(ground[TAU]):.2f} at tau = {TAU:g}, and {_of_successes(plain["ground"]):.2f} without
ISLock. The digit, which should stay, is recognised in {share(plain["ground"], "digit")} without ISLock, and in
{share(ground[TAU], "digit")} at tau = {TAU:g}, where many pictures are mixtures. A digit cannot change while its layout
stays, so there structure costs successful edits."""


def _of_successes(row: Row) -> float:
    """Mean distance of the edits that succeeded."""
    pairs = zip(row.outcomes["distance"], row.outcomes["asked"], strict=True)
    return float(np.mean([distance for distance, asked in pairs if asked]))


def _window(found: Findings) -> str:
    fixed, shrinking = found.row("ground, K", CANDIDATES), found.row("ground, alpha", ALPHA)
    narrow = found.row("ground, K", NARROW)
    shown = claim(
        narrow.mean("asked") >= shrinking.mean("asked") and narrow.mean("layout") > shrinking.interval("layout")[0],
        "is not shown here",
        "is not contradicted here",
    )
    return f"""With a window of {CANDIDATES} that shrinks, the new ground is found in {share(shrinking, "asked")}, with
a fixed one in {share(fixed, "asked")}; layouts correlate with the original's by {shrinking.mean("layout"):.2f} and
{fixed.mean("layout"):.2f}. A fixed window of {NARROW} finds it in {share(narrow, "asked")}, with layouts at
{narrow.mean("layout"):.2f}. The paper reports the best ratio of edit to structure with its dynamic window. This
{shown}:
every window trades one for the other."""


def draw(found: Findings, figure) -> None:
    """Curves at the left, samples at the right."""
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    panels = left.subplots(1, 2, sharey=True)
    for axes, slot in zip(panels, EDITS, strict=True):
        rows = found.sweep(f"{slot}, tau")
        places = range(len(rows))
        curve(axes, rows, "asked", f"{slot} asked for", BLUE, places)
        curve(axes, rows, "layout", "layout like the original's", GREEN, places)
        plain = found.row(f"{slot}, whole", "prompt change")
        for outcome, colour in (("asked", BLUE), ("layout", GREEN)):
            axes.axhline(plain.mean(outcome), color=colour, linestyle=":", linewidth=1.2)
        axes.set_xticks(places, [f"{row.value:g}" for row in rows])
        axes.set_xlabel("tau")
        axes.set_title(f"another {slot}")
        axes.set_ylim(-0.02, 1.2)
        axes.legend(loc="upper left")
    panels[0].set_title("another digit (dotted: prompt change)")
    names = ["original", *(name for name in found.pictures if name.startswith("ground"))]
    show_strips(right, found, {name: name.removeprefix("ground, ") for name in names})
