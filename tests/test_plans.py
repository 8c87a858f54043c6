"""Plans and their cache: lowered once, seen when tensors change, other numbers in the same tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from numerics import DEVICE, Call, axial, every_modulation, generator, grid, scales, tensors
from small_calls import BATCH, TOKENS, good, modulated, ones
from strategies import calls

import fastrope as fr
from fastrope import device as devices
from fastrope.planning import build


@pytest.fixture
def lowered(monkeypatch):
    """Counts the plans that were really built."""
    build._CACHE.clear()
    built = []
    monkeypatch.setattr(build, "plan", lambda _plan=build.plan, **a: built.append(1) or _plan(**a))
    return built


def test_the_same_tensors_are_lowered_once(lowered):
    call, mods = good(), modulated()["modulations"]
    for _ in range(3):
        # As a processor does: new objects around the same tensors on every call.
        again = [fr.QueryScale(mods[0].scale, slice(4, None), (1, 2)), fr.BiasDelta(1.2, 0.9)]
        rope = fr.RoPE(call["rope"].angles, call["rope"].axis)
        fr.attention(**{**call, "rope": rope}, modulations=again)
    assert len(lowered) == 1


def test_views_made_anew_are_the_same_tensors(lowered):
    call, masks = good(), ones(2, BATCH, 1, 1, TOKENS) > 0
    masks[1, :, :, :, 3] = False
    heads_first = {name: call.pop(name).transpose(1, 2) for name in "qkv"}
    call["enable_gqa"] = True
    inputs = [heads_first[name] for name in "qkv"]
    found = [fr.scaled_dot_product_attention(*inputs, attn_mask=masks[n], **call) for n in (0, 1, 0, 1)]
    assert len(lowered) == 2
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    masks[0] = masks[1]
    assert torch.equal(fr.scaled_dot_product_attention(*inputs, attn_mask=masks[0], **call), found[1])
    assert len(lowered) == 3
    bias = ones(2, TOKENS)
    for n in (0, 1, 0, 1):
        fr.attention(**{name: x.transpose(1, 2) for name, x in heads_first.items()}, modulations=[fr.KeyBias(bias[n])])
    assert len(lowered) == 5


@pytest.mark.parametrize("what", ["scale", "angles", "mask", "bias", "keys"])
def test_a_tensor_changed_in_place_is_seen(lowered, what):
    call = good()
    scale, bias = scales(generator(2), "levels", TOKENS), torch.tensor([1.5], device=DEVICE)
    mask, keys = ones(BATCH, TOKENS) > 0, ones(TOKENS) > 0
    mask[:, 3], keys[5] = False, False
    arguments = dict(modulations=[fr.QueryScale(scale), fr.BiasDelta(bias, 0.7, keys)], key_mask=mask)
    before = fr.attention(**call, **arguments)
    changed = {"scale": scale, "angles": call["rope"].angles, "mask": mask, "bias": bias, "keys": keys}[what]
    if changed.dtype == torch.bool:
        changed[:] = changed.roll(1, -1)
    else:
        changed.mul_(0.5)
    after = fr.attention(**call, **arguments)
    assert not torch.equal(before, after)
    assert len(lowered) == 2
    build._CACHE.clear()
    assert torch.equal(after, fr.attention(**call, **arguments))


def test_the_cache_is_small_and_keeps_what_is_used(lowered):
    call = good()
    masks = [ones(BATCH, TOKENS) > 0 for _ in range(30)]
    for mask in masks:
        fr.attention(**call, key_mask=mask)
        fr.attention(**call, key_mask=masks[0])
    assert len(build._CACHE) == build._CACHE_SIZE
    assert len(lowered) == 30


def test_other_numbers_are_other_plans(lowered):
    call = good()
    for delta in (0.8, 0.9):
        for keys in (slice(0, 3), slice(0, 4)):
            fr.attention(**call, modulations=[fr.BiasDelta(1.0, delta, keys)])
    assert len(lowered) == 4


@pytest.mark.parametrize("kind", [torch.tensor, np.array, np.int64], ids=lambda kind: kind.__name__)
def test_bounds_of_a_slice_count_by_value(lowered, kind):
    """A tensor as a bound is what it was when the modulation was made, and equals its like in the next call."""
    call, bound = good(), kind(3)
    first = fr.BiasDelta(1.0, 0.8, slice(0, bound))
    out = fr.attention(**call, modulations=[first])
    if kind is not np.int64:
        bound += 1
    changed = fr.attention(**call, modulations=[fr.BiasDelta(1.0, 0.8, slice(0, bound))])
    assert torch.equal(out, fr.attention(**call, modulations=[first]))
    assert torch.equal(out, changed) == (kind is np.int64)
    assert torch.equal(changed, fr.attention(**call, modulations=[fr.BiasDelta(1.0, 0.8, slice(0, int(bound)))]))
    assert len(lowered) == 1 + (kind is not np.int64)


def test_inference_tensors_are_not_cached(lowered):
    with torch.inference_mode():
        call, mods = good(), modulated()
        for _ in range(2):
            fr.attention(**call, **mods)
    assert len(lowered) == 2


@pytest.mark.parametrize("backend", ["eager", "sdpa", "triton"])
def test_a_plan_serves_many_layers(backend):
    """Other q, k and v, another number of heads, another dtype: the plan stays."""
    if backend == "triton" and devices.kernel_obstacle(torch.empty(1, device=DEVICE)):
        pytest.skip("triton cannot run here")
    g = generator(5)
    modulations = every_modulation(g, 20, 20, 16, "zero")
    tokens = Call(*tensors(g, queries=20, dim=16), axial(grid(20, 4), 16), modulations=modulations)
    plan = tokens.planned()
    for heads, dtype in ((1, torch.float32), (2, torch.float16)):
        q, k, v = tensors(g, queries=20, heads=heads, dim=16, dtype=dtype)
        call = replace(tokens, q=q, k=k, v=v)
        out, lse = fr.attention(call.q, call.k, call.v, plan=plan, return_lse=True, backend=backend)
        expected, expected_lse = call.run(backend)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


def test_a_plan_ignores_later_changes():
    """It holds values, not the caller's tensors."""
    call, scale = good(), scales(generator(2), "levels", TOKENS)
    rope = call.pop("rope")
    plan = fr.plan(rope=rope, modulations=[fr.QueryScale(scale)])
    before = fr.attention(**call, plan=plan, backend="sdpa")
    scale.zero_()
    assert torch.equal(before, fr.attention(**call, plan=plan, backend="sdpa"))


@given(call=calls(tokens=(5, 17, 33), dims=(16,)))
def test_other_numbers_in_the_groups_of_a_plan(call):
    """The plan of the other modulations, bit by bit, with every other table shared."""
    groups = [m for m in call.modulations if isinstance(m, fr.BiasDelta)]
    numbers = [(m.bias * 0.7 + 0.1, m.delta * 1.3 + 0.05) for m in groups]
    others = {id(m): replace(m, bias=bias, delta=delta) for m, (bias, delta) in zip(groups, numbers, strict=True)}
    plan = call.planned()
    found = plan.with_groups(numbers)
    expected = replace(call, modulations=[others.get(id(m), m) for m in call.modulations]).planned()
    assert found.spec == expected.spec
    values = plan.lowered.values
    several = (plan.lowered.groups, values and values.groups)
    other = [x for held in several if held for x in (held.values, held.for_kernels)]
    other += [values.factors, values.for_kernels] if values and values.groups else []
    for tensor, wanted, before in zip(found.tensors, expected.tensors, plan.tensors, strict=True):
        assert torch.equal(tensor, wanted)
        assert (tensor is before) == all(before is not x for x in other)
    assert torch.equal(call.run("eager", False, **unplanned(found)), call.run("eager", False, **unplanned(expected)))


def test_other_numbers_in_the_logit_biases_of_a_plan():
    """Every step has a plan of its own numbers, and all other tables are shared."""
    call = Call(*tensors(generator(5), batch=2, queries=33, dim=16), axial(grid(33), 16))
    made = lambda *biases: replace(call, modulations=[fr.LogitBias(b, k) for b, k in zip(biases, keys, strict=True)])  # noqa: E731
    keys = (slice(4, 20), slice(10, None))
    hiding = torch.linspace(-1, 1, 33).masked_fill(torch.arange(33) % 5 == 0, -torch.inf)
    nothing = torch.full((2, 1), -torch.inf)
    plan, expected = (made(*b).planned() for b in ((torch.linspace(0, 1, 33), torch.ones(2, 33)), (hiding, nothing)))
    found = plan.with_biases([hiding, nothing])
    assert found.spec == expected.spec
    assert all(map(torch.equal, found.tensors, expected.tensors))
    changed = [x is not y for x, y in zip(found.tensors, plan.tensors, strict=True)]
    assert sum(changed) == 2
    for backend in ("eager", "sdpa"):
        out = call.run(backend, False, **unplanned(found))
        assert torch.equal(out, call.run(backend, False, **unplanned(expected)))


@pytest.mark.parametrize(
    ("biases", "name"),
    [([], "biases"), ([1.0, 1.0], "biases"), ([torch.ones(3, 12)], "biases"), ([float("nan")], "LogitBias.bias"),
     ([torch.ones(7)], "LogitBias.bias"), ([1.0], "biases")],
)  # fmt: skip
def test_logit_biases_that_do_not_fit_a_plan(biases, name):
    few = torch.zeros(12)
    few[:3] = 1.0
    plan = fr.plan(modulations=[fr.LogitBias(few, slice(4)), fr.LogitBias(0.0)], num_keys=12)
    with pytest.raises(ValueError, match=rf"^{name}\b.*expected .*received"):
        plan.with_biases(biases)
    assert plan.with_biases([2 * few]).lowered.unmodulated is plan.lowered.unmodulated


def unplanned(plan: fr.Plan) -> dict:
    """A plan in place of what it is made of."""
    return {"plan": plan, "rope": None, "key_rope": None, "modulations": (), "key_mask": None}


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ([], "numbers"),
        ([(1.0, 1.0)] * 2, "numbers"),
        ([(1.0, torch.ones(3))], "numbers"),
        ([(float("nan"), 1.0)], "BiasDelta.bias"),
    ],
)
def test_numbers_that_do_not_fit_a_plan(numbers, name):
    plan = fr.plan(modulations=[fr.BiasDelta(2.0, keys=slice(4)), fr.BiasDelta(keys=slice(4, 6))], num_keys=12)
    with pytest.raises(ValueError, match=rf"^{name}\b.*: expected .* received"):
        plan.with_groups(numbers)


def test_nbytes_are_those_of_the_tables():
    call = Call(
        *tensors(generator(6), queries=60, dim=32),
        axial(grid(60), 32),
        modulations=every_modulation(generator(6), 60, 60, 32),
    )
    plan = call.planned()
    assert plan.nbytes == sum(t.numel() * t.element_size() for t in plan.tensors) > 0


# ---- other angles ----------------------------------------------------------------------------------------------------

TURNED = {
    "nothing": [], "a group": [fr.BiasDelta(1.2, 0.7, slice(9, 20))],
    "weights": [fr.BandWeight(torch.linspace(0.3, 1.2, 8), slice(9, 20)), fr.LogitBias(0.4, slice(5, 20))],
    "sorted keys": [fr.ValueGain(0.5, slice(3)), fr.BandWeight(torch.linspace(0.3, 1.2, 8), torch.arange(0, 60, 3))],
    "unmodulated queries": [fr.LogitGain(torch.where(torch.arange(60) < 9, 1.4, 1.0), slice(9, 20))],
    "scale buckets": [fr.QueryScale(torch.where(torch.arange(60) < 30, 0.6, 0.8), slice(20, 40), axes=(1,))],
    "per-query scales": [fr.QueryScale(torch.linspace(0.5, 1, 60), slice(20, 40), axes=(1, 2))],
}  # fmt: skip


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("case", TURNED)
def test_a_plan_with_other_angles_is_that_of_these_angles(case, apart, applied):
    """To the same bits, and without making anew what has no angles in it."""
    rope = axial(grid(60, 4), 16, applied=applied)
    keys = axial(grid(60, frame=1), 16, applied=applied) if apart else None
    factor = torch.linspace(1, 0.4, 8, dtype=torch.float64)
    others = [r and replace(r, angles=r.angles * factor) for r in (rope, keys)]
    made = fr.plan(rope=rope, key_rope=keys, modulations=TURNED[case])
    found = made.with_rope(*others)
    expected = fr.plan(rope=others[0], key_rope=others[1], modulations=TURNED[case])
    assert found.spec == expected.spec
    for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
    assert torch.equal(found.resolved.rope.angles, others[0].angles)
    if case != "per-query scales":
        shared = {t.data_ptr() for t in made.tensors} & {t.data_ptr() for t in found.tensors}
        assert made.lowered.keys.segments.data_ptr() in shared
    others[0].angles.zero_()  # the caller's
    assert bool(found.resolved.rope.angles.any())
    assert bool(found.lowered.queries.angles.any())


def test_other_angles_are_of_the_same_tokens():
    rope = axial(grid(20), 16)
    made = fr.plan(rope=rope, modulations=[fr.BiasDelta(1.2, 0.7, slice(9, 20))])
    for others, name in (((axial(grid(21), 16),), "rope"), ((axial(grid(20), 16, "half"),), "rope"),
                         ((axial(grid(20), 16, applied=True),), "rope"), ((rope, rope), "key_rope")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: expected shape, pairing, applied"):
            made.with_rope(*others)
    with pytest.raises(ValueError, match="^rope"):
        fr.plan(num_keys=3).with_rope(rope)
