"""What all tests on a device need."""

from __future__ import annotations

import pytest
import torch
from numerics import DEVICE


@pytest.fixture(autouse=True)
def _poison():
    """Leave NaN in the memory that outputs are allocated from: an element that no kernel writes shows."""
    torch.full((2**28,), torch.nan, device=DEVICE)
