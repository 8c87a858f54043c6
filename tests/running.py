"""Whether kernels are interpreted here."""

from __future__ import annotations

import pytest

from fastrope import device as devices

interpreted = pytest.mark.skipif(not devices.interpreted(), reason="runs interpreted kernels on CPU tensors")
