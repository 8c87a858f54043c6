"""A LogitsProcessor that chooses the token itself, by guidance, warping and matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastrope.checks import require, require_tensor

from ..anchors import Grid, Record, guide, plain_matcher, spread_anchors
from ..inputs import check_sampling

# Options of generate() with an AnchorProcessor: sampling (required for several sequences per prompt), no warpers, and
# tokens as the result.
ONE_TOKEN_LEFT = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, return_dict_in_generate=False)


class AnchorProcessor(LogitsProcessor):
    """Anchor token matching (ISLock, arXiv 2504.10434) as a logits processor of ``generate()``.

    At every image token, the scores that it returns are -inf for all but the chosen token. So nothing that ``generate``
    does afterwards, sampling included, changes the choice; guidance must come before. One processor serves one call of
    ``generate``; afterwards ``record`` says what happened. Greedy search and sampling work, beams and assisted decoding
    do not. If other tokens were appended than the chosen ones, reading ``tokens`` or ``record`` raises an error.

    Rows of the scores, B images:

    * ``guidance`` None: scores ``(B, V)``, which already have guidance or need none (``guidance_scale`` of ``generate``
      runs before this processor, except in Janus).
    * ``guidance`` a number: scores ``(2B, V)``, the conditional half first; ``u + (c - u) * guidance``. If
      ``input_ids`` has B rows (Janus), B rows of scores are returned; if it has 2B rows, both halves with equal values.

    Args:
        grid: where image tokens stand among the generated ones.
        matcher: ``fr.ISLock(...).matcher(codebook, num_tokens=grid.num_tokens, token_ids=...)``; None samples.
        anchors: the original's image tokens in raster order, ``(B, N)`` vocabulary ids, or fewer rows that divide B;
            each is repeated as ``num_return_sequences`` repeats prompts. -1 leaves a position free. Required with a
            matcher, and not allowed without one.
        image_ids: ``(V_img,)`` vocabulary ids of image tokens; all others are removed before warping. None leaves that
            to the model.
        guidance: see above.
        temperature, top_k, top_p: applied in this order after guidance, by transformers' own warpers; 1, 0 and 1 do
            nothing. Those of ``generate`` come later and have no effect.
        force_rows: write the grid's ``opening``, ``newline`` and ``end``; False leaves them to the model's own prefix
            function.
        growing: ``input_ids`` grows by one token per step, which is checked; False if it does not grow (Janus).
        generator: source of the seeds, one for the batch or one per row.

    Raises:
        ValueError: wrong arguments or rows, prompts that do not end right before the grid's image, a skipped step, more
            steps than tokens; when ``tokens`` or ``record`` are read, other tokens than the chosen ones.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        matcher: Any = None,
        anchors: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        guidance: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        force_rows: bool = True,
        growing: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> None:
        require(isinstance(grid, Grid), "grid", "a Grid", type(grid).__name__)
        require((matcher is None) == (anchors is None), "anchors", "a matcher and anchors, or neither", "one of them")
        fits = matcher is None or matcher.num_tokens == grid.num_tokens
        require(fits, "matcher", f"one for the grid's {grid.num_tokens} tokens", getattr(matcher, "num_tokens", None))
        if image_ids is not None:
            require_tensor("image_ids", image_ids, (1,), "(V_img,)")
        self.grid, self.matcher, self.image_ids = grid, matcher, image_ids
        self.guidance, self.force_rows, self.growing, self.generator = guidance, force_rows, growing, generator
        check_sampling(guidance, temperature, top_k, top_p)
        self.warpers = warpers(temperature, top_k, top_p)
        self._sampled = matcher is None
        self._anchors = torch.full((1, grid.num_tokens), -1, device="cpu") if anchors is None else anchors
        self._allowed: torch.Tensor | None = None
        self._seeds: torch.Tensor | None = None
        self._matches: list = []
        self._step = 0
        self._first: torch.Size | None = None
        self._chosen: torch.Tensor | None = None  # the last tokens, one per row of input_ids
        self._followed: torch.Tensor | None = None  # bool: every choice was appended; read at the end, to avoid waits

    @property
    def tokens(self) -> torch.Tensor:
        """Image tokens chosen so far, ``(B, n)`` long, vocabulary ids in raster order."""
        return torch.stack([match.tokens for match in self._read()], dim=1)

    @property
    def record(self) -> Record | None:
        """The record of matching so far; None without a matcher."""
        matches = self._read()
        return None if self._sampled else Record.stack(matches, self._anchors)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``(B or 2B, V)`` with -inf everywhere but at the chosen tokens, in the dtype they came in."""
        step = self._advance(input_ids)
        both, batch = self._rows(input_ids, scores)
        logits = scores.float() if self.guidance is None else guide(scores.float(), self.guidance)
        written = self.grid.forced(step) if self.force_rows else None
        index = self.grid.raster(step)
        if written is not None:
            tokens = torch.full((batch,), written, device=scores.device)
        elif index is None:
            self._chosen = None
            logits = logits.to(scores.dtype)
            return torch.cat([logits, logits]) if both else logits
        else:
            tokens = self._match(self.warpers(cast(Any, input_ids), self._cut(logits)), index)
        self._chosen = torch.cat([tokens, tokens]) if both else tokens
        chosen = torch.full_like(logits, -torch.inf, dtype=scores.dtype).scatter_(1, tokens[:, None], 0.0)
        return torch.cat([chosen, chosen]) if both else chosen

    def _read(self) -> list:
        """The matches so far, if their tokens were appended."""
        require(len(self._matches) > 0, "processor", "one that has run", "no matched tokens")
        followed = self._followed is None or bool(self._followed)
        how = "a generate() that appends the chosen tokens, without assistants or processors that change the choice"
        require(followed, "processor", how, "other tokens in input_ids")
        return self._matches

    def _advance(self, input_ids: torch.Tensor) -> int:
        """This call's step, after checking it against ``input_ids``."""
        step = self._step
        if self._first is None:
            self.grid.check_prompt(input_ids)
            self._first = input_ids.shape
        rows, length = self._first
        expected = length + (step if self.growing else 0)
        how = f"{expected} columns, one more per step" if self.growing else f"{expected} columns, as at first"
        hint = "; a processor serves one call of generate, without beams or assistants"
        require(input_ids.shape[1] == expected, "input_ids", how + hint, input_ids.shape[1])
        require(input_ids.shape[0] == rows, "input_ids", f"{rows} rows, as at first{hint}", input_ids.shape[0])
        last = self.grid.length
        require(self.growing or step < last, "processor", f"{last} steps" + hint, step + 1)
        if self.growing and self._chosen is not None:
            same = (input_ids[:, -1] == self._chosen).all()
            self._followed = same if self._followed is None else self._followed & same
        self._step += 1
        return step

    def _rows(self, input_ids: torch.Tensor, scores: torch.Tensor) -> tuple[bool, int]:
        """Whether to return both halves, and the number of images."""
        rows, ids = scores.shape[0], input_ids.shape[0]
        if self.guidance is None:
            hint = "; guidance=... where the model's unconditional rows come along"
            require(rows == ids, "scores", f"{ids} rows, as input_ids{hint}", rows)
            return False, rows
        if rows == 2 * ids:
            return False, ids
        hint = "twice the rows of input_ids, or an even batch whose second half is unconditional"
        require(rows == ids and rows % 2 == 0, "scores", hint, f"{rows} rows and {ids} of input_ids")
        return True, rows // 2

    def _cut(self, logits: torch.Tensor) -> torch.Tensor:
        """-inf outside the image vocabulary."""
        if self.image_ids is None:
            return logits
        if self._allowed is None:
            mask = torch.zeros(logits.shape[1], dtype=torch.bool, device="cpu")
            ids = self.image_ids.cpu()
            inside = len(ids) > 0 and int(ids.min()) >= 0 and int(ids.max()) < len(mask)
            require(inside, "image_ids", f"ids of a vocabulary of {len(mask)}", "others")
            mask[ids] = True
            self._allowed = mask.to(logits.device)
        return logits.masked_fill(~self._allowed, -torch.inf)

    def _match(self, logits: torch.Tensor, index: int) -> torch.Tensor:
        batch, device = logits.shape[0], logits.device
        if self._seeds is None:
            if self.matcher is None:
                self.matcher = plain_matcher(self.grid.num_tokens, device)
            self._anchors = spread_anchors(self._anchors, batch, self.grid.num_tokens, self.matcher)
            self._seeds = self.matcher.seeds(batch, self.generator)
        match = self.matcher(logits, self._anchors[:, index], index, seeds=self._seeds)
        self._matches.append(match)
        return match.tokens


def warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """transformers' own warpers for what differs from 1, 0 and 1, in the order of ``generate``."""
    chain = LogitsProcessorList()
    if temperature != 1:
        chain.append(TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    return chain
