"""Other frequencies for the positions of a whole call: the host's rotary table, replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fastrope as fr
from fastrope.methods.schedules import rests
from fastrope.rescaling import Rescaling, rescales, rescaling_of

from ..image.rescaled import Rescaled


def table_of(rescaled: Rescaled, like: Tensor) -> Tensor:
    """The host's rotary table, ``(1, 1, S, D/2, 2, 2)``, in the dtype and on the device of its own."""
    cos, sin = rescaled.rope.angles.cos(), rescaled.rope.angles.sin()
    rows = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
    if rescaled.gain is not None:
        rows = rows * rescaled.gain[:, None, None]
    return rows[None, None].to(like)


def requested_rescaling(methods: Sequence[Any], site: fr.Site, obstacles: dict[str, bool]) -> Rescaling | None:
    """The rescaling that methods want at a step; None where nothing changes.

    Args:
        site: any of the step.
        obstacles: what a rescaling cannot be combined with, and whether it is there.

    Raises:
        NotImplementedError: one of them is.
    """
    if not rescales(methods):
        return None
    found = rescaling_of([m for m in methods if not rests(m, site)], site)
    for obstacle, there in obstacles.items():
        if found is not None and there:
            raise NotImplementedError(f"High resolution: does not go with {obstacle}")
    return found
