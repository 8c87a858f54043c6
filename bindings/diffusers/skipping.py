"""diffusers' layer skipping and perturbed attention: a bound layer is skipped as the host's own is."""

from __future__ import annotations

import contextlib

from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch.overrides import _get_current_function_mode_stack


def register(bound: type, own: type) -> None:
    """Tell diffusers, which looks processors up by class, what comes out of a skipped layer: what comes out of one with
    the host's ``own`` processor. Where it cannot skip that one, it cannot skip the ``bound`` one either."""
    if bound not in AttentionProcessorRegistry._registry:
        with contextlib.suppress(ValueError):
            AttentionProcessorRegistry.register(bound, AttentionProcessorRegistry.get(own))


def perturbed() -> bool:
    """Whether diffusers takes the values of the layer that runs for its attention (perturbed-attention guidance)."""
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in _get_current_function_mode_stack())
