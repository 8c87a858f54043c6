"""Calls of the matcher, made small."""

from __future__ import annotations

import pytest
import torch

import fastrope as fr


@pytest.fixture
def sampler():
    """``tokens, ... = sampler(logits, seeds)``: the same draw with a window of one and everything accepted."""

    def sample(logits: torch.Tensor, seeds: torch.Tensor, position: int = 0) -> torch.Tensor:
        count = logits.shape[1]
        matcher = fr.ISLock(candidates=1, tau=torch.inf).matcher(torch.zeros(count, 1), num_tokens=8)
        return matcher(logits, torch.zeros(len(logits), dtype=torch.int64), position, seeds=seeds).tokens

    return sample
