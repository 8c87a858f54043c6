"""What nodes have in common: their inputs for places in a run, and pictures as the host hands them over."""

from __future__ import annotations

import re
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from fastrope.checks import require

CATEGORY = "FastRoPE"


def model_input(tooltip: str = "The model to steer. The one you hand in stays as it is.") -> Any:
    """The model that a node clones."""
    return io.Model.Input("model", tooltip=tooltip)


def reference_input(tooltip: str, default: int = -1, least: int = -1, advanced: bool = False) -> Any:
    """Which reference picture, by its place in the conditioning."""
    return io.Int.Input("reference", default=default, min=least, max=63, advanced=advanced or None, tooltip=tooltip)


def window_inputs() -> list:
    """Inputs for when in a run a node acts: two fractions of the steps."""
    percent = dict(min=0.0, max=1.0, step=0.01, advanced=True)
    return [
        io.Float.Input(
            "start_percent", default=0.0, tooltip="Where in the run to begin: 0 is the first step.", **percent
        ),
        io.Float.Input(
            "end_percent", default=1.0, tooltip="Where in the run to end: 1 is behind the last step.", **percent
        ),
    ]


def layers_input() -> Any:
    """An input for the layers where a node acts."""
    told = "Which attention layers, counted from 0 in order, such as 0-18, 25. Empty: all."
    return io.String.Input("layers", default="", advanced=True, tooltip=told)


def steps_of(start_percent: float, end_percent: float) -> tuple[float, float] | None:
    """The fractions of a run, or None for all of it.

    Raises:
        ValueError: an end that is not behind the start.
    """
    require(
        start_percent < end_percent, "end_percent", f"a number above start_percent ({start_percent:g})", end_percent
    )
    return None if (start_percent, end_percent) == (0.0, 1.0) else (float(start_percent), float(end_percent))


def layers_of(text: str) -> set[int] | None:
    """``"0-18, 25"`` as a set; None for an empty text.

    Raises:
        ValueError: something else than numbers and ranges.
    """
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
        require(match is not None, "layers", "numbers and ranges without quotes, such as 0-18, 25", repr(text))
        first, last = int(match[1]), int(match[2] or match[1])
        require(first <= last, "layers", "ranges that count up", repr(part))
        found |= set(range(first, last + 1))
    return found or None


def one_picture(name: str, images: Any) -> Tensor:
    """``(3, H, W)`` in 0..1 of an IMAGE ``(1, H, W, 3 or more)``.

    Raises:
        ValueError: several pictures.
    """
    require(isinstance(images, Tensor) and images.ndim == 4, name, "an IMAGE", type(images).__name__)
    require(len(images) == 1, name, "one picture", f"a batch of {len(images)}")
    return images[0, ..., :3].movedim(-1, 0).float().clamp(0, 1).cpu()


def one_mask(name: str, masks: Any) -> Tensor:
    """``(H, W)`` bool of a MASK ``(1, H, W)``: where it is white by half.

    Raises:
        ValueError: several masks.
    """
    require(isinstance(masks, Tensor) and masks.ndim in (2, 3), name, "a MASK", type(masks).__name__)
    masks = masks.reshape(-1, *masks.shape[-2:])
    require(len(masks) == 1, name, "one mask", f"a batch of {len(masks)}")
    return masks[0].cpu() >= 0.5


def as_image(picture: Tensor) -> Tensor:
    """An IMAGE of ``(3, H, W)`` in 0..1."""
    return picture.movedim(0, -1)[None].to(torch.float32).contiguous()
