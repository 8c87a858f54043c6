"""The bugs this field ships: poisoned surroundings, 32-bit offsets, the wrong device, a compilation per shape."""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from running import interpreted

import fastrope as fr
from fastrope import device as devices
from fastrope.backends import fused, reference

pytest.importorskip("triton")
from fastrope.kernels import abi, axis_blocks, streams


def grid_rope(height: int, width: int, text: int, **options) -> fr.RoPE:
    layout = fr.TokenLayout(text=text, target=(height, width))
    return fr.RoPE.axial(layout.positions("flux"), (4, 6, 6), **options)


def everything(length: int, text: int, scale: torch.Tensor) -> list:
    image = slice(text, length)
    weight = torch.linspace(0.5, 1.5, 8)
    return [
        fr.QueryScale(scale, keys=image, axes=(1, 2)), fr.BandWeight(weight, keys=image),
        fr.BiasDelta(0.9, 1.2, keys=image), fr.LogitGain(2 - scale, keys=image),
    ]  # fmt: skip


def levels(length: int) -> torch.Tensor:
    scale = torch.ones(length)
    scale[3:9], scale[9:14] = 0.65, 0.825
    return scale


def planted(shape, generator, dtype=torch.float32) -> torch.Tensor:
    """A random tensor inside a larger buffer of NaN: before, behind, between rows, heads and channels."""
    b, s, h, d = shape
    buffer = torch.full((b + 2, s + 4, h + 2, d + 16), torch.nan, dtype=dtype)
    view = buffer[1:-1, 2:-2, 1:-1, 8:-8]
    view.copy_(torch.randn(shape, generator=generator, dtype=dtype))
    return view


@interpreted
@pytest.mark.parametrize("scale_of", [levels, lambda n: torch.linspace(0.4, 1, n)], ids=["buckets", "per query"])
def test_nan_around_every_buffer_stays_out(scale_of, monkeypatch):
    """Inputs are views into NaN; every buffer the launchers allocate starts as NaN."""
    generator = torch.Generator().manual_seed(0)
    rope = grid_rope(4, 5, 3)
    length = rope.tokens
    q, k, v = (planted((2, length, h, 16), generator) for h in (2, 1, 1))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, 2], mask[1, -3:] = False, False
    k[1, -3:], v[1, -3:] = torch.nan, torch.inf  # masked keys may hold anything
    plan = fr.plan(rope=rope, modulations=everything(length, 3, scale_of(length)), key_mask=mask)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    out, lse = fr.attention(q, k, v, plan=plan, return_lse=True, backend="triton")
    monkeypatch.undo()
    expected, expected_lse = reference.run(q, k, v, plan.resolved, 0.25, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=2e-6)


@interpreted
@pytest.mark.parametrize("modulated", [False, True])
def test_offsets_beyond_32_bits(modulated):
    """Tokens so far apart that token * stride leaves int32: a lazily allocated buffer of 2.5 * 2**31 elements."""
    length, dim, stride = 6, 16, 2**30
    try:
        buffer = torch.empty((length - 1) * stride + 2 * dim, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the system refuses to reserve the address space")
    far = buffer.as_strided((1, length, 2, dim), (0, stride, dim, 1))
    generator = torch.Generator().manual_seed(1)
    near = torch.randn(1, length, 2, dim, generator=generator).half()
    far.copy_(near)
    rope = fr.RoPE.axial(torch.arange(length)[:, None], (16,))
    keys = slice(2, 6)
    mods = [fr.QueryScale(torch.linspace(0.5, 1, length), keys=keys), fr.BiasDelta(1, 1.2, keys=keys)]
    for options in ({"rope": rope, "modulations": mods if modulated else []}, {}):
        out = fr.attention(far, far, far, backend="triton", **options)
        assert torch.equal(out, fr.attention(near, near, near, backend="triton", **options))


@interpreted
def test_fully_masked_rows_are_zero():
    q = torch.randn(2, 5, 2, 16)
    mask = torch.tensor([[True] * 5, [False] * 5])
    out, lse = fr.attention(q, q, q, key_mask=mask, return_lse=True, backend="triton")
    assert torch.equal(out[1], torch.zeros(5, 2, 16))
    assert bool((lse[1] == -torch.inf).all())
    assert bool(out[0].abs().sum() > 0)
    assert bool(lse[0].isfinite().all())


def test_launches_on_the_device_of_the_tensors(monkeypatch):
    """Triton launches on the current device; the backend makes that the one of q."""
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield
        entered.append("left")

    class Elsewhere:
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(fused, "pack", lambda *args: entered.append("packed") or (None, None))
    monkeypatch.setattr(fused, "attend", lambda *args, **how: entered.append("ran") or ("out", None))
    fused.run(Elsewhere(), None, None, None, 1.0, None)
    assert entered == [torch.device("cuda", 1), "packed", "ran", "left"]


# ---- tables, plans and modes -----------------------------------------------------------------------------------------


@interpreted
def test_tables_of_any_strides():
    """Transposed and expanded masks, scales and angles: kernels read contiguous copies."""
    generator = torch.Generator().manual_seed(2)
    batch, length = 2, 16
    q = torch.randn(batch, length, 1, 16, generator=generator)
    rope = fr.RoPE.axial(torch.arange(length)[:, None], (16,))
    flipped = fr.RoPE(rope.angles.T.contiguous().T)
    scale = torch.rand(length, batch, generator=generator).T
    mask = (torch.rand(length, batch, generator=generator) > 0.4).T
    column = torch.tensor([[True], [False]]).expand(batch, length)
    for options in (
        {"key_mask": mask}, {"key_mask": column}, {"rope": rope, "modulations": [fr.QueryScale(scale)]},
        {"rope": flipped, "modulations": [fr.QueryScale(torch.linspace(0.3, 1, length))]},
    ):  # fmt: skip
        plan = fr.plan(**options)
        assert all(t.is_contiguous() for t in plan.tensors)
        out = fr.attention(q, q, q, plan=plan, backend="triton")
        torch.testing.assert_close(out, reference.run(q, q, q, plan.resolved, 0.25)[0], rtol=1e-5, atol=3e-6)


@interpreted
def test_per_query_scales_far_from_the_keys():
    """A query 100 000 tokens away turns as exactly as a near one."""
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 12, 1, 16, generator=generator)
    rope, key_rope = (fr.RoPE.axial(torch.arange(12)[:, None] + offset, (16,)) for offset in (100_000, 0))
    plan = fr.plan(rope=rope, key_rope=key_rope, modulations=[fr.QueryScale(torch.linspace(0.3, 1, 12))])
    assert plan.lowered.num_per_query
    out = fr.attention(q, k, k, plan=plan, backend="triton")
    torch.testing.assert_close(out, reference.run(q, k, k, plan.resolved, 0.25)[0], rtol=1e-5, atol=3e-6)


def test_the_cache_serves_threads():
    q = torch.randn(1, 8, 1, 16)
    rope = fr.RoPE.axial(torch.arange(8)[:, None], (16,))
    weights = [torch.full((8,), 1.0 + i) for i in range(12)]
    expected = [fr.attention(q, q, q, rope=rope, modulations=[fr.BandWeight(w)], backend="sdpa") for w in weights]

    def work(seed: int) -> bool:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist() * 4
        mods = ([fr.BandWeight(weights[i])] for i in order)
        outs = [fr.attention(q, q, q, rope=rope, modulations=m, backend="sdpa") for m in mods]
        return all(torch.allclose(o, expected[i]) for o, i in zip(outs, order, strict=True))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("later", ["planned", "with other numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plans_own_what_they_hold(dtype, later):
    """Editing a tensor after planning changes no backend's answer, whatever it would take to copy it."""
    q = torch.randn(1, 8, 1, 16)
    given = {
        "angles": torch.rand(8, 8, dtype=dtype), "axis": torch.arange(8) % 2, "mask": torch.rand(1, 8) > 0.3,
        "scale": torch.linspace(0.5, 1, 8, dtype=dtype), "weight": torch.linspace(0.5, 1.5, 8, dtype=dtype),
        "bias": torch.tensor([1.1], dtype=dtype), "delta": torch.tensor([1.2], dtype=dtype),
        "gain": torch.rand(1, 8, dtype=dtype), "index": torch.arange(2, 6), "keys": torch.arange(8) > 3,
    }  # fmt: skip
    given["mask"][:, 0] = True
    mods = [
        fr.QueryScale(given["scale"], keys=given["keys"], axes=(1,)), fr.BandWeight(given["weight"]),
        fr.BiasDelta(given["bias"], given["delta"], keys=given["index"]), fr.LogitGain(given["gain"]),
    ]  # fmt: skip
    rope = fr.RoPE(given["angles"], given["axis"])
    plan = fr.plan(rope=rope, modulations=mods, key_mask=given["mask"])
    if later != "planned":
        plan = plan.with_groups([(given["bias"], given["delta"])]).with_weight(given["weight"])
    backends = ("eager", "sdpa", "triton") if devices.interpreted() else ("eager", "sdpa")
    before = [fr.attention(q, q, q, plan=plan, backend=name) for name in backends]
    for x in given.values():
        x.zero_()
    for name, out in zip(backends, before, strict=True):
        assert torch.equal(fr.attention(q, q, q, plan=plan, backend=name), out), name
    assert not plan.resolved.rope.axis.eq(0).all()


def test_plans_outlive_inference_mode():
    q = torch.randn(1, 6, 1, 16)
    arguments = {"rope": fr.RoPE.axial(torch.arange(6)[:, None], (16,)),
                 "modulations": [fr.LogitGain(torch.linspace(0.5, 1.5, 6))]}  # fmt: skip
    with torch.inference_mode():
        fr.attention(q, q, q, **arguments)
    x = q.clone().requires_grad_()
    fr.attention(x, q, q, **arguments).sum().backward()
    assert x.grad.abs().sum() > 0


def test_autocast_leaves_dtypes_alone():
    q = torch.randn(1, 6, 1, 16)
    for name in ("eager", "sdpa"):
        expected = fr.attention(q, q, q, backend=name)
        with torch.autocast("cpu", torch.bfloat16):
            out, lse = fr.attention(q, q, q, backend=name, return_lse=True)
        assert out.dtype == lse.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@interpreted
def test_forward_mode_is_not_dropped():
    q = torch.randn(1, 6, 1, 16)
    with pytest.raises(NotImplementedError, match="forward only"):
        torch.func.jvp(lambda x: fr.attention(x, q, q, backend="triton"), (q,), (q,))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():  # no_grad ends reverse mode alone
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="forward only"):
            fr.attention(dual, q, q, backend="triton")


@interpreted
def test_nan_in_a_group_reaches_the_output():
    """Its mean is NaN, and so is what that adds to the logits of every query."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 20, 1, 16, generator=generator) for _ in range(3))
    k[0, 3] = torch.nan
    plan = fr.plan(modulations=[fr.BiasDelta(1.1, 0.8, keys=slice(0, 10))], num_keys=20)
    for backend in ("eager", "triton"):
        assert fr.attention(q, k, v, plan=plan, backend=backend).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype_does_not_reach_plans(dtype):
    length, text = 390, 30
    scale = torch.ones(length)
    scale[:200] = torch.linspace(0.7, 0.72, 200)
    hidden = torch.ones(1, length, dtype=torch.bool)
    hidden[0, 3] = False
    rope, modulations = grid_rope(18, 20, text), everything(length, text, scale)
    modulations += [fr.KeyBias(scale.log()), fr.ValueGain(0.5, slice(3)), fr.BiasDelta(1.3, 0.6, on="values"),
                    fr.LogitBias(0.5, slice(text))]  # fmt: skip
    expected = fr.plan(rope=rope, modulations=modulations, key_mask=hidden)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = fr.plan(rope=rope, modulations=modulations, key_mask=hidden)
    finally:
        torch.set_default_dtype(before)
    assert expected.lowered.polynomial is not None
    assert [x.dtype for x in found.tensors] == [x.dtype for x in expected.tensors]
    assert all(map(torch.equal, found.tensors, expected.tensors))


def test_a_default_device_does_not_reach_plans():
    keys = torch.arange(8) > 3
    with torch.device("meta"):
        plan = fr.plan(modulations=[fr.BiasDelta(1, 1.2, keys=keys)])
    assert plan.device.type == "cpu"


def test_host_and_kernels_agree_on_constants():
    from fastrope.kernels import common

    names = [{"bias": "LOGIT_BIAS"}.get(name, name.upper()) for name in abi.SEGMENT_COLUMNS]
    assert [getattr(common, name).value for name in names] == list(range(common.SEGMENT_FIELDS.value))
    names = [f"GROUP_{name.upper()}" for name in abi.GROUP_COLUMNS]
    assert [getattr(common, name).value for name in names] == list(range(common.GROUP_FIELDS.value))
    assert axis_blocks.AXIS_BLOCK.value == abi.AXIS_BLOCK
    assert axis_blocks.CHUNK.value == abi.PAIR_CHUNK


@pytest.mark.parametrize(("apart", "copied"), [(1, False), (2**26, False), (2**27, True)])
def test_channels_beyond_32_bits_are_copied(apart, copied):
    """Offsets of channels are int32 in the kernels."""
    x = torch.empty_strided((1, 2, 3, 16), (2**40, 2**36, 2**34, apart), dtype=torch.float16, device="meta")
    assert (streams.stream_tensors(x)["X"].stride(3) == 1) == (copied or apart == 1)


def test_streams_whose_channels_lie_differently_are_copied():
    first, second = torch.empty(1, 2, 3, 16), torch.empty(1, 5, 3, 32)[..., ::2]
    found = streams.stream_tensors(streams.Streams((first, second), (torch.ones(16),) * 2, (0.0, 0.0)))
    assert (found["X"].stride(3), found["X2"].stride()) == (1, (240, 48, 16, 1))
