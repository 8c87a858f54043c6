"""What tests on the tiny Kontext pipeline share."""

from __future__ import annotations

import pytest

import fastrope as fr


@pytest.fixture(scope="module")
def pipe():
    """The tiny Kontext pipeline of the demo."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from methods import tiny_run

    return tiny_run.pipeline()


@pytest.fixture(scope="module")
def method():
    """LooseRoPE from the demo's pictures."""
    from methods import tiny_run

    scene = tiny_run.pasted()
    return fr.LooseRoPE.from_images(scene.composite, scene.background)
