"""Queries that nothing sets apart by torch's attention, the others by the fused loop: each kind where it is fastest.

Scales and gains of 1 leave a query with what folds into the keys. Rows of attention do not depend on one another, so
nothing is merged: both write their rows of one output. The form in which ``auto`` runs calls that set a minority of the
queries apart, such as those of a crop.
"""

from __future__ import annotations

import torch

from ..planning import Plan
from . import folded, triton


def divides(plan: Plan) -> bool:
    """Whether a plan names queries that nothing sets apart, which it does where they are most, without a mask."""
    return "untouched" in plan.tensors


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float) -> torch.Tensor:
    """``out (B, Sq, H, D)`` of a plan that :func:`divides`; forward only. Arguments and memory as of both
    :func:`fastrope.backends.triton.run` and :func:`fastrope.backends.folded.run`."""
    with triton.launching_on(q.device):
        keys, values = triton.pack(q, k, v, plan)
        out, _ = triton.attend(q, k, keys, values, plan, scale, touched=True)
    more = plan.spec.num_groups or "weighted_cos" in plan.tensors  # folds into keys that the loop wants as they are
    packed = None if more else keys[:, :, : k.shape[1]], values
    return out.index_copy_(1, plan.tensors["untouched"], folded.run(q, k, v, plan, scale, packed))
