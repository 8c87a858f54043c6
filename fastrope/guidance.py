"""Guidance inside attention: requests of methods to a layer with a prompt and a negative prompt in one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import require
from .tokens import Site


@dataclass(frozen=True)
class Guidance:
    """Normalised attention guidance at one site (NAG, arXiv 2505.21179).

    Args:
        negative: the text tokens of the negative prompt, a slice of the sequence at one end of the text.
        scale, tau, alpha: of :func:`normalised_guidance`. At scale 1 the image attends to the prompt alone.
    """

    negative: slice
    scale: float
    tau: float
    alpha: float


def normalised_guidance(
    positive: Tensor,
    negative: Tensor,
    scale: float,
    tau: float,
    alpha: float,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Attention with the prompt, moved away from attention with the negative prompt (NAG, arXiv 2505.21179, eq. 7-10).

    ``z~ = s z+ - (s - 1) z-`` is shortened if its L1 norm is more than ``tau`` times that of ``z+``, then blended:
    ``z = alpha z^ + (1 - alpha) z+``.

    Args:
        positive, negative: ``z+, z-``, ``(B, S, H, D)`` floating point. A token's norm is over all heads and channels.
        scale: ``s``, dimensionless; 1 gives the positive.
        tau: the largest growth of the norm, dimensionless.
        alpha: share of the guided attention, in 0..1.
        total: sums a tensor over processes, where each has some of the heads.

    Returns:
        ``(B, S, H, D)`` in the dtype of ``positive``, computed in float32 or wider.
    """
    wide = torch.promote_types(positive.dtype, torch.float32)
    z, against = positive.to(wide), negative.to(wide)
    guided = scale * z - (scale - 1) * against
    norms = total(torch.stack([x.abs().sum(dim=(-2, -1), keepdim=True) for x in (guided, z)]))
    growth = norms[0] / norms[1]
    # A token of zeros has a growth of NaN, and the factor 1.
    shorten = torch.where(growth > tau, tau / growth, torch.ones_like(growth))
    return torch.lerp(z, guided * shorten, alpha).to(positive.dtype)


def guidance_of(methods: Iterable[Any], site: Site) -> Guidance | None:
    """The guidance of the one method with ``guidance(site) -> Guidance``; None if there is no such method.

    Raises:
        ValueError: two such methods, or one that returns something else.
    """
    found = [(m, m.guidance(site)) for m in methods if hasattr(m, "guidance")]
    found = [(m, answer) for m, answer in found if answer is not None]
    require(len(found) <= 1, "methods", "one method that guides attention", f"{len(found)} of them")
    for m, answer in found:
        require(isinstance(answer, Guidance), f"{type(m).__name__}.guidance", "a Guidance or None", repr(answer))
        return answer
    return None
