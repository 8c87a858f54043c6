"""Which route ``auto`` takes on a GPU where several compute a call: one table of rules, shipped or measured on a card.

A family is a set of calls, with the routes that can compute them. A rule says which of its routes ``auto`` takes.
``fastrope doctor --gpu --write`` measures the routes on a card and stores rules in the user's cache folder, in the form
of those below. They are read once, and replace the shipped ones. No rule changes the mathematics: every route of a
family gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from . import card
from .backends import folded, split_rows
from .planning.lowered import Lowered

FILE = "rules"  # of local rules
MEASURED, PREDICTED, HERE = "measured on an H200", "predicted", "measured here"
# What runs a call: the backend, and whether torch's attention takes the unmodulated queries. "sdpa" folds into the keys
# all that can be.
ROUTES = {"sdpa": ("sdpa", False), "split": ("triton", True), "loop": ("triton", False)}


@dataclass(frozen=True)
class Family:
    """Calls for which ``applies(lowered, dtype, return_lse)`` is true, and that of no earlier family is. Each of
    ``routes`` computes them."""

    name: str
    calls: str
    applies: Callable[[Lowered, torch.dtype, bool], bool]
    routes: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """Calls of ``family`` take ``route``.

    ``reason`` says why, ``against`` why not the other backend. ``basis`` says what supports it: rows under
    ``bench/results/``, rows measured on this card, or a prediction (``bench/NOTEBOOK.md`` has the reasoning).
    """

    family: str
    route: str
    reason: str
    against: str
    basis: str = PREDICTED


def _plain(lowered: Lowered, dtype: torch.dtype, return_lse: bool) -> bool:
    rotates = lowered.keys.rotation is not None or (
        lowered.queries is not None and lowered.queries.rotation is not None
    )
    changed = lowered.modulated or lowered.keys.biased or lowered.values is not None
    return not return_lse and (lowered.num_keys is None or not (changed or rotates))


def _short(applies: Callable[[Lowered], bool]) -> Callable[[Lowered, torch.dtype, bool], bool]:
    return lambda lowered, dtype, return_lse: dtype != torch.float32 and not return_lse and applies(lowered)


_WHOLE, _ROWS = ("sdpa", "loop"), ("split", "loop")
FAMILIES = (
    Family("plain", "neither rotation nor modulation, no log-sum-exp", _plain, _WHOLE),
    Family(
        "masked", "rotation, weights and groups under a mask, in 16 bits, no log-sum-exp",
        _short(lambda lowered: bool(lowered.keys.unmasked) and folded.folds(lowered)), _WHOLE,
    ),
    Family(
        "rotation", "rotation alone, in 16 bits, no log-sum-exp",
        _short(lambda lowered: not lowered.modulated and lowered.values is None and folded.folds(lowered)), _WHOLE,
    ),
    Family("keys", "weights, groups and values, in 16 bits, no log-sum-exp", _short(folded.folds), _WHOLE),
    Family(
        "per-query scales", "most queries unmodulated, others with per-query scales, in 16 bits, no log-sum-exp",
        _short(lambda lowered: bool(lowered.num_per_query) and split_rows.splits(lowered)), _ROWS,
    ),
    Family("unmodulated", "most queries unmodulated, in 16 bits, no log-sum-exp", _short(split_rows.splits), _ROWS),
    Family(
        "float32", "float32 without per-query scales",
        lambda lowered, dtype, return_lse: dtype == torch.float32 and not lowered.num_per_query, _WHOLE,
    ),
    Family("other", "all other calls", lambda lowered, dtype, return_lse: True, ("loop", "sdpa")),
)  # fmt: skip

_FOLDS = "all of it folds into keys and values, for torch's own kernel", "nothing is left for its loop to fuse"
_SPLITS = (
    "fused kernel for modulated queries, torch's own for the others", "takes a call and a copy of the keys per scale",
)  # fmt: skip
RULES = (
    Rule(
        "plain", "sdpa", "torch's own kernel is the fastest plain attention",
        "nothing to fuse: no rotation and no modulation", MEASURED,
    ),
    Rule("masked", "sdpa", *_FOLDS, MEASURED),
    Rule("rotation", "sdpa", *_FOLDS, MEASURED),
    Rule("keys", "sdpa", *_FOLDS, MEASURED),
    Rule("per-query scales", "split", *_SPLITS, MEASURED),
    Rule("unmodulated", "split", *_SPLITS, MEASURED),
    Rule(
        "float32", "sdpa", "torch's float32 kernels have larger tiles",
        "multiplies float32 on CUDA cores, in tiles of 16 queries",
    ),
    Rule(
        "other", "loop", "fused kernel, one pass",
        "copies the keys per scale, and takes a second pass for a log-sum-exp",
    ),
)  # fmt: skip
_BY_NAME = {family.name: family for family in FAMILIES}
_SHIPPED = {rule.family: rule for rule in RULES}


def family_of(lowered: Lowered, dtype: torch.dtype, return_lse: bool = False) -> Family:
    """The first family that a call on a GPU belongs to."""
    return next(family for family in FAMILIES if family.applies(lowered, dtype, return_lse))


def rule_for(lowered: Lowered, dtype: torch.dtype, return_lse: bool, device: torch.device) -> Rule:
    """The rule of a call on a GPU that both ``triton`` and ``sdpa`` can run."""
    family = family_of(lowered, dtype, return_lse).name
    return local(device).get(family) or _SHIPPED[family]


@lru_cache(maxsize=64)
def local(device: torch.device) -> dict[str, Rule]:
    """Rules measured on a GPU, by family; read once in a process. A file that is damaged or was measured by other
    versions holds none, and one warning says so."""
    cards = card.read(FILE)
    if not cards:
        return {}
    rows = cards.get(card.key(device))
    if rows is None:
        if any(name.startswith(f"{card.name_of(device)},") for name in cards):
            card.ignore(card.path(FILE), "other versions measured it; run fastrope doctor --gpu --write again")
        return {}
    try:
        return {rule.family: rule for rule in map(_from_row, rows)}
    except (TypeError, ValueError, KeyError) as error:
        card.ignore(card.path(FILE), f"it is damaged: {error!r}; delete it")
        return {}


def store(rules: list[Rule], device: torch.device) -> None:
    """Write rules measured on a GPU, for later processes.

    Raises:
        OSError, RuntimeError: the file cannot be written.
    """
    card.write(FILE, device, [asdict(rule) for rule in rules])
    local.cache_clear()


def _from_row(row: Any) -> Rule:
    rule = Rule(**row)
    if rule.route not in _BY_NAME[rule.family].routes or not all(isinstance(x, str) for x in row.values()):
        raise ValueError(f"no route of calls of {rule.family}: {rule.route}")
    return rule
