"""Methods as nodes put them on a model, and for which calls of the model they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import fastrope as fr

from .marks import MARK, Joined, require_text

UNCONDITIONED = 1  # how the host marks rows of the negative prompt


class Bound(NamedTuple):
    """A method of a node.

    Args:
        method: with ``modulations(site) -> list``.
        refers: whether it needs a reference picture. Calls of the negative prompt alone that have none go without it.
        number: of a node that joined prompts. Calls with other texts go without the method.
    """

    method: Any
    refers: bool = False
    number: int | None = None

    @property
    def node(self) -> tuple[int, str] | None:
        """Number and name of the node, as marks have them; None of a node that joined no prompts."""
        return None if self.number is None else (self.number, type(self.method).__name__)

    def acts(self, mark: Joined | None, bare: bool) -> bool:
        """Whether the method is for a call.

        Args:
            mark: of its text.
            bare: whether it is the negative prompt alone, without references.
        """
        marked = self.node is None or (mark is not None and self.node in mark.nodes)
        return marked and not (self.refers and bare)


def acting(bound: Iterable[Bound], arguments: Mapping[str, Any], layout: fr.TokenLayout) -> list[Any]:
    """The methods of a call.

    Args:
        bound: all methods of a model.
        arguments: of ``BaseModel.apply_model``.
        layout: of the call's tokens.

    Raises:
        ValueError: a joined text that another node has changed.
    """
    options, mark = arguments.get("transformer_options") or {}, arguments.get(MARK)
    if mark is not None:
        require_text(mark, arguments["c_crossattn"].shape[1])
    bare = set(options.get("cond_or_uncond") or ()) == {UNCONDITIONED} and not layout.reference_grids
    return [each.method for each in bound if each.acts(mark, bare)]
