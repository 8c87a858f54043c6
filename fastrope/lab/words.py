"""Prompts as five fixed random embeddings, one word per slot, in the place of a text encoder."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..checks import require
from .scenes import ANY, SLOTS

CHANNELS = 32


@lru_cache
def table() -> torch.Tensor:
    """The embedding ``(words, CHANNELS)`` of every word; the first one of each slot is that of :data:`ANY`."""
    count = sum(1 + len(words) for words in SLOTS.values())
    return torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(0))


def embed(prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings ``(B, 5, CHANNELS)`` and pooled ``(B, CHANNELS)`` of ``prompt (B, 5)`` long."""
    sizes = torch.tensor([1 + len(words) for words in SLOTS.values()])
    tokens = table()[prompt - ANY + sizes.cumsum(0) - sizes]
    return tokens, tokens.sum(1) / len(SLOTS) ** 0.5


def prompt(task: str = "draw", **words) -> torch.Tensor:
    """A prompt ``(1, 5)`` in words: ``prompt("recolour", ink="red")``; slots that are not named are left open.

    Raises:
        ValueError: a slot or a word that does not exist, with those that do.
    """
    words = {"task": task, **words}
    for slot, word in words.items():
        require(slot in SLOTS, "slot", f"one of {', '.join(SLOTS)}", slot)
        require(word in SLOTS[slot], slot, f"one of {', '.join(map(str, SLOTS[slot]))}", word)
    return torch.tensor([[known.index(words[slot]) if slot in words else ANY for slot, known in SLOTS.items()]])
