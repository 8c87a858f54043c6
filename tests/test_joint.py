"""Streams that are normalised, joined and rotated in one prologue, against the same steps one by one."""

from __future__ import annotations

import pytest
import torch
from numerics import (
    axial,
    draw,
    every_modulation,
    generator,
    grid,
    key_masks,
    lay_out,
    skip_unless_runnable,
    uniform,
)

import fastrope as fr
from fastrope.backends import triton
from fastrope.tolerance import measure

TEXT, IMAGE, HEADS, KEY_HEADS, DIM = 9, 25, 2, 1, 16


def streams(dtype: torch.dtype, lengths=(TEXT, IMAGE), batch: int = 2, layout: str = "fused", weighted: bool = True):
    g = generator(3)
    found = []
    for n, length in enumerate(lengths):
        q = draw(g, batch, length, HEADS, DIM, dtype=dtype)
        k, v = (draw(g, batch, length, KEY_HEADS, DIM, dtype=dtype) for _ in range(2))
        norms = [
            fr.Norm(uniform(g, DIM, low=0.5, high=1.5).to(dtype) if weighted else None, 10.0**-n) for _ in range(2)
        ]
        found.append(fr.Stream(3 * lay_out(q, layout), 0.2 * lay_out(k, layout), v, *norms))
    return found


def exact(parts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``q, k, v`` in float64, from the definition."""

    def normed(x, norm):
        x = x.double()
        x = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        return x if norm.weight is None else x * norm.weight.double()

    q, k, v = ([], [], [])
    for s in parts:
        q.append(normed(s.q, s.norm_q))
        k.append(normed(s.k, s.norm_k))
        v.append(s.v.double())
    return tuple(torch.cat(x, dim=1) for x in (q, k, v))


def watched(monkeypatch) -> list[bool]:
    """Whether each run of the kernels was handed streams."""
    calls, run = [], triton.run
    monkeypatch.setattr(
        triton, "run", lambda q, k, *rest: calls.append(not isinstance(k, torch.Tensor)) or run(q, k, *rest)
    )
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("kind", "pairing"), [(None, "half"), ("levels", "interleaved"), ("levels", "half"), ("distinct", "interleaved")]
)
def test_streams_equal_the_steps_one_by_one(dtype, kind, pairing, monkeypatch):
    skip_unless_runnable("triton")
    parts, length, g = streams(dtype), TEXT + IMAGE, generator(4)
    modulations = every_modulation(g, length, length, DIM, kind) if kind else []
    plan = fr.plan(
        rope=axial(grid(length, TEXT), DIM, pairing), modulations=modulations, key_mask=key_masks(g, "row", 2, length)
    )
    calls = watched(monkeypatch)
    out = fr.joint_attention(parts, plan=plan, backend="triton")
    assert calls == [True]
    reference = fr.attention(*exact(parts), plan=plan, backend="eager")
    low = fr.joint_attention(parts, plan=plan, backend="eager")
    found = measure(out, reference, low)
    assert found.passed, found


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded"])
@pytest.mark.parametrize("lengths", [(58,), (1, 57), (30, 28)])
def test_lengths_strides_and_missing_weights(layout, lengths, monkeypatch):
    skip_unless_runnable("triton")
    parts = streams(torch.float32, lengths, batch=1, layout=layout, weighted=False)
    plan = fr.plan(rope=axial(grid(58, 9), DIM), modulations=[fr.BiasDelta(1.0, 0.8, keys=slice(20, None))])
    calls = watched(monkeypatch)
    out = fr.joint_attention(parts, plan=plan, backend="triton")
    assert calls == [True]
    reference = fr.attention(*exact(parts), plan=plan, backend="eager")
    assert measure(out, reference, fr.joint_attention(parts, plan=plan, backend="eager")).passed


def test_elsewhere_streams_are_joined_first(monkeypatch):
    plan = fr.plan(rope=axial(grid(TEXT + IMAGE, TEXT), DIM))
    parts = streams(torch.float32)
    expected = fr.attention(*exact(parts), plan=plan, backend="eager").float()
    calls = watched(monkeypatch)
    three = [s._replace(q=s.q[:, :4], k=s.k[:, :4], v=s.v[:, :4]) for s in parts]
    bare = [s._replace(norm_q=None) for s in parts]
    for backend, given in (("sdpa", parts), ("triton", bare), ("triton", [*three, parts[0]])):
        if backend == "triton":
            skip_unless_runnable("triton")
        length = sum(s.q.shape[1] for s in given)
        out = fr.joint_attention(given, plan=fr.plan(rope=axial(grid(length, TEXT), DIM)), backend=backend)
        if given is parts:
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert calls
    assert not any(calls)


def test_gradients_reach_streams_and_weights():
    parts = streams(torch.float32, batch=1)
    plan = fr.plan(rope=axial(grid(TEXT + IMAGE, TEXT), DIM))
    weight = parts[1].norm_k.weight.clone().requires_grad_()
    parts[1] = parts[1]._replace(norm_k=fr.Norm(weight, parts[1].norm_k.eps))
    fr.joint_attention(parts, plan=plan).square().sum().backward()
    assert weight.grad.abs().sum() > 0


BAD = {
    "no streams": (lambda s: [], "streams: expected"),
    "other heads": (lambda s: [s[0], s[1]._replace(q=s[1].q[:, :, :1])], r"streams\[1\].q: expected"),
    "other dtype": (lambda s: [s[0], s[1]._replace(v=s[1].v.half())], r"streams\[1\].v: expected"),
    "other length": (lambda s: [s[0]._replace(v=s[0].v[:, 1:]), s[1]], r"streams\[0\].v: expected 9 tokens"),
    "weights": (
        lambda s: [s[0]._replace(norm_q=fr.Norm(torch.ones(3), 1e-6)), s[1]], r"streams\[0\].norm_q.weight: expected"
    ),
    "plan": (lambda s: s[:1], "q: expected 34 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_streams_are_named(case):
    change, message = BAD[case]
    plan = fr.plan(rope=axial(grid(TEXT + IMAGE, TEXT), DIM))
    with pytest.raises(ValueError, match=message):
        fr.joint_attention(change(streams(torch.float32)), plan=plan)


def test_norms_before_a_rotation_that_is_done_are_refused():
    plan = fr.plan(rope=axial(grid(TEXT + IMAGE, TEXT), DIM, applied=True))
    with pytest.raises(ValueError, match="plan: expected a rope not applied yet"):
        fr.joint_attention(streams(torch.float32), plan=plan)
