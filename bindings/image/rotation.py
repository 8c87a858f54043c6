"""Rotation of queries and keys by angles that come from the CPU, and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrope.device import on_device
from fastrope.rope import rotate


class Rotation:
    """The angles of some tokens. They move once to the device of the tensors that they rotate.

    Args:
        angles: ``(S, D/2)``, or ``(B, S, D/2)`` if rows differ, radians.
        pairing: as in :class:`fastrope.RoPE`.
    """

    def __init__(self, angles: Tensor, pairing: str) -> None:
        self._angles = angles
        self._pairing = pairing

    def do(self, x: Tensor, span: slice = slice(None)) -> Tensor:
        """Rotate ``x (B, tokens of the span, H, D)``."""
        return rotate(x, self._of(span, x.device), self._pairing)

    def undo(self, x: Tensor, span: slice = slice(None)) -> Tensor:
        """Undo the rotation of ``x (B, tokens of the span, H, D)``."""
        return rotate(x, -self._of(span, x.device), self._pairing)

    def _of(self, span: slice, device: torch.device) -> Tensor:
        self._angles = angles = on_device(self._angles, device)  # another thread may replace the attribute
        return angles[..., span, :]
