"""Several prompts in one text: conditionings joined, and which of the tokens are whose."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrope as fr
from fastrope.checks import require

from .marks import Joined, require_text
from .models import least_text

OF_A_REGION = ("mask", "mask_strength", "set_area_to_bounds")
OF_A_TEXT = ("pooled_output", "attention_mask", "reference_latents", "model_conds")


class Piece(NamedTuple):
    """Text tokens ``(B, tokens, C)``, and the host's mask ``(B, tokens)`` over them, if it has one."""

    text: Tensor
    mask: Tensor | None

    @property
    def tokens(self) -> int:
        """Their number."""
        return self.text.shape[1]

    def part(self, span: slice) -> Piece:
        """Some of them."""
        return Piece(self.text[:, span], None if self.mask is None else self.mask[:, span])

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
    """A part of a conditioning.

    Args:
        piece: its text, without padding that we put there, and without a negative prompt.
        options: the host's.
        which: what to call it in errors.
        negative: a negative prompt that was joined to it.
        mark: of the whole text.
    """

    piece: Piece
    options: dict[str, Any]
    which: str
    negative: Piece | None = None
    mark: Joined | None = None


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
        found.append(_prompt(Piece(text, mask), options, which))
    return found


def _prompt(whole: Piece, options: dict[str, Any], which: str) -> Prompt:
    mark = Joined.of(options)
    if mark is None:
        return Prompt(whole, options, which)
    require_text(mark, whole.tokens)
    stop = mark.tokens - mark.negative
    negative = whole.part(slice(stop, None)) if mark.negative else None
    return Prompt(whole.part(slice(mark.padding, stop)), options, which, negative, mark)


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
        fits, expected = not (prompt.mark and prompt.mark.has("Regions")), "no regions yet; one node takes all prompts"
        require(fits, prompt.which, expected, "the output of such a node")
        instead = "a mask, from Conditioning (Set Mask), in the place of an area"
        require("area" not in prompt.options, prompt.which, instead, "an area")
        _require_options(base, prompt, (*OF_A_REGION, *OF_A_TEXT), "Regions")
    text = Piece.together([prompt.piece for prompt in prompts])
    negatives = [prompt.negative for prompt in prompts if prompt.negative is not None]
    require(len(negatives) <= 1, "regions", "one negative prompt at most (NAG)", len(negatives))
    whole, mark = _joined(model, text, negatives, [prompt.mark for prompt in prompts], (number, "Regions"))
    stops = list(itertools.accumulate((prompt.piece.tokens for prompt in prompts), initial=mark.padding))
    latents, holders = _references([prompt.options.get("reference_latents") or () for prompt in prompts])
    bound = [some if some <= set(masked) else () for some in holders]  # what the whole picture has, all of it sees
    regions = [
        _region(prompts[n], slice(stops[n], stops[n + 1]), [i for i, some in enumerate(bound) if n in some])
        for n in masked
    ]
    options = {key: value for key, value in base.items() if key not in OF_A_REGION}
    options |= {"reference_latents": latents} if latents else {}
    options |= {} if whole.mask is None else {"attention_mask": whole.mask}
    return fr.Regions(regions, **dials), [[whole.text, mark.on(options)]]


def join_negative(model: Any, positive: Any, negative: Any, number: int) -> tuple[int, list]:
    """One text of a prompt and, behind it, a negative prompt.

    Args:
        model: the host's, which may pad a short text.
        positive, negative: conditionings of one prompt each; the positive one may be joined of several.
        number: of the node.

    Returns:
        Tokens of the negative prompt, and the conditioning. Its options are those of the prompt.

    Raises:
        ValueError: several prompts, another negative prompt, or options of the negative prompt that would be lost.
    """
    one, other = (prompts_of(name, each) for name, each in (("positive", positive), ("negative", negative)))
    for name, each in (("positive", one), ("negative", other)):
        require(len(each) == 1, name, "one prompt; Regions joins several", f"{len(each)} of them")
    (prompt,), (against,) = one, other
    shapes = [(each.piece.text.shape[0], each.piece.text.shape[2]) for each in (prompt, against)]
    require(shapes[0] == shapes[1], "negative", f"(batch, channels) of the positive one, {shapes[0]}", shapes[1])
    require(prompt.negative is None, "positive", "a prompt without a negative one", "the output of another NAG")
    require(against.mark is None, "negative", "a prompt of an encoder", "the output of a node that joins prompts")
    _require_options(prompt.options, against, OF_A_TEXT, "NAG")
    latents, known = (each.options.get("reference_latents") or () for each in (against, prompt))
    fits = all(any(_same(x, y) for y in known) for x in latents)
    require(fits, "negative", "no reference latent beside those of the positive prompt", "another one")
    piece = against.piece.padded(least_text(model))
    whole, mark = _joined(model, prompt.piece, [piece], [prompt.mark], (number, "NAG"))
    options = prompt.options | ({} if whole.mask is None else {"attention_mask": whole.mask})
    return piece.tokens, [[whole.text, mark.on(options)]]


def _joined(
    model: Any, text: Piece, negatives: list[Piece], marks: Sequence[Joined | None], node: tuple[int, str]
) -> tuple[Piece, Joined]:
    """The text of a call, and its mark."""
    padded = text.padded(least_text(model))
    whole = Piece.together([padded, *negatives])
    nodes = (node, *(node for mark in marks if mark is not None for node in mark.nodes))
    return whole, Joined(whole.tokens, padded.tokens - text.tokens, whole.tokens - padded.tokens, nodes)


def _require_options(base: Mapping[str, Any], prompt: Prompt, own: Sequence[str], node: str) -> None:
    """Require no option of a prompt, beside its ``own``, that would be lost: those of ``base`` hold for all prompts."""
    for key, value in prompt.options.items():
        if key not in own and not _same(base.get(key), value):
            values = ["a tensor" if isinstance(x, Tensor) else repr(x) for x in (value, base.get(key))]
            expected = f"the {key} of the others; put the node that sets it behind {node}"
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
