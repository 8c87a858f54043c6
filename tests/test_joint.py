"""Streams that are normalised, joined and rotated in one prologue, against the same steps one by one."""

from __future__ import annotations

import pytest
import torch
from joining import DIM, IMAGE, TEXT, a_plan, group, streams
from numerics import (
    DEVICE,
    axial,
    every_modulation,
    generator,
    grid,
    key_masks,
    scales,
    scatter,
    skip_unless_runnable,
    uniform,
)

import fastrope as fr
from fastrope import api, dispatch, joint
from fastrope import device as devices
from fastrope.backends import folded, fused
from fastrope.planning import polynomial
from fastrope.tolerance import measure


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
    """Whether each run of the kernels was handed streams, of keys and, where there are two, of values."""
    calls, run = [], fused.run

    def streamed(k, v) -> bool:
        return not isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor) == (len(k.parts) == 1)

    monkeypatch.setattr(fused, "run", lambda q, k, v, *rest: calls.append(streamed(k, v)) or run(q, k, v, *rest))
    return calls


def check(parts, plan: fr.Plan, monkeypatch) -> torch.Tensor:
    """The kernels' answer, which must come from streams and be as good as the reference in the dtype of the call."""
    skip_unless_runnable("triton")
    calls = watched(monkeypatch)
    out = fr.joint_attention(parts, plan=plan, backend="triton")
    assert calls == [True]
    assert out.is_contiguous()
    assert out.dtype == parts[0].v.dtype
    reference = fr.attention(*exact(parts), plan=plan, backend="eager")
    found = measure(out, reference, fr.joint_attention(parts, plan=plan, backend="eager"))
    assert found.passed, found
    return out


@pytest.mark.parametrize(
    ("kind", "pairing", "dtype"),
    [
        (None, "half", torch.float16),
        ("two", "interleaved", torch.float16),
        ("two", "half", torch.float32),
        ("distinct", "interleaved", torch.float16),
        ("distinct", "half", torch.float32),
    ],
)
def test_streams_equal_the_steps_one_by_one(kind, pairing, dtype, monkeypatch):
    length, g = TEXT + IMAGE, generator(4)
    modulations = every_modulation(g, length, length, DIM, kind) if kind else []
    plan = a_plan(pairing=pairing, modulations=modulations, key_mask=key_masks(g, "row", 2, length))
    check(streams(dtype), plan, monkeypatch)


@pytest.mark.parametrize("by_polynomial", [True, False])
def test_queries_with_per_query_scales_stay_streams_for_a_polynomial(by_polynomial, monkeypatch):
    monkeypatch.setattr(polynomial, "LEAST_FILLED", 0.0 if by_polynomial else 1.0)
    length, g, kinds = TEXT + IMAGE, generator(4), []
    plan = a_plan(modulations=every_modulation(g, length, length, DIM, "distinct"))
    run = fused.run
    monkeypatch.setattr(fused, "run", lambda q, *rest: kinds.append(type(q).__name__) or run(q, *rest))
    check(streams(torch.float16), plan, monkeypatch)
    assert kinds == ["Streams" if by_polynomial else "Tensor"]


@pytest.mark.parametrize(("dim", "pairing"), [(80, "interleaved"), (96, "half"), (128, "half")])
def test_head_dims_and_blocks(dim, pairing, monkeypatch):
    """Blocks of 16 tokens in one stream, across the seam, in the other, and short at the end; padded channels."""
    length, g = 55, generator(5)
    scale = torch.ones(length, dtype=torch.float64, device=DEVICE)
    scale[::3] = 0.65
    modulations = [
        fr.QueryScale(scale, keys=slice(30, None)),
        fr.BandWeight(uniform(g, dim // 2, low=0.25, high=1.4), keys=slice(10, None)),
    ]
    plan = a_plan(length, dim, pairing, modulations=modulations)
    check(streams(torch.float16, (20, 35), 1, dim, ("padded", "fused"), heads=(1, 1)), plan, monkeypatch)


@pytest.mark.parametrize(
    ("lengths", "layouts"),
    [
        ((58,), ("transposed",)),
        ((1, 57), ("expanded", "padded")),
        ((57, 1), ("heads_first", "transposed")),
        ((30, 28), ("contiguous", "expanded")),
    ],
)
def test_lengths_and_strides(lengths, layouts, monkeypatch):
    parts = streams(lengths=lengths, layouts=layouts, heads=(4, 2))
    check(parts, a_plan(58, modulations=group(length=58)), monkeypatch)


def test_rows_with_positions_and_scales_of_their_own(monkeypatch):
    """Tables that differ from batch row to batch row, for levels of QueryScale that do, too."""
    length, g = TEXT + IMAGE, generator(7)
    scale = fr.QueryScale(scales(g, "levels", length, batch=2), keys=slice(TEXT, None), axes=(1, 2))
    plan = fr.plan(rope=axial(scatter(g, length, batch=2), DIM), modulations=[scale])
    check(streams(heads=(1, 1)), plan, monkeypatch)


@pytest.mark.parametrize("weights", [(None, None), (None, torch.float32), (torch.float64, torch.bfloat16)])
def test_weights_of_any_dtype_or_none(weights, monkeypatch):
    check(streams(torch.float16, weights=weights), a_plan(modulations=group()), monkeypatch)


def test_eps_may_be_an_integer(monkeypatch):
    """Kernels take integers for sizes, and 1 for a constant."""
    parts = [s._replace(norm_q=fr.Norm(None, n), norm_k=fr.Norm(None, 1 - n)) for n, s in enumerate(streams())]
    check(parts, a_plan(), monkeypatch)


@pytest.mark.parametrize("empty", [0, 1])
def test_a_stream_without_tokens_counts_for_nothing(empty, monkeypatch):
    skip_unless_runnable("triton")
    plan = a_plan(modulations=group())
    lengths = [TEXT + IMAGE] * 2
    lengths[empty] = 0
    parts = streams(lengths=lengths)
    alone = [parts[1 - empty]]
    for backend in ("triton", "sdpa", "eager"):
        expected = fr.joint_attention(alone, plan=plan, backend=backend)
        assert torch.equal(fr.joint_attention(parts, plan=plan, backend=backend), expected)
    with pytest.raises(ValueError, match="q: expected non-empty"):
        fr.joint_attention([parts[empty]] * 2, plan=plan)


def test_nan_around_every_buffer_stays_out(monkeypatch):
    """Inputs are views into NaN; every buffer the launchers allocate starts as NaN; masked keys may hold anything."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    length = TEXT + IMAGE
    mask = key_masks(generator(4), "random", 2, length)
    parts = streams(layouts=("padded", "padded"), heads=(1, 1))
    clean = [s._replace(k=s.k.clone(), v=s.v.clone()) for s in parts]
    for s, here in zip(parts, mask.split([TEXT, IMAGE], dim=1), strict=True):
        s.k[~here], s.v[~here] = torch.nan, torch.inf
    for kind in ("levels", "distinct"):
        scale = fr.QueryScale(scales(generator(6), kind, length), keys=slice(TEXT, None), axes=(1, 2))
        plan = a_plan(modulations=[scale, *group()], key_mask=mask)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            out = fr.joint_attention(parts, plan=plan, backend="triton")
        reference = fr.attention(*exact(clean), plan=plan, backend="eager")
        assert measure(out, reference, fr.joint_attention(clean, plan=plan, backend="eager")).passed


@pytest.mark.skipif(not devices.interpreted(), reason="runs interpreted kernels on CPU tensors")
def test_offsets_beyond_32_bits():
    """Tokens so far apart that token * stride leaves int32, in either stream: lazily allocated buffers."""
    stride, near = 2**30, streams(torch.float16, (3, 4), batch=1, layouts=("contiguous",) * 2)
    far = []
    for s in near:
        moved = []
        for x in (s.q, s.k, s.v):
            try:
                buffer = torch.empty((x.shape[1] - 1) * stride + x[0, 0].numel(), dtype=x.dtype)
            except RuntimeError:
                pytest.skip("the system refuses to reserve the address space")
            moved.append(buffer.as_strided(x.shape, (0, stride, x.shape[3], 1)).copy_(x))
        far.append(s._replace(q=moved[0], k=moved[1], v=moved[2]))
    for modulations in ([], group(length=7)):
        plan = a_plan(7, modulations=modulations)
        expected = fr.joint_attention(near, plan=plan, backend="triton")
        assert torch.equal(fr.joint_attention(far, plan=plan, backend="triton"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(TEXT, IMAGE), (TEXT + IMAGE,)], ids=["two", "one"])
@pytest.mark.parametrize("modulated", [False, True])
def test_streams_fold_into_the_keys(lengths, modulated, dtype, monkeypatch):
    """Before torch's attention, too, the kernels read them: normalised, joined, rotated and weighed in one pass."""
    skip_unless_runnable("triton")
    weight = fr.BandWeight(uniform(generator(5), DIM // 2, low=0.25, high=1.4), keys=slice(3, 20))
    plan = a_plan(modulations=[weight, *group()] if modulated else [])
    parts = streams(dtype, lengths, layouts=("fused",) * len(lengths), heads=(2, 2))
    reference = fr.attention(*exact(parts), plan=plan, backend="eager")
    low = fr.joint_attention(parts, plan=plan, backend="eager")
    monkeypatch.setattr(folded, "takes", lambda q, lowered: folded.folds(lowered))
    monkeypatch.setattr(joint, "join", None)
    seen, run = [], folded.run
    monkeypatch.setattr(folded, "run", lambda q, k, v, *rest: seen.append((q, k, v)) or run(q, k, v, *rest))
    out = fr.joint_attention(parts, plan=plan, backend="sdpa")
    ((q, k, v),) = seen
    assert [len(getattr(x, "parts", ())) for x in (q, k, v)] == [len(lengths), len(lengths), 2 * (len(lengths) - 1)]
    assert out.is_contiguous()
    found = measure(out, reference, low)
    assert found.passed, found


def test_elsewhere_streams_are_joined_first(monkeypatch):
    parts = streams()
    expected = fr.attention(*exact(parts), plan=a_plan(), backend="eager").float()
    calls = watched(monkeypatch)
    three = [s._replace(q=s.q[:, :4], k=s.k[:, :4], v=s.v[:, :4]) for s in parts]
    bare = [s._replace(norm_q=None) for s in parts]
    decided, decide = [], dispatch.decide
    for module in (joint, api):
        monkeypatch.setattr(module, "decide", lambda *given: decided.append(1) or decide(*given))
    for backend, given in (("sdpa", parts), ("triton", bare), ("triton", [*three, parts[0]])):
        if backend == "triton":
            skip_unless_runnable("triton")
        length = sum(s.q.shape[1] for s in given)
        decided.clear()
        out = fr.joint_attention(given, plan=a_plan(length), backend=backend)
        assert decided == [1]
        if given is parts:
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        else:
            joined = fr.attention(*joint.join(given), plan=a_plan(length), backend=backend)
            assert torch.equal(out, joined)
    assert calls
    assert not any(calls)


def test_a_single_stream_is_not_copied(monkeypatch):
    """The values of FLUX's single-stream blocks are read where the projection left them."""
    skip_unless_runnable("triton")
    (part,) = streams(lengths=(34,))
    seen, run = [], fused.run
    monkeypatch.setattr(fused, "run", lambda q, k, v, *rest: seen.append((k.parts[0], v)) or run(q, k, v, *rest))
    fr.joint_attention([part], plan=a_plan(), backend="triton")
    ((k, v),) = seen
    assert (k.data_ptr(), v.data_ptr()) == (part.k.data_ptr(), part.v.data_ptr())


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("where", ["q", "v", "weight"])
def test_gradients_reach_streams_and_weights(where, backend):
    """Of the second stream alone, against the definition."""
    parts, plan = streams(batch=1), a_plan(modulations=group())
    leaf = (parts[1].norm_k.weight if where == "weight" else getattr(parts[1], where)).clone().requires_grad_()
    change = {"norm_k": fr.Norm(leaf, parts[1].norm_k.eps)} if where == "weight" else {where: leaf}
    parts[1] = parts[1]._replace(**change)
    if backend == "triton":
        with pytest.raises(NotImplementedError, match="forward only"):
            fr.joint_attention(parts, plan=plan, backend="triton")
        return
    (found,) = torch.autograd.grad(fr.joint_attention(parts, plan=plan).square().sum(), leaf)
    (expected,) = torch.autograd.grad(fr.attention(*exact(parts), plan=plan, backend="eager").square().sum(), leaf)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_forward_mode_is_not_dropped():
    """A tangent in one stream alone."""
    parts, plan = streams(batch=1), a_plan()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(parts[1].k, torch.ones_like(parts[1].k))
        parts[1] = parts[1]._replace(k=dual)
        with pytest.raises(NotImplementedError, match="forward only"):
            fr.joint_attention(parts, plan=plan, backend="triton")


# ---- refusals --------------------------------------------------------------------------------------------------------


def with_norm(s: list[fr.Stream], norm) -> list[fr.Stream]:
    return [s[0], s[1]._replace(norm_k=norm)]


BAD = {
    "no streams": (lambda s: [], r"streams: expected .*, received \[\]"),
    "one stream": (lambda s: s[0], "streams: expected a list of fastrope.Stream, at least one, received Stream"),
    "tuples": (lambda s: [tuple(s[0])], r"streams: expected .*, received \['tuple'\]"),
    "other heads": (lambda s: [s[0], s[1]._replace(q=s[1].q[:, :, :1])], r"streams\[1\].q: expected"),
    "other dtype": (lambda s: [s[0], s[1]._replace(v=s[1].v.half())], r"streams\[1\].v: expected"),
    "other batch": (lambda s: [s[0], s[1]._replace(k=s[1].k[:1])], r"streams\[1\].k: expected"),
    "other length": (lambda s: [s[0]._replace(v=s[0].v[:, 1:]), s[1]], r"streams\[0\].v: expected 9 tokens"),
    "weights": (lambda s: with_norm(s, fr.Norm(torch.ones(3), 1e-6)), r"streams\[1\].norm_k.weight: expected \(16,\)"),
    "whole weights": (lambda s: with_norm(s, fr.Norm(torch.ones(DIM).long(), 1e-6)), r"norm_k.weight: .* floating"),
    "listed weights": (lambda s: with_norm(s, fr.Norm([1.0] * DIM, 1e-6)), r"norm_k.weight: expected a torch.Tensor"),
    "a module": (lambda s: with_norm(s, torch.nn.RMSNorm(DIM)), r"norm_k: expected a fastrope.Norm or None, .*RMSNorm"),
    "no eps": (lambda s: with_norm(s, fr.Norm(None, None)), r"norm_k.eps: expected a finite number, .* received None"),
    "negative eps": (lambda s: with_norm(s, fr.Norm(None, -1e-6)), r"norm_k.eps: expected"),
    "plan": (lambda s: s[:1], "q: expected 34 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("case", BAD)
def test_bad_streams_are_named(case, backend):
    if backend == "triton":
        skip_unless_runnable("triton")
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fr.joint_attention(change(streams()), plan=a_plan(), backend=backend)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": torch.nan}, "scale: expected a finite number"),
        ({"scale": "1"}, "scale: expected a number"),
        ({"backend": "flash"}, "backend: expected one of"),
        ({"plan": None}, "plan: expected a Plan"),
    ],
)
def test_bad_arguments_are_named(given, message):
    skip_unless_runnable("triton")
    with pytest.raises(ValueError, match=message):
        fr.joint_attention(streams(), **{"plan": a_plan(), "backend": "triton"} | given)


def test_norms_before_a_rotation_that_is_done_are_refused():
    plan = fr.plan(rope=axial(grid(TEXT + IMAGE, TEXT), DIM, applied=True))
    with pytest.raises(ValueError, match="plan: expected a rope not applied yet"):
        fr.joint_attention(streams(), plan=plan)
