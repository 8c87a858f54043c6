"""How good the shipped models are, on prompts and pictures that no training saw."""

from __future__ import annotations

import torch

from . import classifier, editor, judge, scenes, words
from .codes import Codebook


def evaluate(models: dict[str, torch.nn.Module], count: int = 500, steps: int = 16, guidance: float = 1.0) -> dict:
    """Shares of success in 0..1, by name.

    Args:
        models: "classifier", and of "editor" and "author" what is to be judged.
        count: pictures per task.
        steps: of the editor.
        guidance: of both.
    """
    see, found = models["classifier"], {}
    found["real digits recognised"] = classifier.accuracy(see)
    generator = torch.Generator().manual_seed(2)
    drawn = scenes.to_draw(count, generator, held_out=True)
    found["colours judged right on real pictures"] = _colours(drawn.target.render(), drawn.target)
    if "editor" in models:
        pictures = editor.sample(models["editor"], drawn.prompt, generator, steps=steps, guidance=guidance)
        found |= _judged("editor: draw", pictures, drawn, see)
        for index, task in enumerate(scenes.TASKS[1:], 1):
            edits = scenes.to_edit(torch.full((count,), index), generator, held_out=True)
            pictures = editor.sample(models["editor"], edits.prompt, generator, edits.reference, steps, guidance)
            found |= _judged(f"editor: {task}", pictures, edits, see)
            distance = (pictures - edits.target.render()).abs().mean()
            found[f"editor: {task}, mean distance to the target"] = distance.item()
    if "author" in models:
        found |= _judged("author: draw", write(models["author"], drawn.prompt, generator, guidance), drawn, see)
    return found


def write(author, prompt: torch.Tensor, generator: torch.Generator, guidance: float = 1.0) -> torch.Tensor:
    """Pictures ``(B, 3, 16, 16)`` that the author makes of ``prompt (B, 5)``."""
    from ..bindings.llamagen import generate

    features = words.embed(prompt)[0]
    made = generate(author.transformer, features, guidance=guidance, top_k=0, generator=generator)
    return Codebook(author.codebook).decode(made.tokens)


def _judged(name: str, pictures: torch.Tensor, examples: scenes.Examples, see) -> dict[str, float]:
    digit = judge.digits(see, pictures) == examples.target.digit
    return {
        f"{name}, digit": digit.float().mean().item(),
        f"{name}, both colours": _colours(pictures, examples.target),
    }


def _colours(pictures: torch.Tensor, shown: scenes.Scenes) -> float:
    ink, ground = judge.colours(pictures)
    return ((ink == shown.ink) & (ground == shown.ground)).float().mean().item()
