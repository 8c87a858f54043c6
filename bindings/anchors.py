"""What the autoregressive hosts share: where a raster lies in a token stream, what was matched, what anchors look like.

Torch alone; no host library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastrope.checks import require, require_tensor
from fastrope.islock import ISLock


@dataclass(frozen=True)
class Grid:
    """Where the image tokens of a raster stand among the tokens a model generates.

    Step 0 is the first generated token. ``lead`` tokens come before the image (sizes, an image-start token); then
    ``height`` rows of ``width`` image tokens, each row followed by ``newline`` where the model has such a token.

    Args:
        height: rows of image tokens.
        width: image tokens of a row.
        newline: vocabulary id of the token that ends every row, the last one included; None for a plain raster.
        lead: generated tokens before the first image token.

    Raises:
        ValueError: a size below 1, a negative ``lead`` or ``newline``.
    """

    height: int
    width: int
    newline: int | None = None
    lead: int = 0

    def __post_init__(self):
        for name in ("height", "width"):
            value = getattr(self, name)
            require(_is_int(value) and value >= 1, f"Grid.{name}", "an integer >= 1", repr(value))
        require(_is_int(self.lead) and self.lead >= 0, "Grid.lead", "an integer >= 0", repr(self.lead))
        ok = self.newline is None or (_is_int(self.newline) and self.newline >= 0)
        require(ok, "Grid.newline", "a vocabulary id or None", repr(self.newline))

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
        """Generated tokens up to the end of the last row."""
        return self.lead + self.height * self.stride

    def raster(self, step: int) -> int | None:
        """Raster index of the token generated at ``step``, the offset less finished rows; None for other tokens."""
        offset = step - self.lead
        if offset < 0 or step >= self.length:
            return None
        row, column = divmod(offset, self.stride)
        return row * self.width + column if column < self.width else None

    def step(self, index: int) -> int:
        """The step that generates raster index ``index``; the inverse of :meth:`raster`."""
        require(0 <= index < self.num_tokens, "index", f"one in [0, {self.num_tokens})", index)
        row, column = divmod(index, self.width)
        return self.lead + row * self.stride + column

    def forced(self, step: int) -> int | None:
        """The only token possible at ``step``: ``newline`` at the end of a row, else None."""
        offset = step - self.lead
        if self.newline is None or offset < 0 or step >= self.length:
            return None
        return self.newline if offset % self.stride == self.width else None

    def flatten(self, tokens: torch.Tensor) -> torch.Tensor:
        """Image tokens ``(B, N)`` of generated tokens ``(B, >= length)``, without lead and row ends.

        Raises:
            ValueError: fewer tokens than the grid has, or rows that do not end with ``newline``.
        """
        require_tensor("tokens", tokens, (2,), f"(B, at least {self.length})")
        require(tokens.shape[1] >= self.length, "tokens", f"at least {self.length} per row", tokens.shape[1])
        rows = tokens[:, self.lead : self.length].reshape(-1, self.height, self.stride)
        if self.newline is not None:
            ends = rows[..., -1]
            found = ends[ends != self.newline]
            require(not len(found), "tokens", f"rows that end with {self.newline}", found[:1].tolist())
        return rows[..., : self.width].reshape(-1, self.num_tokens)


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


def spread_anchors(anchors: torch.Tensor, batch: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """Anchors ``(B, N)`` for ``batch`` rows: every row repeated as often as ``generate`` repeats its prompt.

    An anchor of -1 leaves its position free.

    Raises:
        ValueError: not ``(B, num_tokens)`` integers, or a batch that is no multiple of B.
    """
    require_tensor("anchors", anchors, (2,), f"(B, {num_tokens})")
    integers = not anchors.is_floating_point() and anchors.dtype != torch.bool
    require(integers, "anchors", "vocabulary ids of an integer dtype", anchors.dtype)
    require(anchors.shape[1] == num_tokens, "anchors", f"shape (B, {num_tokens})", tuple(anchors.shape))
    rows = anchors.shape[0]
    require(rows > 0 and batch % rows == 0, "anchors", f"a number of rows that divides the batch of {batch}", rows)
    return anchors.to(device=device, dtype=torch.long).repeat_interleave(batch // rows, dim=0)


def plain_matcher(num_tokens: int, device: torch.device):
    """A matcher for anchors of -1, which it draws freely: plain generation shares path and noise with editing."""
    return ISLock(candidates=1).matcher(torch.zeros(1, 1, device=device), num_tokens=num_tokens)


def guide(logits: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance ``u + (c - u) * scale`` of logits ``(2B, V)``, conditional half first: ``(B, V)``."""
    conditional, unconditional = logits.chunk(2)
    if scale == 1:
        return conditional
    return unconditional + (conditional - unconditional) * scale


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
