"""Untwisting RoPE's weights, schedules and what it asks for, against METHODS' formula and numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastrope as fr
from fastrope.methods import Linear, PerStep
from fastrope.methods.untwisting import DEPRECATED, PRESETS
from fastrope.sharing import SHARED, Sharing

HOSTS = {
    "flux": ((16, 56, 56), (8, 28, 28)),
    "z-image": ((32, 48, 48), (16, 24, 24)),
    "flux2": ((32, 32, 32, 32), (16, 16, 16, 16)),
}
LAYOUT = fr.TokenLayout(text=7, target=(3, 5), references=[(2, 4), (3, 3)], shared=[(3, 5), (4, 2)])


def site(step=0, num_steps=28, axes=(16, 56, 56), **more) -> fr.Site:
    return fr.Site(LAYOUT, step=step, num_steps=num_steps, axes_dim=axes, **more)


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("axis0", ["low", "match", 0.7])
@pytest.mark.parametrize("beta", [0.5, 2.0, 2.5])
def test_weights_follow_the_formula_on_every_axis(name, axis0, beta):
    axes, pairs = HOSTS[name]
    high, low = 0.25, 1.4
    weights = fr.UntwistingRoPE(s_hf=high, s_lf=low, beta=beta, axis0=axis0).weights(site(axes=axes))
    assert (weights.dtype, weights.shape) == (torch.float64, (sum(axes) // 2,))
    for axis, part in enumerate(weights.split(list(pairs))):
        curve = [high + (low - high) * (d / (len(part) - 1)) ** beta for d in range(len(part))]
        assert (curve[0], curve[-1]) == (high, low)
        flat = {"low": low, "match": None}.get(axis0, axis0)
        expected = curve if axis in (1, 2) or flat is None else [flat] * len(part)
        torch.testing.assert_close(part, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)


def test_an_axis_of_one_pair_has_the_highest_frequency_alone():
    weights = fr.UntwistingRoPE(s_hf=0.5, s_lf=2.0).weights(site(axes=(2, 2, 12)))
    assert weights[:3].tolist() == [2.0, 0.5, 0.5]
    assert weights[-1] == 2.0


def test_weights_are_in_the_order_of_the_ropes_pairs():
    """High frequencies are low indices: the weight rises, per axis, as the RoPE's angles fall."""
    rope = fr.RoPE.axial(LAYOUT.positions("flux"), (16, 56, 56))
    weights = fr.UntwistingRoPE(s_hf=0.1, s_lf=1.0, axis0="match").weights(site())
    for axis in (1, 2):
        own = rope.axis == axis
        assert bool((rope.angles[LAYOUT.target.stop - 1, own].diff() < 0).all())
        assert bool((weights[own].diff() > 0).all())


# ---- schedules -------------------------------------------------------------------------------------------------------


# Per preset: s_hf, s_lf, beta, AdaIN, blocks, ramp, then per axis of FLUX.1 and FLUX.2 (f)lat s_lf or the (c)urve.
NUMBERS = {
    "paper": ((0.25, 0.75), (1.0, 1.4), 2.0, 0.5, None, "run", "fcc", "fccf"),
    "bigstationw-2026-06": ((1.0, 0.0), (1.0, 3.0), 50.0, 0.5, None, "run", "fcc", "fccc"),
    "bigstationw-workflows-2026-06": ((1.0, 0.0), (1.0, 1.4), 2.5, 0.5, None, "run", "ccc", "cccc"),
    "xmarre-0.2": ((0.25, 0.75), (1.0, 1.4), 2.0, 0.0, "single", "active", "fcc", "cccc"),
}


@pytest.mark.parametrize("count", [2, 3, 4, 8, 9, 12, 28, 50, 51])
@pytest.mark.parametrize("name", NUMBERS)
def test_presets_at_the_first_middle_and_last_step(name, count):
    (high, low, beta, adain, blocks, ramp, _, _), method = NUMBERS[name], fr.UntwistingRoPE.from_preset(name)
    assert (method.s_hf, method.s_lf, method.beta, method.adain) == (high, low, beta, adain)
    assert (method.blocks, method.ramp) == (blocks, ramp)
    for step in (0, count // 2, count - 1):
        at = step / (count - 1)
        weights = method.weights(site(step, count))
        assert float(weights[8]) == pytest.approx(high[0] + (high[1] - high[0]) * at, abs=1e-14)
        assert float(weights[-1]) == pytest.approx(low[0] + (low[1] - low[0]) * at, abs=1e-14)


@pytest.mark.parametrize("name", NUMBERS)
def test_presets_split_the_axes_as_their_source_does(name):
    """FLUX.1 has one axis without spatial meaning, FLUX.2 two (frame and text)."""
    high, low, beta = NUMBERS[name][:3]
    for host, letters in (("flux", NUMBERS[name][6]), ("flux2", NUMBERS[name][7])):
        axes, pairs = HOSTS[host]
        weights = fr.UntwistingRoPE.from_preset(name).weights(site(27, axes=axes))
        for part, letter in zip(weights.split(list(pairs)), letters, strict=True):
            n = len(part)
            curve = [high[1] + (low[1] - high[1]) * (d / (n - 1)) ** beta for d in range(n)]
            expected = torch.tensor(curve if letter == "c" else [low[1]] * n, dtype=torch.float64)
            torch.testing.assert_close(part, expected, rtol=1e-14, atol=1e-14)


def test_every_preset_is_known_here():
    assert set(NUMBERS) == set(PRESETS)
    assert not set(PRESETS) & set(DEPRECATED)


def test_the_old_name_is_what_it_was_and_says_the_new_one():
    with pytest.warns(DeprecationWarning, match='"community" is deprecated.*"bigstationw-workflows-2026-06"') as seen:
        old = fr.UntwistingRoPE.from_preset("community")
    assert seen[0].filename == __file__
    assert old == fr.UntwistingRoPE(s_hf=(1.0, 0.0), s_lf=(1.0, 1.4), beta=2.5, adain=0.5, axis0="low")
    with pytest.warns(DeprecationWarning, match="community"):
        assert fr.UntwistingRoPE.from_preset("community", beta=3.0, axis0="match").beta == 3.0


@pytest.mark.parametrize(
    ("steps", "first", "last"),
    [((0.0, 0.5), 0, 9), (range(4, 12), 4, 11), (slice(5, None), 5, 19), ({2, 6, 7}, 2, 7), (None, 0, 19)],
)
def test_a_ramp_over_the_active_steps_ends_at_the_last_of_them(steps, first, last):
    dials = dict(s_hf=(0.2, 0.6), s_lf=(1.0, 1.5), steps=steps)
    run, active = fr.UntwistingRoPE(**dials), fr.UntwistingRoPE(**dials, ramp="active")
    for step in range(first, last + 1):
        at = (step - first) / (last - first)
        weights = active.weights(site(step, 20))
        assert float(weights[8]) == pytest.approx(0.2 + 0.4 * at, abs=1e-14)
        assert float(weights[-1]) == pytest.approx(1.0 + 0.5 * at, abs=1e-14)
        assert float(run.weights(site(step, 20))[8]) == pytest.approx(0.2 + 0.4 * step / 19, abs=1e-14)
    assert float(active.weights(site(last, 20))[8]) == 0.6


def test_a_ramp_over_one_active_step_is_its_start():
    assert float(fr.UntwistingRoPE(steps=7, ramp="active").weights(site(7))[8]) == 0.25


def test_a_weight_for_every_axis():
    method = fr.UntwistingRoPE(s_hf=0.5, s_lf=2.0, beta=1.0, axis0=("low", "match", 0.7, "match"))
    parts = method.weights(site(axes=(4, 4, 4, 6))).split([2, 2, 2, 3])
    assert [part.tolist() for part in parts] == [[2.0, 2.0], [0.5, 2.0], [0.7, 0.7], [0.5, 1.25, 2.0]]
    with pytest.raises(ValueError, match=r"^UntwistingRoPE\.axis0: expected 3 weights, one per axis of the model"):
        method.weights(site())
    with pytest.raises(ValueError, match=r"^UntwistingRoPE\.axis0: expected weights for the model's 2 axes"):
        fr.UntwistingRoPE.from_preset("xmarre-0.2").weights(site(axes=(4, 4), spatial_axes=(0, 1)))


def test_a_run_of_one_step_is_its_first():
    weights = fr.UntwistingRoPE().weights(site(0, 1))
    assert (float(weights[8]), float(weights[-1])) == (0.25, 1.0)


def test_any_schedule():
    method = fr.UntwistingRoPE(s_hf=PerStep([0.1, 0.2, 0.3]), s_lf=lambda s: 1 + s.layer, adain=Linear(0.0, 1.0))
    here = site(2, 3, layer=4)
    assert (float(method.weights(here)[8]), float(method.weights(here)[-1])) == (0.3, 5.0)
    assert method.sharings(here) == [Sharing(SHARED, 1.0)]


def test_presets_take_dials_and_defaults_are_the_papers():
    assert fr.UntwistingRoPE() == fr.UntwistingRoPE.from_preset("paper")
    assert fr.UntwistingRoPE.from_preset("bigstationw-2026-06", beta=3.0, axis0="match").beta == 3.0
    assert dataclasses.replace(fr.UntwistingRoPE(), adain=0.1).adain == 0.1
    with pytest.raises(ValueError, match=r"^preset: expected one of \('paper', .*\), received 'mine'"):
        fr.UntwistingRoPE.from_preset("mine")


# ---- where and on whom -----------------------------------------------------------------------------------------------


def test_keys_are_the_references():
    shared = fr.UntwistingRoPE()
    assert shared.modulations(site())[0].keys == LAYOUT.shared == slice(39, 62)
    assert shared.sharings(site()) == [Sharing(SHARED, 0.5)]
    for index in (0, 1):
        native = fr.UntwistingRoPE(reference=index)
        assert native.modulations(site())[0].keys == LAYOUT.reference(index)
        assert native.sharings(site()) == [Sharing(index, 0.5)]
        assert dataclasses.replace(native, adain=0.0).sharings(site()) == []


def test_equal_weights_are_the_same_object():
    """So that a binding finds its plan again."""
    first, second = (fr.UntwistingRoPE().modulations(site(3, layer=layer))[0] for layer in (0, 5))
    assert first is second
    assert first is not fr.UntwistingRoPE().modulations(site(4))[0]


def test_blocks_layers_and_steps():
    method = fr.UntwistingRoPE(blocks="single", layers=slice(20, None), steps=(0.0, 0.5))
    active = [
        (layer, step, kind)
        for layer in (19, 20)
        for step in (0, 3, 4)
        for kind in ("double", "single")
        if method.modulations(site(step, 8, layer=layer, kind=kind))
    ]
    assert active == [(20, 0, "single"), (20, 3, "single")]
    assert method.sharings(site(4, 8, layer=20, kind="single")) == []
    several = fr.UntwistingRoPE(blocks=("single", "joint"))
    assert [bool(several.modulations(site(kind=kind))) for kind in ("double", "single", "joint")] == [False, True, True]
    confined = fr.At(fr.UntwistingRoPE(), layers=3)
    assert [len(confined.sharings(site(layer=n))) for n in (2, 3)] == [0, 1]
    nested = fr.At(fr.At(fr.UntwistingRoPE(), fr.BiasDelta(delta=2.0)), steps=1)
    assert [len(nested.sharings(site(step))) for step in (0, 1)] == [0, 1]


def test_neutral_dials_do_nothing_on_any_sequence():
    """But a shared reference is seen at any weights, so it must be there."""
    bare, dials = fr.Site(fr.TokenLayout(7, (3, 5))), dict(s_hf=1, s_lf=1, adain=0)
    neutral = fr.UntwistingRoPE(reference=3, **dials)
    assert neutral.modulations(bare) == neutral.sharings(bare) == []
    with pytest.raises(ValueError, match=r"^UntwistingRoPE\.reference: expected a site with a shared reference"):
        fr.UntwistingRoPE(**dials).sharings(bare)


def test_a_reference_that_is_not_there():
    bare = fr.Site(fr.TokenLayout(7, (3, 5)))
    with pytest.raises(ValueError, match=r"^UntwistingRoPE\.reference: expected a site with a shared reference"):
        fr.UntwistingRoPE().modulations(bare)
    with pytest.raises(ValueError, match=r"^UntwistingRoPE: expected a sequence with at least one reference"):
        fr.UntwistingRoPE(reference=0).modulations(bare)
    with pytest.raises(ValueError, match=r"^UntwistingRoPE\.reference: expected a reference in \[0, 2\), received 2"):
        fr.UntwistingRoPE(reference=2).sharings(site())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"s_hf": (1.0,)}, r"^UntwistingRoPE\.s_hf: expected \(first step, last step\), received \(1\.0,\)"),
        ({"s_lf": (1.0, "x")}, r"^UntwistingRoPE\.s_lf: expected a finite number, received 'x'"),
        ({"s_hf": float("nan")}, r"^UntwistingRoPE\.s_hf: expected a finite number"),
        ({"beta": 0}, r"^UntwistingRoPE\.beta: expected a number above 0, received 0"),
        ({"beta": True}, r"^UntwistingRoPE\.beta: expected a finite number, received True"),
        ({"axis0": "high"}, r"^UntwistingRoPE\.axis0: expected one of \('low', 'match'\), or a number"),
        ({"axis0": None}, r"^UntwistingRoPE\.axis0: expected one of"),
        ({"axis0": ("low", "high")}, r"^UntwistingRoPE\.axis0: expected one of"),
        ({"axis0": ()}, r"^UntwistingRoPE\.axis0: expected a weight per axis"),
        ({"axis0": {3: ("low", "match")}}, r"^UntwistingRoPE\.axis0: expected a weight per axis, by the number"),
        ({"axis0": {3: "low"}}, r"^UntwistingRoPE\.axis0: expected a weight per axis, by the number"),
        ({"axis0": float("nan")}, r"^UntwistingRoPE\.axis0: expected a finite number"),
        ({"ramp": "steps"}, r"^UntwistingRoPE\.ramp: expected one of \('run', 'active'\), received 'steps'"),
        ({"adain": 1.5}, r"^UntwistingRoPE\.adain: expected a strength in 0\.\.1, received 1\.5"),
        ({"reference": -1}, r'^UntwistingRoPE\.reference: expected "shared" or an index from 0, received -1'),
        ({"reference": "first"}, r"^UntwistingRoPE\.reference: expected"),
        ({"reference": True}, r"^UntwistingRoPE\.reference: expected"),
        ({"blocks": "triple"}, r"^kinds: expected some of"),
        ({"layers": "all"}, r"^layers: expected"),
        ({"steps": (0.5, 0.2)}, r"^steps: expected fractions"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        fr.UntwistingRoPE(**arguments)


def test_a_scheduled_strength_is_checked_when_it_is_asked_for():
    with pytest.raises(ValueError, match=r"^UntwistingRoPE\.adain: expected a strength in 0\.\.1, received 2\.0"):
        fr.UntwistingRoPE(adain=lambda s: 2.0).sharings(site())


def test_layouts_with_shared_references():
    assert (len(LAYOUT), LAYOUT.num_keys) == (39, 62)
    assert fr.TokenLayout(7, (3, 5)).shared == slice(22, 22)
    assert "shared=[(3, 5), (4, 2)]" in repr(LAYOUT)
    assert fr.TokenLayout(7, (3, 5), references=[(2, 4), (3, 3)]) != LAYOUT
    with pytest.raises(ValueError, match=r"^shared\[0\]: expected"):
        fr.TokenLayout(shared=[3])


# ---- what it does to attention ---------------------------------------------------------------------------------------


def test_mass_on_the_aligned_token_falls_with_s_hf():
    """Every token looks the same, so the logit of a reference key is the sum of its weights times cosines: the aligned
    key has the sum of weights itself, and its mass is known."""
    grid, axes = (5, 4), (4, 14, 14)
    layout = fr.TokenLayout(0, grid, shared=[grid])
    rope = fr.RoPE.axial(layout.positions("flux"), axes)
    keys = fr.RoPE(torch.cat([rope.angles, rope.angles]), rope.axis)
    tokens, pairs = len(layout), sum(axes) // 2
    one = torch.zeros(1, 1, 1, 2 * pairs, dtype=torch.float64)
    one[..., 0::2] = 1.0
    q, k = one.expand(1, tokens, 1, -1), one.expand(1, 2 * tokens, 1, -1)
    at = layout.shared.start + torch.arange(tokens)
    gap = rope.angles[:, None] - rope.angles[None]
    found = []
    for high in (1.2, 1.0, 0.75, 0.5, 0.25, 0.0):
        where = fr.Site(layout, axes_dim=axes)
        method = fr.UntwistingRoPE(s_hf=high, s_lf=1.0, adain=0.0)
        modulations = method.modulations(where)
        # The value of key j is 1 in channel j: the output is the softmax itself.
        mass = torch.zeros(tokens, dtype=torch.float64)
        for some in torch.arange(2 * tokens).split(2 * pairs):
            v = torch.zeros(1, 2 * tokens, 1, 2 * pairs, dtype=torch.float64)
            v[0, some, 0, torch.arange(len(some))] = 1.0
            out = fr.attention(q, k, v, rope=rope, key_rope=keys, modulations=modulations, backend="sdpa", scale=1.0)
            here = (at >= some[0]) & (at <= some[-1])
            mass[here] = out[0, here.nonzero().flatten(), 0, at[here] - some[0]]
        s = torch.cat([gap.cos().sum(-1), (gap.cos() * method.weights(where)).sum(-1)], dim=1)
        torch.testing.assert_close(mass, s.softmax(dim=1)[torch.arange(tokens), at], rtol=1e-10, atol=0)
        found.append(mass)
    assert bool((torch.stack(found).diff(dim=0) < 0).all())


# ---- plans of a schedule ---------------------------------------------------------------------------------------------


def a_plan(weight: torch.Tensor, mask: bool) -> tuple[fr.Plan, tuple]:
    g = torch.Generator().manual_seed(0)
    rope = fr.RoPE.axial(LAYOUT.positions("flux"), (4, 6, 6))
    keys = fr.RoPE(torch.cat([rope.angles, rope.angles[LAYOUT.target], rope.angles[:8]]), rope.axis)
    q, k, v = (torch.randn(2, n, 2, 16, generator=g).double() for n in (39, 62, 62))
    key_mask = torch.rand(2, 62, generator=g) < 0.8 if mask else None
    others = [fr.BiasDelta(1.2, 0.7, keys=LAYOUT.text), fr.QueryScale(torch.full((39,), 0.5), keys=LAYOUT.shared)]
    mods = [fr.BandWeight(weight, keys=LAYOUT.shared), *others]
    return fr.plan(rope=rope, key_rope=keys, modulations=mods, key_mask=key_mask), (q, k, v)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_plan_takes_other_weights(mask, backend):
    first, second = torch.linspace(0.2, 1.5, 8), torch.linspace(1.8, 0.1, 8).double()
    plan, tensors = a_plan(first, mask)
    wanted, _ = a_plan(second, mask)
    before = fr.attention(*tensors, plan=plan, backend=backend)
    found = plan.with_weight(second)
    expected = fr.attention(*tensors, plan=wanted, backend=backend)
    assert torch.equal(fr.attention(*tensors, plan=found, backend=backend), expected)
    assert torch.equal(fr.attention(*tensors, plan=plan, backend=backend), before)
    assert not torch.equal(before, expected)
    assert sum(x is y for x, y in zip(found.tensors, plan.tensors, strict=True)) == len(plan.tensors) - 2
    second.zero_()  # the plan holds its own
    assert torch.equal(fr.attention(*tensors, plan=found, backend=backend), expected)


def test_plans_refuse_weights_they_have_no_place_for():
    plan, _ = a_plan(torch.linspace(0.2, 1.5, 8), False)
    with pytest.raises(ValueError, match=r"^weight: expected \(8,\), received \(7,\)"):
        plan.with_weight(torch.ones(7))
    with pytest.raises(ValueError, match=r"^weight: expected finite values"):
        plan.with_weight(torch.full((8,), torch.nan))
    neutral, _ = a_plan(torch.ones(8), False)
    with pytest.raises(ValueError, match=r"^plan: expected exactly one BandWeight that is not neutral, received 0"):
        neutral.with_weight(torch.ones(8))
