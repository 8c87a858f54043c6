"""Hopper's loops, interpreted: keys and values through tensor descriptors, values weighed one tile late."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from numerics import (
    LAYOUTS,
    Call,
    assert_close,
    axial,
    check,
    compare,
    draw,
    generator,
    grid,
    lay_out,
    many_signatures,
    scales,
    tensors,
    uniform,
    with_tiles,
)
from strategies import calls

import fastrope as fr
from fastrope import device as devices

pytest.importorskip("triton")
from fastrope import kernels
from fastrope.kernels import attention, config, descriptors, launch

pytestmark = pytest.mark.skipif(not devices.interpreted(), reason="chooses Hopper's loops on CPU tensors")
HALF = torch.float16


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Run as on Hopper, in tiles small enough that there are several; the names of the loops that were chosen."""
    chosen = []
    select = kernels.select

    def record(kernel, *where):
        if kernel in (*config.LOOPS, *config.TMA_LOOPS):
            chosen.append(kernel)
        return select(kernel, *where)

    monkeypatch.setattr(kernels, "select", record)
    monkeypatch.setattr(devices, "architecture", lambda device: "sm_90")
    for loop in config.TMA_LOOPS:
        with_tiles(monkeypatch, loop, block_m=32, block_n=16)
    return chosen


def picture(dim: int = 32, batch: int = 2, kind: str | None = "levels", heads: int = 2, key_heads: int = 1) -> Call:
    """Text, target and reference with every modulation, or none."""
    g = generator(dim)
    q, k, v = tensors(g, batch=batch, queries=44, heads=heads, key_heads=key_heads, dim=dim, dtype=HALF)
    rope, reference = axial(torch.cat([grid(24, 4), grid(20, frame=1)]), dim), slice(24, 44)
    modulations = kind and [
        fr.QueryScale(scales(g, kind, 44), keys=reference, axes=(1, 2)),
        fr.BandWeight(uniform(g, dim // 2, low=0.25, high=1.4), keys=reference),
        fr.BiasDelta(1.1, 0.8, keys=reference), fr.LogitGain(uniform(g, 44, low=-0.5, high=1.4), keys=slice(30, 38)),
    ]  # fmt: skip
    return Call(q, k, v, rope, modulations=modulations or [])


@pytest.mark.parametrize("kind", [None, "levels", "distinct"])
@pytest.mark.parametrize("dim", [16, 40])
def test_against_the_reference(kind, dim, launches):
    check(picture(dim, kind=kind), "triton")
    assert set(launches) == {"attention_tma" if kind is None else "attention_modulated_tma"}


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_lengths(length, launches):
    """Shorter than a tile, a tile, and a tile and one."""
    g = generator(length)
    check(Call(*tensors(g, batch=2, queries=length, heads=2, dim=16, dtype=HALF), axial(grid(length), 16)), "triton")
    assert launches == ["attention_tma"]


def test_any_composition():
    @settings(max_examples=2)
    @given(calls(HALF, tokens=(1, 17, 24), dims=(16,), heads=((1, 2),)))
    def run(call):
        check(call, "triton")

    run()


def test_both_orders_agree(monkeypatch):
    """Weighing a tile's values at once or one tile late is the same sum in the same order."""
    call = picture(16)
    late = call.run("triton")
    for loop in config.TMA_LOOPS:
        with_tiles(monkeypatch, loop, block_m=32, block_n=16, pipelined=False)
    at_once = call.run("triton")
    assert all(torch.equal(a, b) for a, b in zip(late, at_once, strict=True))


def test_nan_around_the_buffers_stays_out(launches):
    """Plain attention reads the caller's own keys and values; those of the next head, and beyond the end, are NaN."""
    g = generator(0)
    q, k, v = (draw(g, 2, 21, 2, 16, dtype=HALF) for _ in range(3))
    around = [lay_out(x, "padded") for x in (q, k, v)]
    expected, found = fr.attention(q, k, v, backend="triton"), fr.attention(*around, backend="triton")
    assert launches == ["attention_tma"] * 2
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [None, "levels"])
def test_masked_keys_may_hold_anything(kind, launches):
    """A descriptor reads them; a batch row without any key is zero."""
    call = picture(16, kind=kind)
    mask = torch.rand(2, 44, generator=generator(2)) < 0.8
    mask[1] = False
    call = replace(call, key_mask=mask)
    k, v = (x.masked_fill(~mask[:, :, None, None], torch.nan) for x in (call.k, call.v))
    out, lse = replace(call, k=k, v=v).run("triton")
    assert not out[1].any()
    assert (
        fr.explain(call.q, k, v, rope=call.rope, key_mask=mask, backend="triton").decision.launch.loop
        == "tensor descriptors"
    )
    compare(call, out, lse)
    assert set(launches) == {"attention_tma" if kind is None else "attention_modulated_tma"}


def test_merged_parts_read_no_masked_value(launches, monkeypatch):
    """Calls of several passes go through pointers, whose loads are masked: no pass over v is spent on zeroing it."""
    g = generator(5)
    q, k, v = tensors(g, queries=24, heads=1, dim=16, dtype=HALF)
    mask = torch.arange(24)[None] % 5 != 3
    call = Call(q, k, v, axial(grid(24), 16), modulations=many_signatures(g, 24, 24, 16, None), key_mask=mask)
    assert len(call.planned().lowered.passes) > 1
    expected = call.exact(), call.low()
    zeroed, where = [], torch.where
    monkeypatch.setattr(torch, "where", lambda *x: zeroed.append(x) or where(*x))
    out, _ = replace(call, v=v.masked_fill(~mask[:, :, None, None], torch.nan)).run("triton")
    assert not any(len(x) == 3 and x[1].shape == (1, 1, 24, 16) for x in zeroed)
    assert set(launches) == {"attention_parts"}
    assert_close(out, expected[0][0], expected[1][0])


def test_what_a_descriptor_cannot_say(launches):
    """Layouts may be any: some go through pointers, with the same result; so does float32."""
    g = generator(1)
    q, k, v = (draw(g, 2, 21, 2, 16, dtype=HALF) for _ in range(3))
    shifted = v.new_zeros(2 * 21 * 2 * 16 + 1)[1:].view(v.shape).copy_(v)  # 2 bytes off the 16 that are asked for
    assert "through tensor descriptors" in str(fr.explain(q, k, v, backend="triton"))
    for other in (lay_out(v, "transposed"), lay_out(v, "expanded"), shifted):
        assert not kernels.describable(other.transpose(1, 2))
        assert fr.explain(q, k, other, backend="triton").decision.launch.loop.startswith("pointers (v: ")
        check(Call(q, k, other), "triton")
    assert fr.explain(q.float(), k.float(), v.float(), backend="triton").decision.launch.loop.startswith(
        "pointers (no descriptors on "
    )
    check(Call(q.float(), k.float(), v.float()), "triton")
    assert set(launches) == {"attention"}


def test_copies_of_a_single_key_may_lie_off_the_16_bytes(launches):
    """Of one key of 20 channels a descriptor can say where it lies; of its copies for buckets, 40 bytes apart, none."""
    g = generator(2)
    q = draw(g, 1, 5, 1, 20, dtype=HALF)
    k, v = (draw(g, 1, 1, 1, 20, dtype=HALF) for _ in range(2))
    scale = fr.QueryScale(torch.tensor([0.5, 1.0, 0.5, 1.0, 0.5]))
    call = Call(q, k, v, axial(grid(5), 20), key_rope=axial(grid(1, frame=1), 20), modulations=[scale])
    check(call, "triton")
    assert set(launches) == {"attention_modulated"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_values_are_copied_once(layout, launches, monkeypatch):
    """The copy keeps the order of the axes, and explain says what becomes of it."""

    def refuse(*args):
        raise AssertionError("masked_fill copies, then fills the copy")

    g = generator(4)
    q, k, v = (draw(g, 2, 21, 2, 16, dtype=HALF) for _ in range(3))
    mask, v = torch.rand(2, 21, generator=g) < 0.7, lay_out(v, layout)
    plan = fr.plan(key_mask=mask)
    monkeypatch.setattr(torch.Tensor, "masked_fill", refuse)
    fr.attention(q, k, v, plan=plan, backend="triton", debug=False)
    expected = "attention" if layout == "transposed" else "attention_tma"
    assert launches == [expected]
    found = fr.explain(q, k, v, plan=plan, backend="triton").decision.launch.loop
    assert found.startswith("tensor descriptors" if expected == "attention_tma" else "pointers (v: ")


def test_descriptors_can_be_switched_off(launches, monkeypatch):
    """To compare, and for a machine where they fail."""
    g = generator(3)
    q, k, v = (draw(g, 1, 21, 2, 16, dtype=HALF) for _ in range(3))
    monkeypatch.setenv("FASTROPE_TMA", "0")
    assert fr.explain(q, k, v, backend="triton").decision.launch.loop == "pointers (FASTROPE_TMA=0)"
    check(Call(q, k, v), "triton")
    assert launches == ["attention"]


def test_an_axis_of_length_one_has_a_legal_stride():
    """torch leaves any number there: slices of one batch row, or of one head."""
    x = torch.zeros(5, 7, 3, 16, dtype=HALF)
    for part in (x[2:3], x[:, :, 1:2], x[:, 3:4], torch.zeros(1).half().expand(1, 1, 1, 16)[..., :16].clone()):
        odd = part.as_strided(part.shape, [s if n > 1 else 3 for n, s in zip(part.shape, part.stride(), strict=True)])
        odd = odd.transpose(1, 2)
        assert kernels.describable(odd)
        shape, strides, tile = descriptors.tile(launch.Layout(odd.dtype, odd.shape, odd.stride(), 0), 64, 16)
        assert shape == list(odd.shape)
        assert all(2 * stride % 16 == 0 for stride in strides[:3])
        assert tile == [1, 1, 64, 16]


def test_one_binary_for_all_shapes(monkeypatch):
    """Types and constants of a launch do not hold lengths, batches or heads."""
    seen = set()

    class Recorder:
        arg_names = attention.attention_kernel.arg_names

        def __getitem__(self, grid):
            def run(K, V, **named):
                described = tuple((x.base.dtype, tuple(x.block_shape)) for x in (K, V))
                constants = {n: x for n, x in named.items() if n.isupper() and not isinstance(x, torch.Tensor)}
                seen.add((described, tuple(sorted(constants.items()))))

            return run

    monkeypatch.setattr(launch, "_PREPARED", {})  # launches prepared before know the kernel itself
    monkeypatch.setattr(attention, "attention_kernel", Recorder())
    for batch, length, heads in ((1, 1, 1), (1, 113, 2), (3, 128, 5), (2, 1023, 2)):
        x = torch.zeros(batch, length, heads, 16, dtype=HALF)
        fr.attention(x, x, x, backend="triton", debug=False)
    assert len(seen) == 1


def test_ships_for_hopper_and_16_bits():
    for loop in (*config.TMA_LOOPS, "polynomial_tma"):
        assert [arch for arch in config.ARCHS if kernels.ships(loop, arch, HALF, 128)] == ["sm_90"]
        with pytest.raises(ValueError, match="expected 16 bits"):
            kernels.select(loop, "sm_90", torch.float32, 64)
