"""Checks of arguments that all autoregressive hosts share. They need torch and no host library."""

from __future__ import annotations

import math
from numbers import Real

import torch

from fastrope.checks import is_whole, require, require_finite, require_tensor


def check_sampling(guidance: float | None, temperature: float, top_k: int, top_p: float) -> None:
    """Require valid numbers for sampling.

    Raises:
        ValueError: naming the argument.
    """
    fits = guidance is None or (_number(guidance) and math.isfinite(guidance))
    require(fits, "guidance", "a finite number, or None for the condition alone", repr(guidance))
    fits = _number(temperature) and 0 < temperature < math.inf
    require(
        fits, "temperature", "a finite number > 0; top_k=1 takes the most probable token (greedy)", repr(temperature)
    )
    require(is_whole(top_k) and top_k >= 0, "top_k", "an integer >= 0; 0 keeps all, 1 is greedy", repr(top_k))
    require(_number(top_p) and 0 < top_p <= 1, "top_p", "a number in (0, 1]; 1 keeps all", repr(top_p))


def check_pixels(pixels: torch.Tensor) -> None:
    """Require pictures ``(B, 3, H, W)`` as tokenizers take them: floating point, finite, about -1..1.

    Raises:
        ValueError: another shape or dtype, or values of 0..255.
    """
    require_tensor("pixels", pixels, (4,), "(B, 3, H, W)")
    require(pixels.shape[1] == 3, "pixels", "shape (B, 3, H, W)", tuple(pixels.shape))
    require(pixels.is_floating_point(), "pixels", "a floating dtype, about -1..1", pixels.dtype)
    require_finite("pixels", pixels, ("row", "channel", "y", "x"))
    largest = float(pixels.abs().max()) if pixels.numel() else 0.0
    require(largest <= 4, "pixels", "values about -1..1: pixels / 127.5 - 1 for 8 bits", f"one of size {largest:g}")


def check_codes(name: str, tokens: torch.Tensor, known: torch.Tensor) -> None:
    """Require integer tokens ``(B, N)`` that are all among the ids ``known (V_img,)``.

    Raises:
        ValueError: naming the first others.
    """
    require_tensor(name, tokens, (2,), "(B, N)")
    integers = not tokens.is_floating_point() and tokens.dtype != torch.bool
    require(integers, name, "ids of an integer dtype", tokens.dtype)
    inside = torch.isin(tokens, known.to(tokens.device))
    wrong = tokens[~inside]
    require(not len(wrong), name, "image tokens alone", f"{wrong[:3].tolist()} and {len(wrong)} such in all")


def check_mask(name: str, mask: torch.Tensor, shape: tuple[int, int], made_by: str) -> None:
    """Require a mask ``(B, S)`` of zeros (padding) and then ones, with at least one 1 in every row.

    Raises:
        ValueError: naming the rows that are padded on the right, have holes, or are empty.
    """
    require_tensor(name, mask, (2,), str(shape))
    require(tuple(mask.shape) == shape, name, f"shape {shape}", tuple(mask.shape))
    binary = bool(((mask == 0) | (mask == 1)).all())
    require(binary, name, "1 where a token counts and 0 at padding", f"other values ({mask.dtype})")
    counts = mask.long()
    rows = (counts.diff(dim=1) < 0).any(1).nonzero().flatten().tolist()
    require(not rows, name, f"padding on the left, zeros before ones: {made_by}", f"zeros after ones in row(s) {rows}")
    rows = (counts.sum(1) == 0).nonzero().flatten().tolist()
    require(not rows, name, "a token that counts in every row", f"none in row(s) {rows}")


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
