"""ISLock's settings, and their matcher for a codebook, which checks calls and makes tensors for the op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import is_whole, require, require_tensor
from .op import match_anchors

METRICS = ("l2", "cosine")
BACKENDS = ("auto", "triton", "eager")
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class ISLock:
    """Anchor token matching for autoregressive image models (ISLock, arXiv 2504.10434).

    At position i of N, the first ``|W_i| = floor(K (1 - alpha i / N))`` candidates of a draw without replacement are
    compared with the original token, ``s_k = distance(e(z_k), e(z_org))``. The nearest candidate is taken if
    ``s <= tau``, the most probable token otherwise (AdaCR). The defaults are the paper's for LlamaGen. For Lumina-mGPT
    the paper has ``ISLock(candidates=100, tau=0.4, metric="cosine")``.

    Args:
        candidates: K, number of tokens drawn at the first position; 1 with an infinite tau is plain sampling.
        alpha: share of the window that is gone at the last position, 0 to 1; read as a decimal number.
        tau: the largest accepted distance, from 0 to infinity. A larger one gives a result closer to the original.
        metric: ``"l2"``, the squared Euclidean distance, or ``"cosine"``, the distance ``1 - cos``, from 0 to 2.

    Raises:
        ValueError: an argument outside its range.
    """

    candidates: int = 150
    alpha: float = 0.6
    tau: float = 1.0
    metric: str = "l2"

    def __post_init__(self) -> None:
        require(is_whole(self.candidates) and 1 <= self.candidates < 2**31, "ISLock.candidates",
                "a whole number from 1, below 2**31", repr(self.candidates))  # fmt: skip
        require(
            _is_number(self.alpha) and 0 <= self.alpha <= 1, "ISLock.alpha", "a number from 0 to 1", repr(self.alpha)
        )
        require(
            _is_number(self.tau) and self.tau >= 0, "ISLock.tau", "a number from 0, infinity included", repr(self.tau)
        )
        require(self.metric in METRICS, "ISLock.metric", f"one of {METRICS}", repr(self.metric))

    def window(self, i: int, n: int) -> int:
        """``|W_i| = floor(K (1 - alpha i / n))``, at least 1: number of candidates at position ``i`` of ``n``.

        Raises:
            ValueError: ``n`` below 1, or ``i`` outside ``0 .. n - 1``.
        """
        require(is_whole(n) and n >= 1, "n", "a whole number from 1", repr(n))
        require(is_whole(i) and 0 <= i < n, "i", f"a position from 0 to {n - 1}", repr(i))
        # With fractions, because a product of floats can fall just below the whole number that it should be.
        return max(1, math.floor(self.candidates * (1 - Fraction(str(self.alpha)) * Fraction(int(i), int(n)))))

    def matcher(
        self,
        codebook: Tensor,
        *,
        num_tokens: int,
        token_ids: Tensor | None = None,
        backend: str = "auto",
    ) -> Matcher:
        """Bind to a codebook and an image of ``num_tokens`` positions.

        Args:
            codebook: ``(V_img, d)``, floating point; the matcher lives on its device.
            num_tokens: N, the positions of one image.
            token_ids: ``(V_img,)`` integers, the vocabulary id of each codebook row; None means ``0 .. V_img - 1``.
            backend: ``"auto"``, ``"triton"`` or ``"eager"``.

        Raises:
            ValueError: a wrong shape, dtype, device or id.
        """
        return Matcher(self, codebook, num_tokens=num_tokens, token_ids=token_ids, backend=backend)


class Match(NamedTuple):
    """What happened at one position, row by row.

    * ``tokens`` ``(B,)`` int64: the vocabulary ids to append.
    * ``distance`` ``(B,)`` float32: ``min s`` over the window, accepted or not; infinite if there was nothing to
      compare.
    * ``window`` ``(B,)`` int32: number of candidates, the smaller of ``|W_i|`` and the number of tokens with a
      probability above 0; 0 in rows drawn freely (not active, or an anchor without a codebook row).
    * ``accepted`` ``(B,)`` bool. True: the nearest candidate was taken. False: the most probable token was taken, or,
      if ``window`` is 0, the first token of the draw.
    """

    tokens: Tensor
    distance: Tensor
    window: Tensor
    accepted: Tensor


class Matcher:
    """Token matcher of one codebook; made by :meth:`fastrope.ISLock.matcher`, which lists its arguments."""

    def __init__(
        self,
        lock: ISLock,
        codebook: Tensor,
        *,
        num_tokens: int,
        token_ids: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        require_tensor("codebook", codebook, (2,), "(V_img, d)")
        require(codebook.is_floating_point(), "codebook", "a floating-point tensor", codebook.dtype)
        require(min(codebook.shape) > 0, "codebook", "at least one row and one channel", tuple(codebook.shape))
        require(is_whole(num_tokens) and num_tokens >= 1, "num_tokens", "a whole number from 1", repr(num_tokens))
        require(backend in BACKENDS, "backend", f"one of {BACKENDS}", repr(backend))
        self.lock = lock
        self.num_tokens = int(num_tokens)
        self.backend = backend
        device = codebook.device
        self.codebook = codebook.detach().contiguous()
        self.rows = _rows(token_ids, codebook)
        windows = [lock.window(i, self.num_tokens) for i in range(self.num_tokens)]
        self.windows = torch.tensor(windows, dtype=torch.int32, device=device)
        # For an integer position, a view of this tensor saves a copy to the device per token.
        self.positions = torch.arange(self.num_tokens, device=device)

    def seeds(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Seeds ``(batch,)`` int64 on the matcher's device, one per row.

        Args:
            generator: one for all rows, or one per row; None means torch's default generator of the device. A generator
                of another device costs a copy, which a CUDA graph cannot capture.
        """
        if isinstance(generator, Sequence):
            require(len(generator) == batch, "generator", f"one generator, or one for each of {batch} rows",
                    len(generator))  # fmt: skip
            return torch.cat([self.seeds(1, g) for g in generator])
        kind = isinstance(generator, torch.Generator) or generator is None
        require(kind, "generator", "a torch.Generator, one per row, or None", type(generator).__name__)
        device = self.codebook.device if generator is None else generator.device
        seeds = torch.randint(2**63 - 1, (batch,), generator=generator, device=device)
        return seeds.to(self.codebook.device, non_blocking=True)

    def __call__(
        self,
        logits: Tensor,
        anchors: Tensor,
        position: int | Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        active: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Match:
        """Choose the token of one position in every row. Never waits for the device.

        Noise is a function of a row's seed, the position and the token id alone, so rows do not depend on each other
        and a batch equals its rows under the same ``seeds``.

        Args:
            logits: ``(B, V)``, floating point, any strides, after guidance, temperature, top-k and top-p; computed in
                float32. Tokens at -inf or NaN, or with probability 0 in float32, are never drawn. A row without any
                other token gives token 0, not accepted.
            anchors: ``(B,)`` int32 or int64, the original tokens as vocabulary ids. A row whose anchor has no codebook
                row (a text token, -1) is drawn freely: it takes the first token of the draw, which is plain sampling.
            position: the raster index i of the image token, 0 to ``num_tokens - 1``: an int, or an integer tensor
                ``()``, ``(1,)`` or ``(B,)`` on the device of the logits. Values of a tensor are not checked, but
                clamped to that range.
            generator: source of new seeds, one or one per row; see :meth:`seeds`.
            active: ``(B,)`` bool; rows with False are drawn freely, as at the end-of-line tokens of a raster.
            seeds: ``(B,)`` int64, instead of ``generator``: drawn once per image, they save a launch per token.

        Returns:
            A :class:`Match`.

        Raises:
            ValueError: a wrong shape, dtype or device, a position out of range, or both a generator and seeds.
            NotImplementedError: ``backend="triton"``, and the kernel cannot run.
        """
        batch = self._check(logits, anchors, active)
        position = self._position(position, batch)
        if seeds is None:
            seeds = self.seeds(batch, generator)
        else:
            require(generator is None, "seeds", "either seeds or a generator", "both")
            self._check_row_tensor("seeds", seeds, batch, (torch.int64,))
        lock = self.lock
        tables = self.codebook, self.rows, self.windows
        return Match(*match_anchors(logits.detach(), anchors.long(), position, seeds, active, *tables,
                                    lock.candidates, float(lock.tau), lock.metric, self.backend))  # fmt: skip

    def _check(self, logits: Tensor, anchors: Tensor, active: Tensor | None) -> int:
        require_tensor("logits", logits, (2,), "(B, V)")
        require(logits.is_floating_point(), "logits", "a floating-point tensor", logits.dtype)
        batch, vocab = logits.shape
        require(batch >= 1, "logits", "at least one row", (batch, vocab))
        known = self.rows.shape[0]
        require(vocab >= known, "logits", f"at least {known} vocabulary entries, as token_ids name", vocab)
        device = self.codebook.device
        require(logits.device == device, "logits", f"the device of the codebook, {device}", logits.device)
        self._check_row_tensor("anchors", anchors, batch, INTEGERS)
        if active is not None:
            self._check_row_tensor("active", active, batch, (torch.bool,))
        return batch

    def _check_row_tensor(self, name: str, x: Tensor, batch: int, dtypes: tuple[torch.dtype, ...]) -> None:
        require_tensor(name, x, (1,), "(B,)")
        require(x.shape[0] == batch, name, f"shape ({batch},), a value per row of the logits", tuple(x.shape))
        require(x.dtype in dtypes, name, " or ".join([str(d) for d in dtypes]), x.dtype)
        device = self.codebook.device
        require(x.device == device, name, f"the device of the codebook, {device}", x.device)

    def _position(self, position: int | Tensor, batch: int) -> Tensor:
        if not isinstance(position, torch.Tensor):
            last = self.num_tokens - 1
            if not (is_whole(position) and 0 <= position <= last):  # compilers cannot print what they count with
                require(False, "position", f"an integer from 0 to {last} or a tensor", repr(position))
            return self.positions[position : position + 1].expand(batch)
        device = self.codebook.device
        require(position.dtype in INTEGERS, "position", "int32 or int64", position.dtype)
        fits = position.ndim <= 1 and position.numel() in (1, batch)
        require(fits, "position", f"shape (), (1,) or ({batch},)", tuple(position.shape))
        require(position.device == device, "position", f"the device of the codebook, {device}", position.device)
        return position.long().reshape(-1).expand(batch)


def _rows(token_ids: Tensor | None, codebook: Tensor) -> Tensor:
    """Codebook row of every vocabulary id up to the largest one in the codebook, int32; -1 for ids without a row."""
    count, device = codebook.shape[0], codebook.device
    if token_ids is None:
        return torch.arange(count, dtype=torch.int32, device=device)
    require_tensor("token_ids", token_ids, (1,), "(V_img,)")
    require(token_ids.dtype in INTEGERS, "token_ids", "int32 or int64", token_ids.dtype)
    require(token_ids.shape[0] == count, "token_ids", f"an id for each of {count} codebook rows", token_ids.shape[0])
    ids = token_ids.detach().to("cpu", torch.int64)
    low = int(ids.min())
    require(low >= 0, "token_ids", "ids from 0", low)
    rows = torch.full((int(ids.max()) + 1,), -1, dtype=torch.int32, device="cpu")
    rows[ids] = torch.arange(count, dtype=torch.int32, device="cpu")
    distinct = int((rows >= 0).sum())
    require(distinct == count, "token_ids", f"{count} distinct ids", f"{distinct} distinct ids")
    return rows.to(device)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value
