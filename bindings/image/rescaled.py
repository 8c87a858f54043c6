"""Other frequencies for the positions of a whole call."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import fastrope as fr
from fastrope.rescaling import Rescaling


@dataclass(frozen=True, eq=False)
class Rescaled:
    """Angles with other frequencies, for all layers of a call.

    Args:
        base: the model's own angles.
        rescaling: factors and gains.
    """

    base: fr.RoPE
    rescaling: Rescaling

    @cached_property
    def factor(self) -> Tensor:
        """``(D/2,)`` float64."""
        return torch.tensor(self.rescaling.factor, dtype=torch.float64, device="cpu")

    @cached_property
    def gain(self) -> Tensor | None:
        """``(D/2,)`` float64, of queries and keys; None where it is 1."""
        return None if self.gains is None else torch.tensor(self.gains, dtype=torch.float64, device="cpu")

    @property
    def gains(self) -> tuple[float, ...] | None:
        """The same as something to compare."""
        return None if set(self.rescaling.gain) == {1.0} else self.rescaling.gain

    @cached_property
    def rope(self) -> fr.RoPE:
        """The angles."""
        return self.base.rescaled(self.factor)


def kin(key: Hashable, rescaled: Rescaled | None) -> Hashable:
    """What calls over the tokens of ``key`` have in common whose plans differ in angles alone."""
    return key, rescaled and rescaled.gains
