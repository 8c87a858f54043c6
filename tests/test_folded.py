"""Modulations folded into the keys by the kernels, before torch's attention: against the reference in float64, by the
one tolerance rule."""

from __future__ import annotations

import contextlib
import types
from dataclasses import replace

import pytest
import torch
from folding import DTYPES, GROUPED, MODULATIONS, SORTED, a_call, both, dtypes, run, weight
from hypothesis import given, settings
from numerics import (
    LAYOUTS,
    Call,
    Tally,
    assert_close,
    axial,
    generator,
    grid,
    key_masks,
    scales,
    scatter,
    skip_unless_runnable,
    tensors,
)  # fmt: skip
from strategies import calls

import fastrope as fr
from fastrope import device as devices
from fastrope.backends import folded
from fastrope.rope import rotate

pytest.importorskip("triton")
from fastrope import kernels


@pytest.fixture(autouse=True)
def _runnable():
    skip_unless_runnable("triton")


def check(call: Call, tally: Tally | None = None) -> torch.Tensor:
    out = run(call)
    assert out.shape == call.q.shape
    assert out.dtype == call.q.dtype
    errors = assert_close(out, call.exact()[0], call.low()[0], name=call.label)
    if tally is not None:
        tally.add(errors, call.q.dtype)
    return out


# ---- against the reference -------------------------------------------------------------------------------------------


def foldable(call: Call) -> Call:
    modulations = [m for m in call.modulations if isinstance(m, (fr.BandWeight, fr.BiasDelta, fr.ValueGain))]
    return replace(call, modulations=modulations)


@dtypes
def test_any_composition(dtype):
    tally = Tally()
    options = {"tokens": (1, 2, 17, 33, 66), "dims": (16, 20, 80), "heads": ((1, 1), (2, 1), (1, 3), (2, 2))}

    @settings(max_examples=40)
    @given(calls(dtype, **options).map(foldable))
    def run(call):
        check(call, tally)

    run()
    tally.check(f"folded {dtype}")


@dtypes
@pytest.mark.parametrize("applied", [False, True], ids=["raw", "applied"])
@pytest.mark.parametrize("case", MODULATIONS)
def test_modulations(case, applied, dtype):
    call = a_call(dtype, modulations=MODULATIONS[case])
    call = replace(call, rope=call.rope.as_applied(applied), label=case)
    assert (call.planned().lowered.keys.order is not None) == (case in SORTED)
    check(call)


@dtypes
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("dim", [16, 20, 64, 96, 128])
@pytest.mark.parametrize("modulations", [None, both], ids=["plain", "together"])
def test_head_dims_and_pairings(modulations, dim, pairing, dtype):
    g = generator(dim)
    q, k, v = tensors(g, queries=37, heads=2, dim=dim, dtype=dtype)
    given = [] if modulations is None else [weight(g, dim, slice(3, 30)), fr.BiasDelta(1.3, 0.6, slice(20, 35))]
    check(Call(q, k, v, axial(grid(37, 4), dim, pairing), modulations=given, label=pairing))


@pytest.mark.parametrize("length", [1, 2, 113, 239])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(length, dtype):
    check(a_call(dtype, length, modulations=lambda g: [weight(g), fr.BiasDelta(1.2, 0.7, slice(length // 2, None))]))


@dtypes
@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (70, 1), (33, 50)])
@pytest.mark.parametrize("applied", [False, True], ids=["raw", "applied"])
def test_keys_of_other_tokens(applied, queries, keys, dtype):
    g = generator(5)
    q, k, v = tensors(g, queries=queries, keys=keys, heads=4, key_heads=2, dim=16, dtype=dtype)
    modulations = [weight(g, keys=slice(keys // 3, None)), fr.BiasDelta(1.2, 0.7, slice(keys // 2, None))]
    rope, key_rope = axial(grid(queries), 16), axial(grid(keys, frame=1), 16, applied=applied)
    check(Call(q, k, v, rope, key_rope, modulations))


@dtypes
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("modulations", [None, both], ids=["plain", "together"])
def test_grouped_heads(modulations, key_heads, dtype):
    check(a_call(dtype, heads=6, key_heads=key_heads, modulations=modulations))


@dtypes
def test_rows_with_angles_of_their_own(dtype):
    g = generator(3)
    q, k, v = tensors(g, batch=2, queries=41, dim=16, dtype=dtype)
    check(Call(q, k, v, axial(scatter(g, 41, batch=2), 16), modulations=both(g)))


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("applied", [None, False, True])
def test_layouts(applied, layout, dtype):
    """What lies around a strided tensor is NaN; what is not rotated is read where it lies, or packed."""
    call = a_call(dtype, dim=24, heads=2, layout=layout)
    rope = None if applied is None else axial(grid(37), 24, applied=applied)
    check(replace(call, rope=rope, label=layout))
    check(replace(call, rope=rope, modulations=[fr.BiasDelta(1.2, 0.6, slice(9, 30))], label=layout))


@dtypes
def test_buffers_may_start_as_nan(dtype, monkeypatch):
    def poisoned(*args, empty=torch.empty, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    call = a_call(dtype, modulations=both)
    expected = run(call)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(run(call), expected)


def test_weights_are_rounded_once_with_the_rotation(monkeypatch):
    call = a_call(torch.float16, modulations=lambda g: [weight(g)])
    seen, attend = [], folded.F.scaled_dot_product_attention
    monkeypatch.setattr(folded.F, "scaled_dot_product_attention", lambda q, k, v, scale: seen.append(k) or attend(
        q, k, v, scale=scale))  # fmt: skip
    run(call)
    w = call.modulations[0].weight.repeat_interleave(2)
    exact = (w * rotate(call.k.double(), call.rope.angles, call.rope.pairing)).transpose(1, 2)
    half = torch.finfo(torch.float16).eps / 2
    assert bool(((seen[0].double() - exact).abs() <= half * exact.abs() + 1e-6).all())


def test_the_callers_tensors_stay_as_they_are():
    call = a_call(modulations=MODULATIONS["a group"])
    call = replace(call, rope=call.rope.as_applied())
    before = [x.clone() for x in (call.q, call.k, call.v)]
    run(call)
    assert all(torch.equal(x, y) for x, y in zip(before, (call.q, call.k, call.v), strict=True))


def test_the_output_lies_as_it_is_handed_on():
    """A copy of it would cost as much as a pass of the prologue."""
    assert run(a_call(modulations=both)).is_contiguous()


# ---- masks -----------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    ("kind", "heads"), [("random", (2, 2)), ("random", (4, 2)), ("row", (4, 2)), ("shared", (2, 2))], ids=str
)
@pytest.mark.parametrize("name", ["nothing", *GROUPED, *SORTED, "a group of each row"])
def test_masked_keys_are_left_out(name, kind, heads, dtype):
    """Also where they hold NaN, and where a row has no key at all."""
    call = a_call(dtype, modulations=MODULATIONS.get(name), heads=heads[0], key_heads=heads[1])
    mask = key_masks(generator(3), kind, 2, 37)
    call = replace(call, key_mask=mask)
    out = check(call)
    hidden = ~mask.expand(2, -1)[:, :, None, None]
    poisoned = replace(call, k=call.k.masked_fill(hidden, torch.nan), v=call.v.masked_fill(hidden, torch.nan))
    assert torch.equal(run(poisoned), out)


def test_a_mask_costs_no_keys():
    """Every row attends to as many keys as it has."""
    call, seen = a_call(modulations=both), []
    mask = torch.arange(37)[None] < torch.tensor([[30], [11]])
    attend = folded.F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            folded.F, "scaled_dot_product_attention",
            lambda q, k, v, **options: seen.append((q.shape[0], k.shape[2])) or attend(q, k, v, **options),
        )  # fmt: skip
        run(replace(call, key_mask=mask))
    assert seen == [(1, 30), (1, 11)]


# ---- plans -----------------------------------------------------------------------------------------------------------


@dtypes
def test_neutral_modulations_give_the_same_bits(dtype):
    call = a_call(dtype)
    neutral = [
        fr.QueryScale(torch.ones(37)), fr.BandWeight(torch.ones(8), slice(4, 9)), fr.BiasDelta(1.0, 1.0, slice(5, 20)),
        fr.LogitGain(torch.ones(37)), fr.LogitBias(0.0), fr.KeyBias(torch.zeros(37)), fr.ValueGain(1.0, slice(4)),
        fr.BiasDelta(1.0, 1.0, slice(9), on="values"),
    ]  # fmt: skip
    mask = torch.ones(2, 37, dtype=torch.bool)
    assert torch.equal(run(replace(call, modulations=neutral, key_mask=mask)), run(call))


@dtypes
@pytest.mark.parametrize("applied", [False, True], ids=["raw", "applied"])
@pytest.mark.parametrize("group", [[], [fr.BiasDelta(1.3, 0.6, slice(10, 25))]], ids=["alone", "beside a group"])
def test_other_weights_in_a_plan(group, applied, dtype):
    call = a_call(dtype)
    g = generator(8)
    first, second = weight(g, keys=slice(5, 30)), weight(g, keys=slice(5, 30))
    call = replace(call, rope=call.rope.as_applied(applied), modulations=[first, *group])
    plan, wanted = call.planned(), replace(call, modulations=[second, *group])
    found, before = plan.with_weight(second.weight), run(call, plan)
    assert found.spec == wanted.planned().spec
    assert torch.equal(run(call, found), run(wanted))
    assert torch.equal(run(call, plan), before)
    assert not torch.equal(run(call, found), before)


@dtypes
def test_other_numbers_in_the_groups_of_a_plan(dtype):
    first, second = (1.0, torch.tensor([0.5, 0.6])), (0.7, torch.tensor([0.0, 1.2]))

    def grouped(numbers) -> Call:
        return a_call(dtype, modulations=lambda g: [weight(g), fr.BiasDelta(*numbers, slice(9, 30))])

    call = grouped(first)
    found = run(call, call.planned().with_groups([second]))
    assert torch.equal(found, run(grouped(second)))
    assert not torch.equal(found, run(call))


def test_kernels_launch_on_the_device_of_the_tensors(monkeypatch):
    """Three packs and the means, all inside."""
    entered = []

    @contextlib.contextmanager
    def launching_on(device):
        entered.append(device)
        yield
        entered.append("left")

    monkeypatch.setattr(folded, "launching_on", launching_on)
    for name in ("pack_rows", "group_means"):
        launch = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *call, launch=launch: entered.append("ran") or launch(*call))
    run(a_call(modulations=MODULATIONS["scattered"]))
    assert entered == [torch.device("cpu"), *["ran"] * 4, "left"]


def test_what_folds():
    rope, gain = axial(grid(37), 16), torch.linspace(0.5, 1.5, 37)
    weighted, group = fr.BandWeight(torch.linspace(0.5, 1.5, 8), slice(9)), fr.BiasDelta(1.2, 0.7)
    mask = torch.arange(37)[None] < 30
    hides = fr.KeyBias(torch.where(mask[0], 0.0, -torch.inf))
    values = [fr.ValueGain(-1.0, slice(3)), fr.BiasDelta(1.2, 0.7, on="values"), hides]
    for modulations in ([], [weighted], [group], [weighted, group], values):
        assert folded.folds(fr.plan(rope=rope, modulations=modulations).lowered)
        for more in (fr.QueryScale(scales(generator(0), "levels", 37)), fr.LogitGain(gain, slice(2)),
                     fr.LogitBias(0.5, slice(2)), fr.KeyBias(gain)):  # fmt: skip
            assert not folded.folds(fr.plan(rope=rope, modulations=[*modulations, more]).lowered)
        assert folded.folds(fr.plan(rope=rope, modulations=modulations, key_mask=mask).lowered)
    assert folded.folds(fr.plan().lowered)


def test_what_is_taken(monkeypatch):
    gain = fr.LogitGain(torch.full((9,), 0.5))
    plan, other = (fr.plan(modulations=m, num_keys=9).lowered for m in ([], [gain]))
    assert not folded.takes(torch.empty(1), plan)

    def like(dtype):
        return types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype)

    monkeypatch.setattr(devices, "kernel_obstacle", lambda q: "float64" if q.dtype == torch.float64 else None)
    assert [folded.takes(like(dtype), plan) for dtype in (torch.bfloat16, torch.float32, torch.float64)] == [1, 1, 0]
    assert not folded.takes(like(torch.bfloat16), other)


def test_the_kernel_of_torchs_attention_has_a_name(monkeypatch):
    """The one that torch says it would take; the pin, where there is one, before that."""
    q = torch.empty(1, 9, 4, 20, dtype=torch.float16)
    for choice, name in folded.NAMES.items():
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda q, k, v, scale, choice=choice: int(choice.value))
        assert folded.kernel_name(q, q[:, :5]) == name


def test_cudnn_is_pinned_where_torch_would_take_another(monkeypatch):
    """Among the kernels that the caller has left on, and only then: asking is cheap, pinning is not."""

    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.bfloat16

    pins, x = [], OnGpu()
    monkeypatch.setattr(devices, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "mem_efficient_sdp_enabled", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "math_sdp_enabled", lambda: True)
    monkeypatch.setattr(folded, "sdpa_kernel", lambda kernels, set_priority: pins.append((kernels, set_priority)))
    kind = folded.SDPBackend
    for choice in (kind.CUDNN_ATTENTION, kind.FLASH_ATTENTION):
        monkeypatch.setattr(folded, "_choice", lambda *call, choice=choice: choice)
        folded._pinned(x, x, x, 1.0)
    assert pins == [([kind.CUDNN_ATTENTION, kind.FLASH_ATTENTION, kind.MATH], True)]
    monkeypatch.setattr(devices, "architecture", lambda device: "sm_80")
    folded._pinned(x, x, x, 1.0)
    assert len(pins) == 1
