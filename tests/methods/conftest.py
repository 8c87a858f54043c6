"""What tests on the lab's trained editor share."""

from __future__ import annotations

import pytest

import fastrope as fr


@pytest.fixture(scope="module")
def pipe():
    """The lab's trained editor."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from methods import tiny_run

    return tiny_run.pipeline()


@pytest.fixture(scope="module")
def method():
    """LooseRoPE from a pasted digit."""
    from methods import tiny_run

    return fr.LooseRoPE.from_images(*tiny_run.pasted())
