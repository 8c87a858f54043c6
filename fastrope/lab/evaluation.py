"""How good the shipped models are, on held-out prompts and pictures."""

from __future__ import annotations

import torch

from . import classifier, editor, judge, scenes, words
from .codes import Codebook


def evaluate(
    models: dict[str, torch.nn.Module], count: int = 500, steps: int = 16, guidance: float = 1.0
) -> dict[str, dict[str, torch.Tensor]]:
    """Outcomes by task: whether the digit and the colours of every picture are right, and for edits also the distance
    to the right answer.

    Args:
        models: "classifier", and those of "editor" and "author" that are evaluated.
        count: pictures per task.
        steps: denoising steps of the editor.
        guidance: guidance scale of both models.
    """
    see = models["classifier"]
    found = {"real digits": {"digit": classifier.recognised(see)}}
    generator = torch.Generator().manual_seed(2)
    drawn = scenes.to_draw(count, generator, held_out=True)
    found["real pictures"] = _judged(drawn.target.render(), drawn, see)
    if "editor" in models:
        pictures = editor.sample(models["editor"], drawn.prompt, generator, steps=steps, guidance=guidance)
        found["editor: draw"] = _judged(pictures, drawn, see)
        for index, task in enumerate(scenes.TASKS[1:], 1):
            edits = scenes.to_edit(torch.full((count,), index), generator, held_out=True)
            pictures = editor.sample(models["editor"], edits.prompt, generator, edits.reference, steps, guidance)
            distance = judge.distances(pictures, edits.target.render())
            found[f"editor: {task}"] = _judged(pictures, edits, see) | {"distance": distance}
    if "author" in models:
        pictures = write(models["author"], drawn.prompt, torch.Generator().manual_seed(3), guidance)
        found["author: draw"] = _judged(pictures, drawn, see)
    return found


def write(author, prompt: torch.Tensor, generator: torch.Generator, guidance: float = 1.0) -> torch.Tensor:
    """Pictures ``(B, 3, 16, 16)`` that the author makes of ``prompt (B, 5)``."""
    from ..bindings.llamagen import generate

    features = words.embed(prompt)[0]
    made = generate(author.transformer, features, guidance=guidance, top_k=0, generator=generator)
    return Codebook(author.codebook).decode(made.tokens)


def _judged(pictures: torch.Tensor, examples: scenes.Examples, see) -> dict[str, torch.Tensor]:
    ink, ground = judge.colours(pictures)
    return {
        "digit": judge.digits(see, pictures) == examples.target.digit,
        "colours": (ink == examples.target.ink) & (ground == examples.target.ground),
    }
