"""Marks of joined texts.

A node that joins prompts marks their conditioning. The host hands the mark on to each call of the model with this text,
and puts no text with another mark, or with none, into the same batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrope.checks import require

MARK = "fastrope"  # the name under which the host carries a mark
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Joined:
    """The mark of a joined text.

    Args:
        tokens: its length.
        padding: tokens in front of it, which the host would add to a short text.
        negative: tokens of a negative prompt at its end.
        nodes: numbers of the nodes that act on it, and their names.
    """

    tokens: int
    padding: int = 0
    negative: int = 0
    nodes: tuple[tuple[int, str], ...] = ()

    def has(self, name: str) -> bool:
        """Whether a node of this name acts on it."""
        return any(node[1] == name for node in self.nodes)

    @staticmethod
    def of(options: Mapping[str, Any]) -> Joined | None:
        """The mark of a conditioning's options, if there is one."""
        return getattr((options.get("model_conds") or {}).get(MARK), "cond", None)

    def on(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A conditioning's options with this mark."""
        return {**options, "model_conds": {**(options.get("model_conds") or {}), MARK: Carried(self)}}


class Carried:
    """A mark among the conditions of a text, as the host treats its constants."""

    def __init__(self, cond: Joined) -> None:
        self.cond = cond

    def process_cond(self, batch_size: int, **kwargs: Any) -> Carried:
        """The same for any batch."""
        return self

    def can_concat(self, other: Carried) -> bool:
        """Whether both may be in one batch."""
        return self.cond == other.cond

    def concat(self, others: Sequence[Carried]) -> Joined:
        """Of a batch."""
        return self.cond

    def size(self) -> list[int]:
        """Of no weight."""
        return [1]


def new_number() -> int:
    """For a node."""
    return next(_NUMBERS)


def require_marks(nodes: Iterable[tuple[int, str]], marks: Iterable[Joined | None]) -> None:
    """Require, before a run, that nodes which join prompts are wired with both outputs.

    Args:
        nodes: numbers and names of those on the model.
        marks: of all conditionings.

    Raises:
        ValueError: a node without its conditioning, or a conditioning without its node.
    """
    here, there = set(nodes), {node for mark in marks if mark is not None for node in mark.nodes}
    for _, name in here - there:
        expected = f"at the sampler, that of the node {name}, or what further nodes make of it"
        require(False, "conditioning", expected, "others alone; connect both outputs of the node")
    for _, name in there - here:
        expected = f"at the sampler, that of the node {name}, which gave the conditioning"
        require(False, "model", expected, "another; connect both outputs of the node")


def require_text(mark: Joined, tokens: int) -> None:
    """Require a text as it was joined.

    Raises:
        ValueError: one of another length.
    """
    node = mark.nodes[0][1]
    expected = f"the {mark.tokens} text tokens that {node} joined; put nodes that change the text in front of it"
    require(mark.tokens == tokens, "conditioning", expected, tokens)
