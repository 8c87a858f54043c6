"""Two calls that mean the same, on every backend.

They are compared through the reference: the result of one is held against the other's reference in float64, under the
one tolerance rule.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import Call, axial, compare, generator, grid, tensors

from fastrope import device as devices

BACKENDS = [("eager", torch.float64), ("sdpa", torch.float64), ("sdpa", torch.bfloat16), ("triton", torch.float32)]
if not devices.interpreted():
    BACKENDS += [("triton", torch.bfloat16)]
IDS = [f"{backend}-{str(dtype).removeprefix('torch.')}" for backend, dtype in BACKENDS]
SOME_SCALES = ("levels", "distinct")


def backends(test: Callable) -> Callable:
    """A test of ``(backend, dtype)`` on each of them that can run here."""
    return pytest.mark.usefixtures("runnable")(pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=IDS)(test))


def made(dtype, tokens=48, dim=32, batch=1, heads=1, key_heads=1, seed=0, rope=True):
    """A plain call and the generator its values come from."""
    g = generator(seed)
    q, k, v = tensors(g, batch=batch, queries=tokens, heads=heads, key_heads=key_heads, dim=dim, dtype=dtype)
    return g, Call(q, k, v, axial(grid(tokens, 5), dim) if rope else None)


def same(call: Call, twin: Call, backend: str) -> None:
    """Both calls mean the same: a result of one is as near to the other's reference as the rule asks of it."""
    compare(call, *twin.run(backend), name=backend, twin=twin)
    if backend != "triton" or not devices.interpreted():  # slow, and each call against itself is tested elsewhere
        compare(twin, *call.run(backend), name=backend, twin=call)


def bitwise(call: Call, twin: Call, backend: str) -> None:
    for x, y in zip(call.run(backend), twin.run(backend), strict=True):
        assert torch.equal(x, y)
