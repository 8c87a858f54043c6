"""Rotating queries and keys by angles that live on the CPU, and taking a rotation back."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrope.device import on_device
from fastrope.rope import rotate


class Rotation:
    """The angles of some tokens, moved to the device of what they rotate, once.

    Args:
        angles: ``(S, D/2)``, or ``(B, S, D/2)`` where rows differ, radians.
        pairing: as in :class:`fastrope.RoPE`.
    """

    def __init__(self, angles: Tensor, pairing: str) -> None:
        self._angles = angles
        self._pairing = pairing

    def do(self, x: Tensor, span: slice = slice(None)) -> Tensor:
        """Rotate ``x (B, tokens of the span, H, D)``."""
        return rotate(x, self._of(span, x.device), self._pairing)

    def undo(self, x: Tensor, span: slice = slice(None)) -> Tensor:
        """Take the rotation of ``x (B, tokens of the span, H, D)`` back."""
        return rotate(x, -self._of(span, x.device), self._pairing)

    def _of(self, span: slice, device: torch.device) -> Tensor:
        self._angles = angles = on_device(self._angles, device)  # of another thread's device, the next moment
        return angles[..., span, :]
