"""What all tests on a device need."""

from __future__ import annotations

import pytest
import torch
from numerics import DEVICE

# Axis blocks: their mean error is 1.2 to 1.5 times the reference's (docs/limits.md).
KNOWN = {f"test_head_dims[{dim}-torch.float32-distinct]" for dim in (96, 128, 256)}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name in KNOWN:
            item.add_marker(pytest.mark.xfail(reason="docs/limits.md", raises=AssertionError, strict=False))


@pytest.fixture(autouse=True)
def _poison():
    """Leave NaN in the memory that outputs are allocated from: an element that no kernel writes shows."""
    torch.full((2**28,), torch.nan, device=DEVICE)
