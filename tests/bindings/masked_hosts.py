"""Every tiny host, and a call of one with a text mask."""

from __future__ import annotations

import pytest
import torch
from diffusers_hosts import TINY_HOSTS
from tiny_transformers import TEXT

ALL = pytest.mark.parametrize("host", TINY_HOSTS.values(), ids=TINY_HOSTS)


def masked_call(host) -> tuple[dict, torch.Tensor]:
    """A batch whose second prompt is two tokens shorter, and its key mask."""
    call = host.call(host.layout)
    mask = torch.ones(2, len(host.layout), dtype=torch.bool)
    mask[1, TEXT - 2 : TEXT] = False
    if host.name == "chroma":
        return call | {"attention_mask": mask}, mask
    return call | {"encoder_hidden_states_mask": mask[:, :TEXT].float()}, mask
