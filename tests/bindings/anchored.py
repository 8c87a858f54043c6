"""What tests of every autoregressive host share."""

from __future__ import annotations

import torch


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


class Spy:
    """A matcher that remembers the logits and positions it was given."""

    def __init__(self, inner):
        self.inner, self.logits, self.positions = inner, [], []
        self.num_tokens, self.seeds, self.rows, self.codebook = (
            inner.num_tokens,
            inner.seeds,
            inner.rows,
            inner.codebook,
        )

    def __call__(self, logits, anchors, position, **kwargs):
        self.logits.append(logits)
        self.positions.append(position)
        return self.inner(logits, anchors, position, **kwargs)


def prefix_function(model, grid, prompt_length: int):
    """The host's way to force rows: image tokens and row ends as ``prefix_allowed_tokens_fn``."""
    image = model.model.vocabulary_mapping.image_tokens

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        forced = grid.forced(len(ids) - prompt_length)
        return image if forced is None else [forced]

    return allowed
