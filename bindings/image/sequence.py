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
        positions: ``(S, axes)``, or ``(B, S, axes)`` if rows differ; integers or float64.
        layout: returns the spans; raises ValueError if the arguments do not determine them.
        key_mask: ``(B, S)`` bool, True = attend; None if every key counts.
        bonus: ``(B, S)`` bool; the host adds 1 to the logit if this is True for both the query and the key.
        mask_is_ours: the host itself masks nothing; a mask that it hands to its attention says something else.
    """

    positions: torch.Tensor
    layout: Callable[[], fr.TokenLayout]
    key_mask: torch.Tensor | None = None
    bonus: torch.Tensor | None = None
    mask_is_ours: bool = False

    @property
    def masked(self) -> bool:
        """True if ``key_mask`` or ``bonus`` says what the mask says that the host hands to its attention."""
        return not self.mask_is_ours and (self.key_mask is not None or self.bonus is not None)
