"""LooseRoPE: the published tables, its steps, and the op against the formulas written out in full."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.oracle import attend, dilated

import fastrope as fr

CENTRES = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)  # of five levels, with boost 1
RANGE = {0: [0.6503, 0.6603, 0.8250, 0.9897, 0.9997], 1: [0.9104, 0.9244, 1, 1, 1], 2: [1, 1, 1, 1, 1]}
CROP = {
    0: [0.6500, 0.6510, 0.9975, 1.3440, 1.3450],
    1: [0.755, 0.7557, 0.9983, 1.2408, 1.2415],
    2: [0.8285, 0.829, 0.9988, 1.1685, 1.169],
}
AXES = (4, 6, 6)


def flat(value: float = 1.0, grid: tuple[int, int] = (4, 4)) -> torch.Tensor:
    return torch.full(grid, value, dtype=torch.float64)


def plain(**kwargs) -> fr.LooseRoPE:
    return fr.LooseRoPE(**{"saliency": flat(), "mask": flat(), **kwargs})


def layout(target: tuple[int, int] = (4, 4), *references: tuple[int, int]) -> fr.TokenLayout:
    return fr.TokenLayout(2, target, references or [target])


# ---- tables and steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_tables_to_four_digits(phase):
    r, g = plain(boost=1.0).factors(CENTRES, phase)
    assert r.tolist() == pytest.approx(RANGE[phase], abs=5.1e-5)
    assert g.tolist() == pytest.approx(CROP[phase], abs=5.1e-5)


def test_the_last_digit_of_the_table():
    """1.1685 and not 1.1686, which comes of rounding level 3's 1.34396 to 1.3440 first."""
    factor = 0.65 + 0.695 * (math.tanh(6.5 * 0.5) / 2 + 0.5)
    assert f"{factor:.4f} {1 - (1 - factor) * 0.7**2:.4f} {1 - (1 - 1.3440) * 0.7**2:.4f}" == "1.3440 1.1685 1.1686"
    _, g = plain(boost=1.0).factors(CENTRES[3], 2)
    assert float(g) == pytest.approx(1 - (1 - factor) * 0.7**2, abs=1e-12)


def test_boost_moves_saliency_between_levels():
    r, _ = plain().factors(torch.tensor([0.0, 0.24, 0.25, 0.96, 0.97, 1.0]))
    assert r.tolist() == pytest.approx([0.6503, 0.6503, 0.6603, 0.9897, 0.9997, 0.9997], abs=5.1e-5)


def test_levels_are_closed_below_and_the_last_above():
    r, _ = plain(boost=1.0).factors(torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64))
    assert r.tolist() == pytest.approx([*RANGE[0][1:], RANGE[0][4]], abs=5.1e-5)


@pytest.mark.parametrize(("num_steps", "counts"), [(28, (11, 8, 4, 5)), (8, (3, 2, 2, 1)), (50, (20, 14, 7, 9))])
def test_phases_and_active_steps(num_steps, counts):
    method, tokens = plain(saliency=flat(0.0)), layout()
    seen = []
    for step in range(num_steps):
        found = method.modulations(fr.Site(tokens, step=step, num_steps=num_steps))
        seen.append(method.phase(step, num_steps) if found else None)
    assert seen == [p for p, n in zip((0, 1, 2, None), counts, strict=True) for _ in range(n)]


def seen_phases(method: fr.LooseRoPE, num_steps: int) -> list[int | None]:
    sites = [fr.Site(layout(), step=step, num_steps=num_steps) for step in range(num_steps)]
    return [method.phase(site.step, num_steps) if method.modulations(site) else None for site in sites]


@pytest.mark.parametrize("num_steps", [8, 15, 20, 28, 50])
def test_absolute_timing_counts_steps_as_the_published_code(num_steps):
    """After steps 10 and 18, and no longer after step 22, in a run of any length: Qwen-Image-Edit's 50 steps, too."""
    published = [0 if step <= 10 else 1 if step <= 18 else 2 if step <= 22 else None for step in range(50)]
    assert seen_phases(plain(saliency=flat(0.0), timing="absolute"), num_steps) == published[:num_steps]
    scaled = seen_phases(plain(saliency=flat(0.0)), num_steps)
    assert scaled == seen_phases(plain(saliency=flat(0.0), timing="scaled"), num_steps)
    assert (scaled == published[:num_steps]) == (num_steps == 28)


def test_absolute_timing_of_other_fractions_and_of_indices():
    half = seen_phases(plain(saliency=flat(0.0), timing="absolute", steps=(0.0, 0.5), cutoffs=(0.25,)), 50)
    assert half == [0] * 7 + [1] * 7 + [None] * 36
    indices = seen_phases(plain(saliency=flat(0.0), timing="absolute", steps=range(40, 50)), 50)
    assert indices == [None] * 40 + [2] * 10


@given(st.integers(1, 100))
def test_a_run_of_any_length_starts_in_phase_0_and_is_active(num_steps):
    method = plain(saliency=flat(0.0))
    phases = [method.phase(step, num_steps) for step in range(num_steps)]
    assert phases[0] == 0
    assert phases == sorted(phases)
    assert method.modulations(fr.Site(layout(), num_steps=num_steps))


def test_positions_are_whole_again_in_the_last_phase():
    method, tokens = plain(saliency=flat(0.0)), layout()
    kinds = [[type(m) for m in method.modulations(fr.Site(tokens, step=s))] for s in (10, 18, 19, 22, 23)]
    assert kinds == [[fr.QueryScale, fr.LogitGain]] * 2 + [[fr.LogitGain]] * 2 + [[]]


def test_layers():
    method = plain(layers=range(2, 5), saliency=flat(0.0))
    assert [n for n in range(8) if method.modulations(fr.Site(layout(), layer=n))] == [2, 3, 4]


@given(st.floats(0, 3), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_continuous_is_the_papers_formula(boost, values):
    r, g = plain(levels=None, boost=boost).factors(torch.tensor(values, dtype=torch.float64))
    sal = [min(max(boost * s, 0.0), 1.0) for s in values]
    assert r.tolist() == pytest.approx(sal)
    assert g.tolist() == pytest.approx([0.65 + 0.695 * (math.tanh(6.5 * (2 * s - 1)) + 1) / 2 for s in sal])


# ---- what reaches the op --------------------------------------------------------------------------------------------


def test_a_level_with_one_token_is_not_skipped():
    saliency = flat(1.0)
    saliency[1, 2] = 0.0  # alone in level 0
    scale, gain = plain(saliency=saliency).modulations(fr.Site(layout()))
    first = layout().target.start
    assert float(scale.scale[first + 6]) == pytest.approx(0.6503, abs=5.1e-5)
    assert float(gain.gain[first + 6]) == pytest.approx(0.65, abs=5.1e-5)
    assert int((scale.scale < 0.9).sum()) == 1


def test_neutral_settings_are_no_modulations():
    assert plain(levels=None, boost=1.0, crop_curve=None).modulations(fr.Site(layout())) == []
    assert plain(range_curve=(1, 1, 0), crop_curve=(1, 1, 0)).modulations(fr.Site(layout())) == []


def expected_factors(method, saliency, mask, phase):
    """``r`` and ``g`` ``(h, w)``: level by level, as METHODS has it."""
    h, w = saliency.shape
    inside, r, g = dilated(mask, 2), flat(1.0, (h, w)), flat(1.0, (h, w))
    for y in range(h):
        for x in range(w):
            if not inside[y, x]:
                continue
            sal = min(max(method.boost * float(saliency[y, x]), 0.0), 1.0)
            level = next(i for i in range(5) if sal < (i + 1) / 5 or i == 4)
            at = -1 + 2 * level / 4
            ranged = 0.65 + 0.35 * (0.5 * math.tanh(3.5 * at) + 0.5)
            cropped = 0.65 + 0.695 * (0.5 * math.tanh(6.5 * at) + 0.5)
            r[y, x] = min(max(1.4**phase * ranged, 0.0), 1.0)
            g[y, x] = 1 - (1 - cropped) * 0.7**phase
    return inside, r, g


@pytest.mark.parametrize(("step", "phase"), [(0, 0), (12, 1), (20, 2)])
def test_through_the_op(step, phase):
    """Batch 2 with maps of their own, an odd grid, two references, the second of which holds the paste."""
    target, other, grid = (5, 3), (2, 2), (5, 3)
    tokens = fr.TokenLayout(3, target, [other, grid])
    g = torch.Generator().manual_seed(step)
    saliency = torch.rand(2, *target, generator=g, dtype=torch.float64)
    mask = torch.zeros(2, *target)
    mask[0, 0, 1] = mask[1, 4, 2] = mask[1, 4, 1] = 1
    method = fr.LooseRoPE(saliency, mask, reference=1)
    site = fr.Site(tokens, step=step, axes_dim=AXES)
    q, k, v = torch.randn(3, 2, len(tokens), 2, sum(AXES), generator=g, dtype=torch.float64)
    positions = tokens.positions("flux")
    rope = fr.RoPE.axial(positions, axes_dim=AXES)
    out = fr.attention(q, k, v, rope=rope, modulations=method.modulations(site), backend="sdpa")

    start, reference = 3, 3 + 15 + 4  # spans counted by hand
    r, gain = torch.ones(2, len(tokens), dtype=torch.float64), torch.ones(2, len(tokens), len(tokens)).double()
    for row in range(2):
        inside, scale, factor = expected_factors(method, saliency[row], mask[row] > 0, phase)
        r[row, start : start + 15] = scale.flatten()
        for i in range(15):
            for j in range(15):
                if inside.flatten()[j]:
                    gain[row, start + i, reference + j] = factor.flatten()[i]
    keys = list(range(reference, reference + 15))
    expected = attend(q, k, v, positions, AXES, r=r, scaled=(keys, (1, 2)), gain=gain)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_both_sides_turn_where_positions_are_centred():
    """Qwen's centred coordinates: only ``r (p_i - p_j)`` counts, so the same as from a corner."""
    tokens = fr.TokenLayout(3, (4, 4), [(4, 4)])
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, len(tokens), 2, sum(AXES), generator=g, dtype=torch.float64)
    method = plain(saliency=flat(0.0))
    centred = tokens.positions("qwen")
    shifted = centred + torch.tensor([0, 2, 2])
    found = [
        fr.attention(q, k, v, rope=fr.RoPE.axial(p, axes_dim=AXES), modulations=method.modulations(
            fr.Site(tokens, axes_dim=AXES)), backend="sdpa")
        for p in (centred, shifted)
    ]  # fmt: skip
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_target_and_reference_may_have_different_grids():
    mask = flat(0.0, (6, 4))
    mask[4:, 2:] = 1
    tokens = fr.TokenLayout(2, (6, 4), [(3, 2)])
    scale, gain = fr.LooseRoPE(flat(0.0, (6, 4)), mask, dilation=0).modulations(fr.Site(tokens))
    inside = (scale.scale < 1).nonzero().flatten().tolist()
    assert inside == [2 + 4 * y + x for y in (4, 5) for x in (2, 3)]
    assert gain.keys.nonzero().flatten().tolist() == [2 + 24 + 5]  # one key: the last of 3 x 2
    assert scale.keys == slice(26, 32)


def test_maps_follow_the_grid_of_the_call():
    method = plain(saliency=flat(0.0, (8, 8)), mask=flat(1.0, (8, 8)))
    for grid in ((4, 4), (3, 7), (16, 8)):
        scale, gain = method.modulations(fr.Site(layout(grid)))
        assert int((scale.scale < 1).sum()) == grid[0] * grid[1] == int(gain.keys.sum())


def test_axes_are_those_of_the_site():
    site = fr.Site(layout(), axes_dim=(32, 32, 32, 32), spatial_axes=(1, 3))
    assert plain(saliency=flat(0.0)).modulations(site)[0].axes == (1, 3)


def test_rows_that_share_a_mask_share_a_modulation():
    method = plain(saliency=torch.rand(3, 4, 4))
    kinds = [type(m) for m in method.modulations(fr.Site(layout()))]
    assert kinds == [fr.QueryScale, fr.LogitGain]
    masks = torch.zeros(3, 4, 4)
    masks[0, 0, 0] = masks[1, 0, 0] = masks[2, 3, 3] = 1
    found = replace(method, mask=masks).modulations(fr.Site(layout()))
    assert [type(m) for m in found] == [fr.QueryScale, fr.LogitGain, fr.LogitGain]


def test_same_objects_within_a_phase():
    method, tokens = plain(saliency=flat(0.0)), layout()
    first = method.modulations(fr.Site(tokens, layer=0, step=0))
    again = method.modulations(fr.Site(layout(), layer=5, step=10))
    later = method.modulations(fr.Site(tokens, step=11))
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert later[0] is not first[0]


def test_lists_of_modulations_are_the_callers_own():
    method = plain(saliency=flat(0.0))
    method.modulations(fr.Site(layout())).clear()
    assert len(method.modulations(fr.Site(layout()))) == 2


def test_replace_forgets_what_was_known():
    method = plain(saliency=flat(0.5))
    before = method.modulations(fr.Site(layout()))[0].scale
    after = replace(method, boost=0.1).modulations(fr.Site(layout()))[0].scale
    assert float(after.min()) < float(before.min())


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kwargs", "name"), [
    (dict(saliency=flat(1.5)), "LooseRoPE.saliency"), (dict(saliency=[[1.0]]), "LooseRoPE.saliency"),
    (dict(saliency=torch.ones(4)), "LooseRoPE.saliency"), (dict(saliency=flat(float("nan"))), "LooseRoPE.saliency"),
    (dict(mask=flat(0.0)), "LooseRoPE.mask"), (dict(mask=torch.ones(1, 1, 4, 4)), "LooseRoPE.mask"),
    (dict(saliency=torch.ones(2, 4, 4), mask=torch.ones(3, 4, 4)), "LooseRoPE.mask"),
    (dict(boost=-0.1), "LooseRoPE.boost"), (dict(boost="a"), "LooseRoPE.boost"), (dict(levels=1), "LooseRoPE.levels"),
    (dict(levels=2.5), "LooseRoPE.levels"), (dict(levels="few"), "LooseRoPE.levels"),
    (dict(range_curve=(1, 2)), "LooseRoPE.range_curve"), (dict(range_curve=None), "LooseRoPE.range_curve"),
    (dict(crop_curve=(0, 1, "k")), "LooseRoPE.crop_curve.slope"), (dict(crop_decay=-1), "LooseRoPE.crop_decay"),
    (dict(range_growth=None), "LooseRoPE.range_growth"), (dict(cutoffs=(0.6, 0.3)), "LooseRoPE.cutoffs"),
    (dict(cutoffs=(10, 18)), "LooseRoPE.cutoffs"), (dict(reference=-1), "LooseRoPE.reference"),
    (dict(timing="fixed"), "LooseRoPE.timing"), (dict(timing=None), "LooseRoPE.timing"),
    (dict(mask_rule="half"), "LooseRoPE.mask_rule"), (dict(dilation=1.0), "LooseRoPE.dilation"),
    (dict(steps=(0.5, 0.1)), "steps"), (dict(layers="all"), "layers"),
])  # fmt: skip
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, received "):
        plain(**kwargs)


@pytest.mark.filterwarnings("error")
def test_arrays_are_as_good_as_tensors():
    """Those of pictures, too, which numpy may not write to."""
    mask = np.ones((4, 4), dtype=bool)
    mask.flags.writeable = False
    assert fr.LooseRoPE(np.ones((4, 4), dtype=np.float32), mask).mask.all()


def test_maps_are_the_methods_own():
    saliency = flat(0.5)
    method = plain(saliency=saliency)
    before = method.modulations(fr.Site(layout()))[0].scale
    saliency.zero_()
    assert torch.equal(method.modulations(fr.Site(layout(), num_steps=27))[0].scale, before)
    assert float(method.saliency.min()) == 0.5


def test_neutral_dials_modulate_nothing_on_any_sequence():
    neutral = plain(range_curve=(1, 1, 0), crop_curve=None)
    for step in (0, 12, 20):
        assert neutral.modulations(fr.Site(fr.TokenLayout(2, (4, 4)), step=step)) == []


def test_a_reference_that_is_not_there():
    with pytest.raises(ValueError, match=r"LooseRoPE.reference: expected a reference in \[0, 1\), received 1"):
        plain(reference=1).modulations(fr.Site(layout()))
    with pytest.raises(ValueError, match=r"LooseRoPE: expected a sequence with at least one reference picture"):
        plain().modulations(fr.Site(fr.TokenLayout(2, (4, 4))))
