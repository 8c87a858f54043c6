"""The arguments of the host's call of a model, ``BaseModel.apply_model``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .compiled import COMPILED
from .marks import MARK

ARGUMENTS = ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options")  # in their order


def is_compiled(options: Mapping[str, Any]) -> bool:
    """Whether a node has compiled the model."""
    return COMPILED in options.get("wrappers", {}).get("apply_model", {})


def called(executor: Callable, arguments: Mapping[str, Any], options: dict) -> Any:
    """The host's call with other options, and without our mark."""
    arguments = {**arguments, "transformer_options": options}
    arguments.pop(MARK, None)
    in_order = [arguments.pop(name, None) for name in ARGUMENTS]
    return executor(*in_order, **arguments)


def key_mask(mask: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """``(B, text)`` bool of a mask over the prompt's tokens; None where all count."""
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.ndim != 2:
        return None
    mask = mask.detach().to("cpu", torch.bool)
    return None if bool(mask.all()) or mask.shape[1] != arguments["c_crossattn"].shape[1] else mask
