"""What the autoregressive hosts share: the raster in a token stream, records of matching, checks of anchors.

It needs torch and no host library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastrope.checks import require, require_tensor
from fastrope.islock import ISLock, Matcher, rows_of


@dataclass(frozen=True)
class Grid:
    """Places of the image tokens of a raster among the tokens that a model generates.

    Step 0 is the first generated token. First come ``lead`` tokens (sizes, an image-start token). Then come ``height``
    rows of ``width`` image tokens, each followed by ``newline`` if the model has such a token. ``end`` comes last, if
    the model has it.

    Args:
        height: rows of image tokens.
        width: image tokens of a row.
        newline: vocabulary id of the token that ends every row, also the last one; None for a plain raster.
        lead: number of generated tokens before the first image token.
        end: vocabulary id of the token that ends the image; None if there is none.
        opening: vocabulary ids right before the first image token: its start, its sizes. The last ``lead`` of them are
            generated; those before end the prompt.

    Raises:
        ValueError: a size below 1, a negative ``lead`` or id.
    """

    height: int
    width: int
    newline: int | None = None
    lead: int = 0
    end: int | None = None
    opening: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            require(_is_int(value) and value >= 1, f"Grid.{name}", "an integer >= 1", repr(value))
        require(_is_int(self.lead) and self.lead >= 0, "Grid.lead", "an integer >= 0", repr(self.lead))
        for name in ("newline", "end"):
            value = getattr(self, name)
            require(value is None or _is_id(value), f"Grid.{name}", "a vocabulary id or None", repr(value))
        object.__setattr__(self, "opening", tuple(self.opening))
        require(all(map(_is_id, self.opening)), "Grid.opening", "vocabulary ids", self.opening)

    @property
    def num_tokens(self) -> int:
        """Image tokens, N."""
        return self.height * self.width

    @property
    def stride(self) -> int:
        """Generated tokens of a row, including the one that ends it."""
        return self.width + (self.newline is not None)

    @property
    def length(self) -> int:
        """Generated tokens up to the end of the image, including the token that ends it."""
        return self.lead + self.height * self.stride + (self.end is not None)

    @property
    def prompt_end(self) -> tuple[int, ...]:
        """Vocabulary ids at the end of a prompt: the part of ``opening`` that is not generated."""
        return self.opening[: max(0, len(self.opening) - self.lead)]

    def raster(self, step: int) -> int | None:
        """Raster index of the image token generated at ``step``; None for other tokens."""
        row, column = divmod(step - self.lead, self.stride)
        return row * self.width + column if 0 <= row < self.height and column < self.width else None

    def step(self, index: int) -> int:
        """The step that generates raster index ``index``; the inverse of :meth:`raster`."""
        require(0 <= index < self.num_tokens, "index", f"one in [0, {self.num_tokens})", index)
        row, column = divmod(index, self.width)
        return self.lead + row * self.stride + column

    def forced(self, step: int) -> int | None:
        """The token of ``opening``, ``newline`` or ``end`` that the grid requires at ``step``, or None."""
        if not 0 <= step < self.length:
            return None
        if step < self.lead:
            place = step - self.lead + len(self.opening)
            return self.opening[place] if place >= 0 else None
        row, column = divmod(step - self.lead, self.stride)
        if row == self.height:
            return self.end
        return self.newline if column == self.width else None

    def flatten(self, tokens: torch.Tensor) -> torch.Tensor:
        """Image tokens ``(B, N)`` of generated tokens ``(B, >= length)``.

        Raises:
            ValueError: fewer tokens than the grid has, or another token where the grid requires one.
        """
        require_tensor("tokens", tokens, (2,), f"(B, at least {self.length})")
        require(tokens.shape[1] >= self.length, "tokens", f"at least {self.length} per row", tokens.shape[1])
        written = {step: self.forced(step) for step in range(self.length) if self.forced(step) is not None}
        wrong = tokens[:, list(written)] != torch.tensor(list(written.values()), device=tokens.device)
        for row, place in wrong.nonzero()[:1].tolist():
            step = list(written)[place]
            require(False, "tokens", f"{written[step]} at step {step} of row {row}", int(tokens[row, step]))
        return tokens[:, [step for step in range(self.length) if self.raster(step) is not None]]

    def check_prompt(self, input_ids: torch.Tensor, made_by: str = "padded on the left") -> None:
        """Require that every row of ``input_ids (B, S)`` ends with :attr:`prompt_end`, right before the image.

        Raises:
            ValueError: naming the row and its last tokens.
        """
        end = self.prompt_end
        found = input_ids[:, max(0, input_ids.shape[1] - len(end)) :].tolist() if end else []
        for row, ids in enumerate(found):
            expected = f"prompts that end with {list(end)}, where an image of {self.height} x {self.width} begins"
            require(ids == list(end), "input_ids", f"{expected} ({made_by})", f"row {row}, which ends with {ids}")


@dataclass(frozen=True)
class Record:
    """What anchor token matching did at every image token, in raster order.

    Args:
        tokens: the chosen tokens, ``(B, N)`` long, vocabulary ids.
        anchors: the tokens they were compared with, ``(B, N)`` long, vocabulary ids.
        distance: of the nearest candidate to the anchor, ``(B, N)`` float32.
        window: number of candidates, ``(B, N)`` int32.
        accepted: True: the nearest candidate was within ``tau``. False: the most probable token was taken, or, at a
            free position (an anchor of -1, window 0), the first token of the draw.
    """

    tokens: torch.Tensor
    anchors: torch.Tensor
    distance: torch.Tensor
    window: torch.Tensor
    accepted: torch.Tensor

    @classmethod
    def stack(cls, matches: Sequence, anchors: torch.Tensor) -> Record:
        """From one match ``(B,)`` per image token, in raster order, and anchors ``(B, N)``."""
        columns = (torch.stack(column, dim=1) for column in zip(*matches, strict=True))
        tokens, distance, window, accepted = columns
        return cls(tokens, anchors[:, : len(matches)], distance, window, accepted)

    @property
    def kept(self) -> torch.Tensor:
        """``(B, N)`` bool: the anchor itself was drawn and taken."""
        return self.accepted & (self.tokens == self.anchors)

    @property
    def moved(self) -> torch.Tensor:
        """``(B, N)`` bool: another token near the anchor was taken."""
        return self.accepted & (self.tokens != self.anchors)

    @property
    def fallback(self) -> torch.Tensor:
        """``(B, N)`` bool: nothing near was drawn; the most probable token was taken."""
        return ~self.accepted & (self.window > 0)

    @property
    def free(self) -> torch.Tensor:
        """``(B, N)`` bool: there was no anchor; the token was sampled."""
        return self.window == 0

    def counts(self) -> dict[str, list[int]]:
        """Number of kept, moved, fallback and free tokens of each batch row."""
        return {name: getattr(self, name).sum(1).tolist() for name in ("kept", "moved", "fallback", "free")}


@dataclass(frozen=True)
class Generated:
    """Image tokens ``(B, N)``, vocabulary ids in raster order, and the record of matching (None without anchors)."""

    tokens: torch.Tensor
    record: Record | None


def spread_anchors(anchors: torch.Tensor, batch: int, num_tokens: int, matcher: Matcher) -> torch.Tensor:
    """Anchors ``(B, N)`` for ``batch`` rows, on the device of the matcher. Every row is repeated as often as
    ``generate`` repeats its prompt. An anchor of -1 leaves its position free.

    Raises:
        ValueError: not ``(B, num_tokens)`` integers, a batch that is no multiple of B, or ids without a row in the
            matcher's codebook (codes instead of vocabulary ids, for example).
    """
    require_tensor("anchors", anchors, (2,), f"(B, {num_tokens})")
    integers = not anchors.is_floating_point() and anchors.dtype != torch.bool
    require(integers, "anchors", "vocabulary ids of an integer dtype", anchors.dtype)
    shape = f"shape (B, {num_tokens}), image tokens alone"
    require(anchors.shape[1] == num_tokens, "anchors", shape, tuple(anchors.shape))
    rows = anchors.shape[0]
    require(rows > 0 and batch % rows == 0, "anchors", f"a number of rows that divides the batch of {batch}", rows)
    anchors = anchors.to(device=matcher.rows.device, dtype=torch.long)
    unknown = anchors[(rows_of(anchors, matcher.rows) < 0) & (anchors != -1)]
    known = "ids of the matcher's codebook (its token_ids, vocabulary ids of the model), or -1 for a free position"
    require(not len(unknown), "anchors", known, f"{unknown[:3].tolist()} and {len(unknown)} such in all")
    return anchors.repeat_interleave(batch // rows, dim=0)


def plain_matcher(num_tokens: int, device: torch.device) -> Matcher:
    """A matcher for anchors of -1 alone. With it, plain generation has the same code and noise as editing."""
    return ISLock(candidates=1).matcher(torch.zeros(1, 1, device=device), num_tokens=num_tokens)


def guide(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance ``u + (c - u) * scale`` of logits ``(2B, V)``, conditional half first: ``(B, V)``."""
    conditional, unconditional = logits.chunk(2)
    if scale == 1:
        return conditional
    return unconditional + (conditional - unconditional) * scale


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_int(value) and value >= 0
