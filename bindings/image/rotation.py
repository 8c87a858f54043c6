"""Rotation of queries and keys by angles that come from the CPU, and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrope.device import on_device
from fastrope.rope import rotate

from .part import Places


class Rotation:
    """The angles of some tokens. They move once to the device of the tensors that they rotate.

    Args:
        angles: ``(S, D/2)``, or ``(B, S, D/2)`` if rows differ, radians.
        pairing: as in :class:`fastrope.RoPE`.
    """

    def __init__(self, angles: Tensor, pairing: str) -> None:
        self._angles = angles
        self._pairing = pairing

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self._angles.shape[-2]

    def do(self, x: Tensor, tokens: Places = slice(None)) -> Tensor:
        """Rotate ``x (B, tokens, H, D)``; an index of tokens is on the device of ``x``."""
        return rotate(x, self._of(tokens, x.device), self._pairing)

    def undo(self, x: Tensor, tokens: Places = slice(None)) -> Tensor:
        """Undo the rotation of ``x (B, tokens, H, D)``."""
        return rotate(x, -self._of(tokens, x.device), self._pairing)

    def _of(self, tokens: Places, device: torch.device) -> Tensor:
        self._angles = angles = on_device(self._angles, device)  # another thread may replace the attribute
        return angles[..., tokens, :]
