"""Whether kernels are interpreted here, and the text of the README."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrope import device as devices

README = " ".join((Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").split())


interpreted = pytest.mark.skipif(not devices.interpreted(), reason="runs interpreted kernels on CPU tensors")
