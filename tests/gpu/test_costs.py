"""What a call takes on a device: memory and compilations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from gpu.device_calls import (
    KINDS,
    a_call,
    kontext,
)
from numerics import (
    Call,
    lay_out,
)

import fastrope as fr
from fastrope.bench.cases import CASES
from fastrope.planning import polynomial

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES)
def test_memory_stays_a_small_multiple_of_the_keys(case):
    """Packed keys per level, queries per view, and the output: never N x N, which is 68 times the keys."""
    problem = kontext(case, torch.bfloat16)
    q, k, v, plan = problem.q, problem.k, problem.v, problem.plan
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fr.attention(q, k, v, plan=plan, backend="triton")
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / (k.numel() * k.element_size())
    print(f"{case}: {extra:.2f} times the keys")
    assert extra <= 16


def compilations(monkeypatch) -> Counter:
    """Counts the kernels triton compiles from now on, by name."""
    knobs = pytest.importorskip("triton.knobs")
    found: Counter = Counter()

    def count(*, fn, **_) -> None:
        found[fn.name] += 1

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", count)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_share_kernels(monkeypatch, kind):
    """Triton distinguishes sizes that 16 divides from others, and 1; beyond that a length compiles nothing."""
    monkeypatch.setattr(polynomial, "LEAST_FILLED", 0.0)  # the same kernels at every length
    a_call(kind, dim=32, tokens=384, mask=None).run("triton")  # whatever is compiled by now is of this kind
    found = compilations(monkeypatch)
    for tokens in (768, 960, 1152, 1536, 2304):
        a_call(kind, dim=32, tokens=tokens, mask=None).run("triton")
    assert not found, found
    for tokens in (301, 403, 505, 707, 909, 1111, 1313):
        a_call(kind, dim=32, tokens=tokens, mask=None).run("triton")
    print(dict(found))
    assert max(found.values(), default=0) <= 4, found


def test_layouts_share_kernels(monkeypatch):
    """Strides are arguments like any other."""
    a_call(dim=32, tokens=384, mask=None).run("triton")
    found = compilations(monkeypatch)
    call = a_call(dim=32, tokens=384, mask=None)
    for layout in ("heads_first", "fused", "padded"):
        q, k, v = (lay_out(x, layout) for x in (call.q, call.k, call.v))
        Call(q, k, v, call.rope, None, call.modulations).run("triton")
    print(dict(found))
    assert max(found.values(), default=0) <= 2, found
