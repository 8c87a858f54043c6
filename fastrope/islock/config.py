"""What ISLock is told, and the window it makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import TYPE_CHECKING

from ..checks import require

if TYPE_CHECKING:
    import torch

    from .matcher import Matcher

METRICS = ("l2", "cosine")


def whole(value: object) -> bool:
    """Whether ``value`` is an integer and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value


@dataclass(frozen=True)
class ISLock:
    """Anchor token matching for autoregressive image models (ISLock, arXiv 2504.10434).

    At position i of N, the first ``|W_i| = floor(K (1 - alpha i / N))`` candidates of a draw without replacement are
    compared with the original token, ``s_k = distance(e(z_k), e(z_org))``. The nearest is taken where ``s <= tau``,
    the most probable token otherwise (AdaCR). The defaults are the paper's for LlamaGen; for Lumina-mGPT it gives
    ``ISLock(candidates=100, tau=0.4, metric="cosine")``.

    Args:
        candidates: K, tokens drawn at the first position; 1 is plain sampling where tau is infinite.
        alpha: how much of the window is gone at the last position, 0 to 1, read as the decimal it is written as.
        tau: the largest distance accepted, from 0 to infinity; the larger, the closer to the original.
        metric: ``"l2"``, the squared Euclidean distance, or ``"cosine"``, the distance ``1 - cos``, from 0 to 2.

    Raises:
        ValueError: an argument outside its range.
    """

    candidates: int = 150
    alpha: float = 0.6
    tau: float = 1.0
    metric: str = "l2"

    def __post_init__(self):
        require(whole(self.candidates) and 1 <= self.candidates < 2**31, "ISLock.candidates",
                "a whole number from 1, below 2**31", repr(self.candidates))  # fmt: skip
        require(_number(self.alpha) and 0 <= self.alpha <= 1, "ISLock.alpha", "a number from 0 to 1", repr(self.alpha))
        require(_number(self.tau) and self.tau >= 0, "ISLock.tau", "a number from 0, infinity included", repr(self.tau))
        require(self.metric in METRICS, "ISLock.metric", f"one of {METRICS}", repr(self.metric))

    def window(self, i: int, n: int) -> int:
        """``|W_i| = floor(K (1 - alpha i / n))``, at least 1: the candidates compared at position ``i`` of ``n``.

        Raises:
            ValueError: ``n`` below 1, or ``i`` outside ``0 .. n - 1``.
        """
        require(whole(n) and n >= 1, "n", "a whole number from 1", repr(n))
        require(whole(i) and 0 <= i < n, "i", f"a position from 0 to {n - 1}", repr(i))
        # As a fraction: the product of floats falls below whole numbers that it should reach.
        return max(1, math.floor(self.candidates * (1 - Fraction(str(self.alpha)) * Fraction(int(i), int(n)))))

    def matcher(
        self,
        codebook: torch.Tensor,
        *,
        num_tokens: int,
        token_ids: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> Matcher:
        """Bind to a codebook and an image of ``num_tokens`` positions.

        Args:
            codebook: ``(V_img, d)``, floating point; the matcher lives on its device.
            num_tokens: N, the positions of one image.
            token_ids: ``(V_img,)`` integers, the vocabulary id of each codebook row; None takes ``0 .. V_img - 1``.
            backend: ``"auto"``, ``"triton"`` or ``"eager"``.

        Raises:
            ValueError: a wrong shape, dtype, device or id.
        """
        from .matcher import Matcher

        return Matcher(self, codebook, num_tokens=num_tokens, token_ids=token_ids, backend=backend)
