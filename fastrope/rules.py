"""Which backend ``auto`` takes where more than one could run a call on a GPU: one table, read from the top.

A rule says what it rests on: ``measured``, with the rows under ``bench/results/``, or ``predicted`` until such rows
exist (``bench/NOTEBOOK.md`` has the reasoning). Where only one backend can run a call there is nothing to choose: see
:func:`fastrope.api.choose`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .backends.divided import divides
from .backends.folded import folds
from .planning import Plan


@dataclass(frozen=True)
class Rule:
    """Calls ``applies(plan, dtype, return_lse)`` is true of go to ``backend``."""

    calls: str
    applies: Callable[[Plan, torch.dtype, bool], bool]
    backend: str
    reason: str
    against: str  # why not the other one
    basis: str = "predicted"
    divided: bool = False  # torch's attention for queries that nothing sets apart


def _plain(plan: Plan, dtype: torch.dtype, return_lse: bool) -> bool:
    rotates = "key_cos" in plan.tensors or "query_cos" in plan.tensors
    return not return_lse and (plan.spec.num_keys is None or not (plan.spec.modulated or rotates))


RULES = (
    Rule(
        "neither rotation nor modulation, no log-sum-exp", _plain,
        "sdpa", "torch's own kernel is the fastest plain attention", "nothing to fuse: no rotation and no modulation",
    ),
    Rule(
        "rotation, weights and groups in 16 bits, no mask, no log-sum-exp",
        lambda plan, dtype, return_lse: dtype != torch.float32 and not return_lse and folds(plan),
        "sdpa", "all of it folds into the keys, for torch's own kernel", "nothing is left for its loop to fuse",
    ),
    Rule(
        "most queries as they are, in 16 bits, no mask, no log-sum-exp",
        lambda plan, dtype, return_lse: dtype != torch.float32 and not return_lse and divides(plan),
        "triton", "fused kernel for queries set apart, torch's own for the others",
        "takes a call and a copy of the keys per scale", divided=True,
    ),
    Rule(
        "float32 without continuous scales",
        lambda plan, dtype, return_lse: dtype == torch.float32 and not plan.spec.continuous,
        "sdpa", "torch's float32 kernels have larger tiles", "multiplies float32 on CUDA cores, in tiles of 16 queries",
    ),
    Rule(
        "all other calls", lambda plan, dtype, return_lse: True, "triton", "fused kernel, one pass",
        "copies the keys per level, and takes a second pass for a log-sum-exp",
    ),
)  # fmt: skip


def rule_for(plan: Plan, dtype: torch.dtype, return_lse: bool = False) -> Rule:
    """The first rule that applies to a call on a GPU that both ``triton`` and ``sdpa`` can run."""
    return next(rule for rule in RULES if rule.applies(plan, dtype, return_lse))
