"""Scenes: a digit in one colour on a ground of another, with a texture; the tasks that turn one into another.

A picture is ``(3, 16, 16)`` in -1..1. A prompt is five words, one per slot, each an index or :data:`ANY`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from . import digits
from .digits import SIZE

TASKS = ("draw", "recolour", "background", "digit", "keep", "blend")
PALETTE = {
    "red": (0.7, -0.7, -0.7), "green": (-0.6, 0.4, -0.6), "blue": (-0.6, -0.4, 0.7), "yellow": (0.7, 0.6, -0.7),
    "cyan": (-0.5, 0.6, 0.7), "magenta": (0.7, -0.5, 0.6), "white": (0.75, 0.75, 0.75), "black": (-0.75, -0.75, -0.75),
}  # fmt: skip
COLOURS = tuple(PALETTE)
TEXTURES = ("plain", "rows", "columns", "checks")
SLOTS = {
    "task": TASKS, "digit": tuple(range(10)), "ink": COLOURS, "ground": COLOURS, "texture": TEXTURES,
}  # fmt: skip
ANY = -1  # the word of a slot that is left open
JITTER = 0.07  # standard deviation of a scene's own colours around the palette's, per channel
RELIEF = 0.22  # what a texture adds to the ground and takes from it
PERIOD = 4  # pixels
RGB = torch.tensor(list(PALETTE.values()))


@dataclass(frozen=True)
class Scenes:
    """What a batch of pictures shows: everything ``(B,)`` long but ``strokes (B, 1, 16, 16)``, ``jitter (B, 2, 3)`` and
    ``phase (B, 2)`` in pixels."""

    digit: torch.Tensor
    ink: torch.Tensor
    ground: torch.Tensor
    texture: torch.Tensor
    strokes: torch.Tensor
    jitter: torch.Tensor
    phase: torch.Tensor

    def where(self, condition: torch.Tensor, other: Scenes) -> Scenes:
        """``self`` in the rows where ``condition (B,)``, ``other`` elsewhere."""

        def choose(ours, theirs):
            return torch.where(condition.view(-1, *[1] * (ours.ndim - 1)), ours, theirs)

        return Scenes(*(choose(ours, vars(other)[name]) for name, ours in vars(self).items()))

    def background(self) -> torch.Tensor:
        """The pictures without their digits, ``(B, 3, 16, 16)``."""
        relief = RELIEF * patterns(self.phase)[torch.arange(len(self.texture)), self.texture]
        return self.colour("ground") + relief[:, None]

    def colour(self, part: str) -> torch.Tensor:
        """The colour ``(B, 3, 1, 1)`` of the "ink" or of the "ground"."""
        return (RGB[getattr(self, part)] + self.jitter[:, ("ink", "ground").index(part)])[..., None, None]

    def render(self) -> torch.Tensor:
        """The pictures, ``(B, 3, 16, 16)`` in -1..1."""
        return torch.lerp(self.background(), self.colour("ink"), self.strokes).clamp(-1, 1)


def patterns(phase: torch.Tensor) -> torch.Tensor:
    """Every texture at ``phase (B, 2)`` in pixels: ``(B, textures, 16, 16)`` of -1, 0 and 1."""
    step = (torch.arange(SIZE) + phase[..., None]) // (PERIOD // 2) % 2 * 2.0 - 1  # (B, 2, 16) of -1, 1
    rows, columns = step[:, 0, :, None].expand(-1, SIZE, SIZE), step[:, 1, None].expand(-1, SIZE, SIZE)
    return torch.stack([torch.zeros_like(rows), rows, columns, rows * columns], dim=1)


def draw(batch: int, generator: torch.Generator, held_out: bool = False) -> Scenes:
    """Random scenes of pictures for training, or of those and of the combinations of words that are held out.

    One texture of every (digit, ink, ground) is held out: no prompt to draw it occurs in training.
    """
    source = digits.load(held_out)
    digit, ink = (_words(count, batch, generator) for count in (10, len(COLOURS)))
    ground = _other_colour(generator, ink)
    texture = 3 * digit + ink + 5 * ground
    if not held_out:
        texture = texture + 1 + _words(len(TEXTURES) - 1, batch, generator)
    return Scenes(
        digit, ink, ground, texture % len(TEXTURES),
        strokes=digits.strokes(source.greys[source.pick(digit, generator)], generator),
        jitter=JITTER * torch.randn(batch, 2, 3, generator=generator),
        phase=_words(PERIOD, (batch, 2), generator),
    )  # fmt: skip


@dataclass(frozen=True)
class Examples:
    """A batch of one step: ``prompt (B, 5)`` long, ``reference (B, 3, 16, 16)`` or None, and the scenes of the target.

    ``source``: what the reference shows; equal to ``target`` where nothing is to change.
    """

    prompt: torch.Tensor
    target: Scenes
    source: Scenes
    reference: torch.Tensor | None


def to_draw(batch: int, generator: torch.Generator, held_out: bool = False) -> Examples:
    """Examples of text to image."""
    scenes = draw(batch, generator, held_out)
    task = torch.zeros(batch, dtype=torch.long)
    return Examples(describe(task, scenes), scenes, scenes, None)


def to_edit(task: torch.Tensor, generator: torch.Generator, held_out: bool = False) -> Examples:
    """Examples of the editing tasks ``task (B,)``, indices of :data:`TASKS` from 1."""
    source, other = (draw(len(task), generator, held_out) for _ in range(2))
    ink, ground = source.jitter.unbind(1)
    colour = _other_colour(generator, source.ink, source.ground)
    digit = torch.where(other.digit == source.digit, (source.digit + 1) % 10, other.digit)
    picture = digits.load(held_out)
    shape = digits.strokes(picture.greys[picture.pick(digit, generator)], generator)
    edits = {
        "recolour": replace(source, ink=colour, jitter=torch.stack([0 * ink, ground], 1)),
        "background": replace(source, ground=colour, texture=other.texture, jitter=torch.stack([ink, 0 * ground], 1)),
        "digit": replace(source, digit=digit, strokes=shape),
    }
    target = source
    for name, edited in edits.items():
        target = edited.where(task == TASKS.index(name), target)
    paste = replace(source, ground=colour, texture=other.texture, phase=other.phase).render()
    pasted = (task == TASKS.index("blend")).view(-1, 1, 1, 1) & box(source.strokes)
    reference = torch.where(pasted, paste, source.render())
    return Examples(describe(task, target), target, source, reference)


def describe(task: torch.Tensor, target: Scenes) -> torch.Tensor:
    """The full prompts ``(B, 5)`` of what ``target`` shows."""
    return torch.stack([task, target.digit, target.ink, target.ground, target.texture], dim=1)


def shorten(examples: Examples, generator: torch.Generator) -> torch.Tensor:
    """Prompts with words left open, as training sees them: what an edit leaves alone in half of the cases, words of a
    drawing in a tenth, everything but the task in a tenth (for guidance)."""
    prompt = examples.prompt
    before, now = (torch.stack([s.digit, s.ink, s.ground, s.texture], 1) for s in (examples.source, examples.target))
    chance = torch.rand(now.shape, generator=generator)
    left_open = chance < 0.1 if examples.reference is None else (chance < 0.5) & (before == now)
    left_open |= torch.rand(len(now), 1, generator=generator) < 0.1
    return torch.cat([prompt[:, :1], prompt[:, 1:].masked_fill(left_open, ANY)], dim=1)


def box(strokes: torch.Tensor, margin: int = 1) -> torch.Tensor:
    """The bounding boxes of ``strokes (B, 1, 16, 16)``, grown by ``margin``, bool."""
    covered = torch.nn.functional.max_pool2d((strokes > 0.05).float(), 2 * margin + 1, 1, margin) > 0
    rows, columns = covered.any(3, keepdim=True), covered.any(2, keepdim=True)
    return rows & columns


def _words(count: int, shape: int | tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(count, (shape,) if isinstance(shape, int) else shape, generator=generator)


def _other_colour(generator: torch.Generator, *taken: torch.Tensor) -> torch.Tensor:
    """A random colour per row that is none of ``taken``, each ``(B,)``."""
    chance = torch.rand(len(taken[0]), len(COLOURS), generator=generator)
    for colour in taken:
        chance.scatter_(1, colour[:, None], -1.0)
    return chance.argmax(1)
