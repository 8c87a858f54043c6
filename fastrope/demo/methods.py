"""The methods at work on the trained models of :mod:`fastrope.lab`: a row of pictures for each example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

import fastrope as fr
from fastrope import lab
from fastrope.lab.codes import Codebook
from fastrope.lab.judge import digits

from ..figures import Cell
from ..pictures import to_picture

DELTAS = (0.5, 0.8, 1.0, 1.2, 1.5)
S_HF = (1.0, 0.5, 0.25, 0.0)
BOOSTS = (1.0, 0.83, 0.6, 0.3)
TAUS = (0.5, 1.0, 4.0, float("inf"))


@dataclass(frozen=True)
class Show:
    """A method: what it is for, and a function from a device and a seed to one row of cells."""

    title: str
    text: str
    row: Callable[[torch.device, int], list[Cell]]


class Painter:
    """A pipeline of the lab, and what its pictures are named by."""

    def __init__(self, device: torch.device, edit: bool, seed: int, **call: object) -> None:
        self.pipe, self.seed, self.device = lab.pipeline(device, edit=edit), seed, device
        size = lab.CALL if edit else {n: lab.CALL[n] for n in ("height", "width", "num_inference_steps")}
        self.call = {**size, **{n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in call.items()}}

    def draw(self, title: str, *methods: object, **options: object) -> Cell:
        """The picture of a call under some methods."""
        with fr.apply(self.pipe, *methods, **options):
            made = self.pipe(**self.call | {"output_type": "pil"}, generator=torch.Generator().manual_seed(self.seed))
        return named(title, made.images[0])


def seen(picture) -> int:
    """The digit that the lab's classifier takes a picture for."""
    pixels = torch.from_numpy(np.asarray(picture).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    return int(digits(lab.load("classifier"), pixels))


def named(title: str, picture) -> Cell:
    """A picture with what it is taken for."""
    return Cell(picture, title, f"seen as {seen(picture)}")


def grag(device: torch.device, seed: int) -> list[Cell]:
    """Another digit is asked for, with the dial from "follow the words" to "keep the picture"."""
    source = lab.pictures(1, seed)[0]
    digit = (seen(source) + 3) % 10
    painter = Painter(device, True, seed, image=source, **lab.prompt("digit", digit=digit))
    drawn = [painter.draw(f"delta {delta:g}", fr.GRAG(delta=delta)) for delta in DELTAS]
    return [named(f'source; "make it a {digit}"', source), *drawn]


def untwisting(device: torch.device, seed: int) -> list[Cell]:
    """A digit in the style of a picture that shows another one."""
    source = lab.pictures(1, seed)[0]
    digit = (seen(source) + 3) % 10
    words = lab.prompt(digit=digit)
    painter = Painter(device, False, seed, **words)
    size = {name: painter.call[name] for name in ("height", "width", "num_inference_steps")}
    nothing = {name: x.to(device) for name, x in lab.prompt().items()}
    noise = torch.Generator().manual_seed(seed + 1)
    reference = fr.ReferenceCache(fr.prepare_reference(painter.pipe, source, **size, **nothing, generator=noise))
    drawn = [painter.draw(f"s_hf {high:g}", fr.UntwistingRoPE(s_hf=high, s_lf=1.2, adain=0.0), reference=reference)
             for high in S_HF]  # fmt: skip
    return [named(f'reference; "a {digit}"', source), painter.draw("without it"), *drawn]


def looserope(device: torch.device, seed: int) -> list[Cell]:
    """A pasted digit with a box of its own ground, to be blended in."""
    composite, original = lab.pasted(seed)
    painter = Painter(device, True, seed, image=composite, **lab.prompt("blend"))
    method = fr.LooseRoPE.from_images(composite, original)
    drawn = [painter.draw(f"boost {boost:g}", replace(method, boost=boost)) for boost in BOOSTS]
    return [named('pasted; "blend"', composite), painter.draw("without LooseRoPE"), *drawn]


def islock(device: torch.device, seed: int) -> list[Cell]:
    """A drawing of the autoregressive model, drawn again on another ground with its tokens as anchors."""
    from ..bindings.llamagen import generate

    author = lab.load("author").to(device)
    book, model = Codebook(author.codebook), author.transformer
    digit = (3 + 2 * seed) % 10
    first, second = (lab.prompt(digit=digit, ink="red", ground=ground)["prompt_embeds"].to(device)
                     for ground in ("white", "yellow"))  # fmt: skip
    settings, generator = dict(guidance=2.0, top_k=0), torch.Generator().manual_seed(seed)

    def cell(title: str, tokens: torch.Tensor) -> Cell:
        pixels = (book.decode(tokens)[0].float().cpu() / 2 + 0.5).clamp(0, 1)
        return named(title, to_picture(title, pixels))

    original = generate(model, first, generator=generator, **settings).tokens
    plain = generate(model, second, generator=generator, **settings).tokens
    cells = [cell(f'"a red {digit} on white"', original), cell('"... on yellow", no anchors', plain)]
    for tau in TAUS:
        matcher = fr.ISLock(candidates=8, tau=tau).matcher(book.codebook, num_tokens=model.config.num_tokens)
        made = generate(model, second, matcher=matcher, anchors=original, generator=generator, **settings)
        cells.append(cell(f"tau {tau:g}", made.tokens))
    return cells


SHOWS = {
    "grag": Show(
        "Edit with a dial: GRAG",
        "The model is asked to turn a digit into another one. Delta is a temperature inside the source picture: below "
        "1 the words win, above 1 the picture does. Nothing else changes between the columns.",
        grag,
    ),
    "untwisting": Show(
        "Style without copying: Untwisting RoPE",
        "The words say which digit to draw; the reference shows another one. Plain sharing of its keys and values "
        "(s_hf 1) copies the reference. A lower s_hf weakens the frequencies that bind a query to its own place: the "
        "shape is the asked-for one again, and less of the style is left.",
        untwisting,
    ),
    "looserope": Show(
        "Blend a paste: LooseRoPE",
        "A digit was pasted with a box of its own ground. Salient tokens hold on to their place, the others are let "
        "loose to look around; a lower boost lets more of them loose.",
        looserope,
    ),
    "islock": Show(
        "An anchored edit: ISLock",
        "The autoregressive model draws a digit, then the same digit on another ground. With the first drawing's tokens "
        "as anchors, a token that is likely and near its anchor is taken; a larger tau keeps more of the first drawing.",
        islock,
    ),
}


def rows(name: str, device: torch.device, count: int) -> Iterator[list[Cell]]:
    """``count`` rows of a show, of seeds from 0."""
    return (SHOWS[name].row(device, seed) for seed in range(count))
