"""diffusers' layer skipping and perturbed attention: a bound layer is skipped like one with the host's processor."""

from __future__ import annotations

import contextlib

from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch.overrides import _get_current_function_mode_stack


def register(bound: type, original: type) -> None:
    """Tell diffusers what a skipped layer returns: the same with a ``bound`` processor as with the ``original`` one.
    diffusers looks processors up by class. If it cannot skip the original, it cannot skip the bound one either."""
    if bound not in AttentionProcessorRegistry._registry:
        with contextlib.suppress(ValueError):
            AttentionProcessorRegistry.register(bound, AttentionProcessorRegistry.get(original))


def perturbed() -> bool:
    """True if diffusers takes the values of the running layer as its attention (perturbed-attention guidance)."""
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in _get_current_function_mode_stack())
