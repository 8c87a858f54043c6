"""Unmodulated queries by torch's attention, the others by the fused loop.

A query whose scales and gains are all 1 meets only what folds into the keys. Rows of attention do not depend on one
another, so nothing is merged: both write their rows of one output. ``auto`` runs calls so that modulate a minority of
the queries, such as those of a crop.

It has one entry, :func:`run`.
"""

from __future__ import annotations

from torch import Tensor

from .. import kernels
from ..kernels.streams import Projected
from ..planning.lowered import Lowered
from . import folded, fused
from .plain import Attend


def splits(lowered: Lowered) -> bool:
    """Whether a plan names its unmodulated queries, where they are most, and torch's attention can take them."""
    return lowered.unmodulated is not None and len(lowered.keys.unmasked) <= folded.MOST_ROWS


def run(
    q: Projected, k: Projected, v: Projected, lowered: Lowered, scale: float, launch: fused.Launch,
    prepares: tuple[str, ...], plain: Attend | None = None,
) -> Tensor:  # fmt: skip
    """``out (B, Sq, H, D)`` of a plan that :func:`splits`; forward only. Arguments and memory as of both
    :func:`fastrope.backends.fused.run` and :func:`fastrope.backends.folded.run`."""
    with fused.launching_on(q.device):
        keys, values = fused.pack(q, k, v, lowered, launch)
        out, _ = fused.attend(q, keys, values, k, lowered, scale, launch, modulated_only=True)
    more = lowered.groups is not None or lowered.keys.weighted is not None  # folds into keys that the loop wants plain
    packed = None if more else keys[:, :, : k.shape[1]], values
    others = folded.run(q, k, v, lowered, scale, prepares, packed, plain)
    with fused.launching_on(q.device):
        kernels.scatter_rows(others.contiguous(), lowered.unmodulated.source, out, fused.configs(q)("scatter"))
    return out
