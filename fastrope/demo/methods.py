"""The methods at work on the trained models of :mod:`fastrope.lab`: a row of pictures for each example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

import fastrope as fr

from .. import lab
from ..commands import ar_hosts
from ..commands.pipelines import Trained
from ..figures import Cell
from ..lab.judge import digits
from ..pictures import to_picture

DELTAS = (0.5, 0.8, 1.0, 1.2, 1.5)
S_HF = (1.0, 0.5, 0.25, 0.0)
BOOSTS = (1.0, 0.83, 0.5, 0.3)
TAUS = (0.5, 1.0, 4.0, float("inf"))


@dataclass(frozen=True)
class Show:
    """A method: what it is for, and a function from a device and a seed to one row of cells."""

    title: str
    text: str
    row: Callable[[torch.device, int], list[Cell]]


def named(title: str, picture) -> Cell:
    """A picture with the digit that the lab's classifier takes it for."""
    return Cell(picture, title, f"seen as {seen(picture)}")


def seen(picture) -> int:
    """The digit that the lab's classifier takes a picture for."""
    small = picture.resize((lab.CALL["width"], lab.CALL["height"]), 0)
    pixels = torch.from_numpy(np.asarray(small).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    return int(digits(lab.load("classifier"), pixels))


def grag(device: torch.device, seed: int) -> list[Cell]:
    """Another digit is asked for, with the dial from "follow the words" to "keep the picture"."""
    source = lab.pictures(1, seed)[0]
    words = f"make it a {(seen(source) + 3) % 10}"
    model = Trained(lab.pipeline(device), {})
    call, cells = model.call(words) | model.editing([source]), [named(f'source; "{words}"', source)]
    for delta in DELTAS:
        with fr.apply(model.pipe, fr.GRAG(delta=delta)):
            cells.append(named(f"delta {delta:g}", model.draw(call, seed)))
    return cells


def untwisting(device: torch.device, seed: int) -> list[Cell]:
    """A digit in the style of a picture that shows another one."""
    source = lab.pictures(1, seed)[0]
    words = f"a {(seen(source) + 3) % 10}"
    model = Trained(lab.pipeline(device, edit=False), {})
    size = dict(zip(("height", "width"), model.size([source], None, None), strict=True))
    call, noise = model.call(words) | size, torch.Generator().manual_seed(seed + 1)
    shared = size | {"num_inference_steps": model.settings.steps, "generator": noise}
    reference = fr.prepare_reference(model.pipe, source, **shared, **model.text("reference", ""))
    kept = fr.ReferenceCache(reference)
    cells = [named(f'reference; "{words}"', source), named("without it", model.draw(call, seed))]
    for high in S_HF:
        with fr.apply(model.pipe, fr.UntwistingRoPE(s_hf=high, s_lf=1.2, adain=0.0), reference=kept):
            cells.append(named(f"s_hf {high:g}", model.draw(call, seed)))
    return cells


def looserope(device: torch.device, seed: int) -> list[Cell]:
    """A pasted digit with a box of its own ground, to be blended in."""
    composite, original = lab.pasted(seed)
    model = Trained(lab.pipeline(device), {})
    call, method = model.call("blend") | model.editing([composite]), fr.LooseRoPE.from_images(composite, original)
    cells = [named('pasted; "blend"', composite), named("without LooseRoPE", model.draw(call, seed))]
    for boost in BOOSTS:
        with fr.apply(model.pipe, replace(method, boost=boost)):
            cells.append(named(f"boost {boost:g}", model.draw(call, seed)))
    return cells


def islock(device: torch.device, seed: int) -> list[Cell]:
    """A drawing of the autoregressive model, drawn again on another ground with its tokens as anchors."""
    host = ar_hosts.tiny(dict(guidance=2.0, top_k=0), device, torch.float32)
    generator, tokens = torch.Generator().manual_seed(seed), host.grid[0] * host.grid[1]
    digit = (3 + 2 * seed) % 10
    first, second = f"a red {digit} on white", f"a red {digit} on yellow"

    def draw(title: str, words: str, **matching: object):
        made = host.run([words], None, generator=generator, **matching).tokens
        return made, named(title, to_picture(title, host.decode(made)))

    (anchors, original), (_, plain) = draw(f'"{first}"', first), draw('"... on yellow", no anchors', second)
    cells = [original, plain]
    for tau in TAUS:
        matcher = fr.ISLock(candidates=8, tau=tau).matcher(host.codebook, num_tokens=tokens)
        cells.append(draw(f"tau {tau:g}", second, matcher=matcher, anchors=anchors)[1])
    return cells


SHOWS = {
    "grag": Show(
        "Edit with a dial: GRAG",
        "The model is asked to turn a digit into another one. Delta is a temperature inside the source picture. "
        "At 1 the words win already; well above 1 the source comes back, often as a mixture of both. Nothing else "
        "changes between the columns.",
        grag,
    ),
    "untwisting": Show(
        "Style without copying: Untwisting RoPE",
        "The words say which digit to draw; the reference shows another one. Plain sharing of its keys and values "
        "(s_hf 1) copies where the reference's ink is, and its colours. A lower s_hf weakens the frequencies that bind "
        "a query to its own place: the copy goes, and part of the style with it. On a model this small the asked-for "
        "digit does not always come.",
        untwisting,
    ),
    "looserope": Show(
        "Blend a paste: LooseRoPE",
        "A digit was pasted with a box of its own ground. This model was trained to blend such pastes, so the box is "
        "gone without LooseRoPE, too. A lower boost lets the paste go further: here, the digit fades a little.",
        looserope,
    ),
    "islock": Show(
        "An anchored edit: ISLock",
        "The autoregressive model draws a digit, then the same digit on another ground. The tokens of the first "
        "drawing are anchors: a token that is likely and near its anchor is taken. A larger tau keeps more of it, "
        "and at last blocks the edit.",
        islock,
    ),
}


def rows(name: str, device: torch.device, count: int) -> Iterator[list[Cell]]:
    """``count`` rows of a show, of seeds from 0."""
    return (SHOWS[name].row(device, seed) for seed in range(count))
