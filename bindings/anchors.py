"""What the autoregressive hosts share: where a raster lies in a token stream, what was matched, what anchors look like.

Torch alone; no host library.
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
    """Where the image tokens of a raster stand among the tokens a model generates.

    Step 0 is the first generated token. ``lead`` tokens come before the image (sizes, an image-start token); then
    ``height`` rows of ``width`` image tokens, each row followed by ``newline`` where the model has such a token, and
    ``end`` after the last row where it has that.

    Args:
        height: rows of image tokens.
        width: image tokens of a row.
        newline: vocabulary id of the token that ends every row, the last one included; None for a plain raster.
        lead: generated tokens before the first image token.
        end: vocabulary id of the token that ends the image; None for no such token.
        opening: vocabulary ids that stand right before the first image token: its start, its sizes. The last ``lead``
            of them are generated, those before end the prompt.

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
        """Generated tokens of a row, the one that ends it included."""
        return self.width + (self.newline is not None)

    @property
    def length(self) -> int:
        """Generated tokens up to the end of the image, the token that ends it included."""
        return self.lead + self.height * self.stride + (self.end is not None)

    @property
    def prompt_end(self) -> tuple[int, ...]:
        """Vocabulary ids that a prompt has to end with: what of ``opening`` is not generated."""
        return self.opening[: max(0, len(self.opening) - self.lead)]

    def raster(self, step: int) -> int | None:
        """Raster index of the token generated at ``step``, the offset less finished rows; None for other tokens."""
        row, column = divmod(step - self.lead, self.stride)
        return row * self.width + column if 0 <= row < self.height and column < self.width else None

    def step(self, index: int) -> int:
        """The step that generates raster index ``index``; the inverse of :meth:`raster`."""
        require(0 <= index < self.num_tokens, "index", f"one in [0, {self.num_tokens})", index)
        row, column = divmod(index, self.width)
        return self.lead + row * self.stride + column

    def forced(self, step: int) -> int | None:
        """The only token possible at ``step``: of ``opening``, ``newline``, ``end``; None where there is a choice."""
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
        """Image tokens ``(B, N)`` of generated tokens ``(B, >= length)``, without those that the grid itself writes.

        Raises:
            ValueError: fewer tokens than the grid has, or others where it writes one.
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
        """Require that every row of ``input_ids (B, S)`` ends where the image begins, with :attr:`prompt_end`.

        Raises:
            ValueError: naming the row and what it ends with.
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
        tokens: chosen, ``(B, N)`` long, vocabulary ids.
        anchors: what they were matched with, ``(B, N)`` long, vocabulary ids.
        distance: of the nearest candidate to the anchor, ``(B, N)`` float32.
        window: candidates considered, ``(B, N)`` int32.
        accepted: the nearest candidate was within ``tau``; where not, the most probable token was taken, or, where no
            window was compared (an anchor of -1), the first of the draw.
    """

    tokens: torch.Tensor
    anchors: torch.Tensor
    distance: torch.Tensor
    window: torch.Tensor
    accepted: torch.Tensor

    @classmethod
    def stack(cls, matches: Sequence, anchors: torch.Tensor) -> Record:
        """Of one match ``(B,)`` per image token, in raster order, and anchors ``(B, N)``."""
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
        """``(B, N)`` bool: there was no anchor to match; sampled."""
        return self.window == 0

    def counts(self) -> dict[str, list[int]]:
        """How many tokens of each row of the batch were kept, moved, fell back and were free."""
        return {name: getattr(self, name).sum(1).tolist() for name in ("kept", "moved", "fallback", "free")}


@dataclass(frozen=True)
class Generated:
    """Image tokens ``(B, N)``, vocabulary ids in raster order, and what matching did (None without anchors)."""

    tokens: torch.Tensor
    record: Record | None


def spread_anchors(anchors: torch.Tensor, batch: int, num_tokens: int, matcher: Matcher) -> torch.Tensor:
    """Anchors ``(B, N)`` for ``batch`` rows: every row repeated as often as ``generate`` repeats its prompt.

    An anchor of -1 leaves its position free. They come back on the device of the matcher.

    Raises:
        ValueError: not ``(B, num_tokens)`` integers, a batch that is no multiple of B, or ids that the matcher has no
            codebook row for: codes instead of vocabulary ids, say.
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
    """A matcher for anchors of -1, which it draws freely: plain generation shares path and noise with editing."""
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
