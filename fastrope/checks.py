"""One way to say what is wrong with an argument. Real exceptions, so they survive ``python -O``."""

from __future__ import annotations

import torch


def require(condition: bool, argument: str, expected: object, received: object) -> None:
    """Raise ``ValueError`` naming the argument, what was expected and what came, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, received {received}")


def require_tensor(argument: str, value: object, ndim: tuple[int, ...], shape_hint: str) -> None:
    """Require a ``torch.Tensor`` of one of the given ranks."""
    require(isinstance(value, torch.Tensor), argument, f"a torch.Tensor {shape_hint}", type(value).__name__)
    require(value.ndim in ndim, argument, f"shape {shape_hint}", tuple(value.shape))
