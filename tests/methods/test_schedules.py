from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastrope as fr
from fastrope.methods import Linear, PerLayer, PerStep
from fastrope.methods.schedules import Activity, first_step_at, value_at

TOKENS = fr.TokenLayout(2, (2, 2), [(2, 2)])


def site(step: int = 0, layer: int = 0, num_steps: int = 5) -> fr.Site:
    return fr.Site(TOKENS, layer=layer, step=step, num_steps=num_steps)


def test_linear_reaches_both_ends():
    values = [value_at("x", Linear(0.25, 0.75), site(step)) for step in range(5)]
    assert values == [0.25, 0.375, 0.5, 0.625, 0.75]
    assert Linear(0.25, 0.75)(site(num_steps=1)) == 0.25


def test_sequences_name_every_step_or_layer():
    assert [PerStep([1, 2, 3, 4, 5])(site(step)) for step in range(5)] == [1, 2, 3, 4, 5]
    assert [PerLayer([1, 2])(site(layer=layer)) for layer in range(2)] == [1, 2]
    with pytest.raises(ValueError, match=r"PerStep.values: expected 5 values, one per step of the run, received 2"):
        PerStep([1, 2])(site())
    with pytest.raises(ValueError, match=r"PerLayer.values: expected a value for layer 2, received 2 values"):
        PerLayer([1, 2])(site(layer=2))


def test_functions_of_the_site():
    assert value_at("x", lambda s: s.layer + s.step / 10, site(step=3, layer=2)) == 2.3
    with pytest.raises(ValueError, match=r"x: expected a finite number from the schedule at layer 2, step 3"):
        value_at("x", lambda s: None, site(step=3, layer=2))


@pytest.mark.parametrize(("fraction", "steps"), [(11 / 28, {28: 11, 8: 3, 50: 20}), (23 / 28, {28: 23, 8: 7, 50: 41})])
def test_fractions_scale(fraction, steps):
    for num_steps, before in steps.items():
        assert first_step_at(fraction, num_steps) == before


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
def test_fractions_cut_a_run_in_order_and_in_proportion(num_steps, a, b):
    a, b = sorted((a, b))
    before, later = first_step_at(a, num_steps), first_step_at(b, num_steps)
    assert 0 <= before <= later <= num_steps
    assert abs(before - a * num_steps) <= 0.5 + 1e-6
    assert (first_step_at(0.0, num_steps), first_step_at(1.0, num_steps)) == (0, num_steps)


@given(st.integers(1, 60), st.floats(0.01, 0.99))
def test_neighbouring_ranges_share_no_step(num_steps, cut):
    for step in range(num_steps):
        at = site(step, num_steps=num_steps)
        assert sum(at in Activity(steps=part) for part in ((0.0, cut), (cut, 1.0))) == 1


def test_ranges():
    """As in ``fastrope.At``: sets, ranges, slices, from the end."""
    activity = Activity([1, 3], range(2, 4))
    active = {(s, n) for s in range(5) for n in range(5) if site(s, n) in activity}
    assert active == {(2, 1), (2, 3), (3, 1), (3, 3)}
    assert site() in Activity()
    assert [n for n in range(57) if site(layer=n) in Activity(layers=slice(54, None))] == [54, 55, 56]
    assert [s for s in range(5) if site(s) in Activity(steps=-1)] == [4]
    assert [s for s in range(5) if site(s) in Activity(layers=range(2), steps=(0.0, 0.5))] == [0, 1]
    assert site(layer=2) not in Activity(layers=range(2), steps=(0.0, 0.5))


BAD_RANGES = {
    "layers": ["all", [1.5], [True], (0.0, 0.5)],
    "steps": ["half", (0.5, 0.2), (0.0, 1.5), [0.5, 0.75], 0.5],
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in BAD_RANGES.items() for v in values])
def test_bad_ranges_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, received "):
        Activity(**{name: value})


@pytest.mark.parametrize("make", [
    lambda: Linear("0", 1), lambda: Linear(0, float("nan")), lambda: PerStep([]), lambda: PerStep([1, None]),
    lambda: PerStep("12"), lambda: PerLayer(3), lambda: PerLayer([True]),
])  # fmt: skip
def test_bad_schedules_are_named(make):
    with pytest.raises(ValueError, match=r"^(Linear.start|Linear.end|Per(Step|Layer).values(\[\d\])?): expected "):
        make()
