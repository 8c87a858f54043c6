"""What keeps triton's interpreter fast enough for these tests."""

from __future__ import annotations

import pytest
from numerics import Call, axial, every_modulation, generator, grid, tensors

from fastrope import device as devices

interpreter = pytest.importorskip("triton.runtime.interpreter")


@pytest.mark.skipif(not devices.interpreted(), reason="needs triton's interpreter")
def test_a_launch_patches_the_language_once_per_module(monkeypatch):
    """And not for every function that a kernel calls, some hundred times a launch."""
    patched, launched = [], []
    patch, launch = interpreter._patch_lang_tensor, interpreter.InterpretedFunction.run
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", lambda *given: patched.append(1) or patch(*given))
    monkeypatch.setattr(
        interpreter.InterpretedFunction, "run", lambda *given, **more: launched.append(1) or launch(*given, **more)
    )
    g = generator(0)
    q, k, v = tensors(g, queries=34, heads=1, dim=16)
    Call(q, k, v, axial(grid(34), 16), modulations=every_modulation(g, 34, 34, 16, "zero")).run("triton")
    assert launched
    assert len(patched) <= 8 * len(launched)
