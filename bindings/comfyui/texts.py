"""Several prompts in one text: which of its tokens are whose, and which nodes act on it.

A node that joins prompts marks their conditioning. The host hands the mark on to each call of the model with this text,
and puts no text with another mark, or with none, into the same batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrope as fr
from fastrope.checks import require

from .models import least_text

MARK = "fastrope"  # the name under which the host carries a mark
OF_A_REGION = ("mask", "mask_strength", "set_area_to_bounds")
OF_A_PROMPT = (*OF_A_REGION, "pooled_output", "attention_mask", "reference_latents", "model_conds")
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Joined:
    """The mark of a joined text.

    Args:
        tokens: its length.
        padding: tokens in front of it, which the host would add to a short text.
        nodes: numbers of the nodes that act on it, and their names.
    """

    tokens: int
    padding: int = 0
    nodes: tuple[tuple[int, str], ...] = ()

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


class Piece(NamedTuple):
    """Text tokens ``(B, tokens, C)``, and the host's mask ``(B, tokens)`` over them, if it has one."""

    text: Tensor
    mask: Tensor | None

    @property
    def tokens(self) -> int:
        """Their number."""
        return self.text.shape[1]

    def padded(self, least: int) -> Piece:
        """At least so many, with zeros in front."""
        missing = max(least - self.tokens, 0)
        mask = None if self.mask is None else F.pad(self.mask, (missing, 0), value=1)
        return Piece(F.pad(self.text, (0, 0, missing, 0)), mask)

    @staticmethod
    def together(pieces: Sequence[Piece]) -> Piece:
        """One after the other."""
        text, mask = torch.cat([piece.text.to(pieces[0].text) for piece in pieces], dim=1), None
        if any(piece.mask is not None for piece in pieces):
            masks = [x.text.new_ones(x.text.shape[:2]) if x.mask is None else x.mask for x in pieces]
            mask = torch.cat([x.to(text.device, torch.long) for x in masks], dim=1)
        return Piece(text, mask)


class Prompt(NamedTuple):
    """A part of a conditioning: its text, the host's options, and what to call it in errors."""

    piece: Piece
    options: dict[str, Any]
    which: str


def prompts_of(name: str, conditioning: Any) -> list[Prompt]:
    """The parts of a conditioning.

    Raises:
        ValueError: no conditioning, one without text tokens, or parts of different models.
    """
    listed = isinstance(conditioning, list) and len(conditioning) > 0
    require(listed, name, "a CONDITIONING", "an empty one" if conditioning == [] else type(conditioning).__name__)
    found, first = [], None
    for n, (text, options) in enumerate(conditioning):
        which = f"{name}, prompt {n + 1}"
        fits = isinstance(text, Tensor) and text.ndim == 3 and text.shape[1] > 0
        require(fits, which, "a prompt with text tokens", tuple(getattr(text, "shape", ())))
        shape = text.shape[0], text.shape[2]
        first = first or shape
        require(shape == first, which, f"(batch, channels) of the first one, {first}", shape)
        mask = options.get("attention_mask")
        fits = mask is None or mask.shape == text.shape[:2]
        require(fits, which, "an attention_mask over its tokens alone", tuple(getattr(mask, "shape", ())))
        found.append(Prompt(Piece(text, mask), options, which))
    return found


def join_regions(model: Any, conditioning: Any, number: int, **dials: Any) -> tuple[fr.Regions, list]:
    """One text of prompts with masks of their own, and prompts without, which are for the whole picture. Their
    reference latents are joined as well, each one once.

    Args:
        model: the host's, which may pad a short text.
        conditioning: the prompts.
        number: of the node.
        dials: of :class:`fastrope.Regions`.

    Returns:
        The method, and the conditioning. Its options are those of the first prompt for the whole picture.

    Raises:
        ValueError: no prompt with a mask, or one whose mask or options make no sense here.
    """
    prompts = prompts_of("regions", conditioning)
    masked = [n for n, prompt in enumerate(prompts) if prompt.options.get("mask") is not None]
    expected = "a prompt with a mask, from Conditioning (Set Mask)"
    require(bool(masked), "regions", expected, f"{len(prompts)} without one")
    base = prompts[next((n for n in range(len(prompts)) if n not in masked), 0)].options
    for prompt in prompts:
        single, expected = Joined.of(prompt.options) is None, "no regions yet: combine all prompts, and use one node"
        require(single, prompt.which, expected, "the output of such a node")
        _require_options(base, prompt, "Regions")
    whole = Piece.together([prompt.piece for prompt in prompts]).padded(least_text(model))
    padding = whole.tokens - sum(prompt.piece.tokens for prompt in prompts)
    stops = list(itertools.accumulate((prompt.piece.tokens for prompt in prompts), initial=padding))
    latents, holders = _references([prompt.options.get("reference_latents") or () for prompt in prompts])
    bound = [some if some <= set(masked) else () for some in holders]  # what the whole picture has, all of it sees
    regions = [
        _region(prompts[n], slice(stops[n], stops[n + 1]), [i for i, some in enumerate(bound) if n in some])
        for n in masked
    ]
    options = {key: value for key, value in base.items() if key not in OF_A_REGION}
    options |= {"reference_latents": latents} if latents else {}
    options |= {} if whole.mask is None else {"attention_mask": whole.mask}
    mark = Joined(whole.tokens, padding, ((number, "Regions"),))
    return fr.Regions(regions, **dials), [[whole.text, mark.on(options)]]


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
    node = mark.nodes[-1][1]
    expected = f"the {mark.tokens} text tokens that {node} joined; put nodes that change the text in front of it"
    require(mark.tokens == tokens, "conditioning", expected, tokens)


def _require_options(base: Mapping[str, Any], prompt: Prompt, node: str) -> None:
    """Require no option of a prompt that would be lost: those of ``base`` hold for the text as a whole."""
    for key, value in prompt.options.items():
        if key not in OF_A_PROMPT and not _same(base.get(key), value):
            values = ["a tensor" if isinstance(x, Tensor) else repr(x) for x in (value, base.get(key))]
            expected = f"the {key} of the prompt for the whole picture; put the node that sets it behind {node}"
            require(False, prompt.which, expected, f"{values[0]} beside {values[1]}")


def _region(prompt: Prompt, text: slice, references: list[int]) -> fr.Region:
    options, which = prompt.options, prompt.which
    mask, strength = options["mask"], options.get("mask_strength", 1.0)
    masks = mask.reshape(-1, *mask.shape[-2:])
    require(len(masks) == 1, which, "one mask", f"a batch of {len(masks)}")
    bounds = options.get("set_area_to_bounds", False)
    require(not bounds, which, "set_cond_area: default, since all regions are drawn in one picture", "mask bounds")
    require(0 < strength <= 1, which, "a strength of its mask above 0 and at most 1", strength)
    try:
        return fr.Region(masks[0].cpu().float() * strength, text, references)
    except ValueError as error:
        raise ValueError(f"{which}: {error}") from error


def _references(given: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[set[int]]]:
    """The distinct latents of all prompts, and the prompts that have each."""
    latents: list[Tensor] = []
    holders: list[set[int]] = []
    for n, some in enumerate(given):
        for latent in some:
            known = [i for i, x in enumerate(latents) if _same(x, latent)]
            if not known:
                latents.append(latent)
                holders.append(set())
            holders[known[0] if known else -1].add(n)
    return latents, holders


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other.to(one)))
    try:
        return bool(one is other or one == other)
    except (RuntimeError, ValueError):  # sequences that hold tensors
        return False
