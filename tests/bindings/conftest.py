"""What all tests of the diffusers binding share: the tiny hosts beside this file."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # diffusers_hosts, diffusers_formulas


@pytest.fixture(autouse=True)
def _quiet():
    """Most tests call a transformer without its pipeline and have no use for steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fastrope: the denoising step is unknown")
        yield


@pytest.fixture
def transformer():
    """FLUX.1, two double-stream and two single-stream blocks, float64, so that comparisons are sharp."""
    from tiny_transformers import build_flux

    return build_flux().double()
