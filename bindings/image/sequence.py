"""The tokens of one call of an image transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastrope as fr


@dataclass(frozen=True, eq=False)
class JointSequence:
    """The tokens of a call, on the CPU.

    Args:
        positions: ``(S, axes)``, or ``(B, S, axes)`` where rows differ; integers or float64.
        layout: returns the spans; raises ValueError where they cannot be told.
        key_mask: ``(B, S)`` bool, True = attend; None where every key counts.
        bonus: ``(B, S)`` bool; the host adds 1 to the logit where it holds for both the query and the key.
    """

    positions: torch.Tensor
    layout: Callable[[], fr.TokenLayout]
    key_mask: torch.Tensor | None = None
    bonus: torch.Tensor | None = None

    @property
    def masked(self) -> bool:
        """True when the mask that the host hands to its attention is accounted for."""
        return self.key_mask is not None or self.bonus is not None
