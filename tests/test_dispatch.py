"""What ``auto`` takes on a GPU, and that it says why; no GPU is needed to choose."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from on_gpu import OnGpu, pretend

import fastrope as fr
from fastrope import card, dispatch, rules

ROPE = fr.RoPE.axial(torch.arange(12)[:, None], (16,))
BUCKETS = fr.QueryScale(torch.where(torch.arange(12) < 6, 0.5, 1.0))
# More distinct values than there may be buckets.
PER_QUERY = fr.QueryScale(torch.linspace(0.3, 0.9, 12))
GRAG = fr.BiasDelta(1.0, 1.1, keys=slice(6, 12))
BANDS = fr.BandWeight(torch.linspace(0.5, 1.2, 8), keys=slice(6, 12))
GAIN = fr.LogitGain(torch.linspace(0.5, 1.5, 12), keys=slice(6, 12))
MASK = torch.arange(12)[None] < 10
BIAS = fr.LogitBias(0.7, keys=slice(6, 12))
FEW_BIASED = fr.LogitBias(torch.where(torch.arange(12) < 4, -torch.inf, 0.0), keys=slice(6, 12))
BIASED_KEYS = fr.KeyBias(torch.linspace(-1, 1, 12))
HIDES = fr.KeyBias(torch.where(MASK[0], 0.0, -torch.inf))
VALUES = fr.ValueGain(-1.0, keys=slice(6, 12))
GROUP_OF_VALUES = fr.BiasDelta(1.0, 1.1, keys=slice(6, 12), on="values")


@pytest.fixture
def on_gpu(monkeypatch):
    """``decide`` as for tensors on a GPU with kernels."""
    pretend(monkeypatch)

    def decide(plan, dtype=torch.bfloat16, backend="auto", return_lse=False):
        x = OnGpu(torch.empty(1, 12, 2, 16, dtype=dtype))
        plan.lowered._known.clear()  # cards and rules change from test to test
        return dispatch.decide(plan.lowered, x, x, x, backend, return_lse)

    return decide


@pytest.mark.parametrize(
    ("arguments", "dtype", "return_lse", "expected"),
    [
        ({}, torch.bfloat16, False, "folded"),
        ({}, torch.bfloat16, True, "triton"),
        ({"rope": ROPE.as_applied()}, torch.float16, False, "folded"),
        ({"rope": ROPE}, torch.bfloat16, False, "folded"),
        ({"rope": ROPE}, torch.bfloat16, True, "triton"),
        ({"rope": ROPE}, torch.float32, False, "folded"),
        ({"rope": ROPE}, torch.float32, True, "sdpa"),
        ({"rope": ROPE.as_applied(), "modulations": [GRAG]}, torch.bfloat16, False, "folded"),
        ({"rope": ROPE, "modulations": [BANDS, GRAG]}, torch.float16, False, "folded"),
        ({"rope": ROPE, "modulations": [BANDS, GRAG]}, torch.float16, True, "triton"),
        ({"rope": ROPE, "modulations": [BANDS, GRAG], "key_mask": MASK}, torch.float16, False, "folded"),
        ({"rope": ROPE, "key_mask": MASK}, torch.bfloat16, False, "folded"),
        ({"rope": ROPE.as_applied(), "key_mask": MASK}, torch.bfloat16, False, "folded"),
        ({"rope": ROPE, "modulations": [BANDS, GAIN]}, torch.float16, False, "triton"),
        ({"rope": ROPE, "modulations": [BUCKETS, GRAG]}, torch.float16, False, "split"),
        ({"rope": ROPE, "modulations": [BUCKETS, GRAG]}, torch.float16, True, "triton"),
        ({"rope": ROPE, "modulations": [BUCKETS], "key_mask": MASK}, torch.bfloat16, False, "split"),
        ({"rope": ROPE, "modulations": [PER_QUERY]}, torch.bfloat16, False, "triton"),
        ({"rope": ROPE, "modulations": [BUCKETS, GRAG]}, torch.float32, False, "sdpa"),
        ({"rope": ROPE, "modulations": [PER_QUERY]}, torch.float32, False, "triton"),
        ({"modulations": [VALUES, GROUP_OF_VALUES], "num_keys": 12}, torch.bfloat16, False, "folded"),
        ({"rope": ROPE, "modulations": [GRAG, VALUES, HIDES]}, torch.float16, False, "folded"),
        ({"rope": ROPE, "modulations": [BUCKETS, VALUES]}, torch.bfloat16, False, "split"),
        ({"rope": ROPE, "modulations": [BIAS]}, torch.bfloat16, False, "triton"),
        ({"rope": ROPE, "modulations": [BIAS, BIASED_KEYS]}, torch.float32, False, "sdpa"),
        ({"modulations": [BIASED_KEYS], "num_keys": 12}, torch.float16, False, "triton"),
        ({"rope": ROPE, "modulations": [FEW_BIASED]}, torch.bfloat16, False, "split"),
        ({"rope": ROPE, "modulations": [FEW_BIASED, BIASED_KEYS]}, torch.bfloat16, False, "triton"),
    ],
)
def test_rules(on_gpu, arguments, dtype, return_lse, expected):
    """``folded``: sdpa, after a prologue of our kernels; ``split``: that for unmodulated queries, else triton."""
    plan = fr.plan(**arguments)
    found = on_gpu(plan, dtype, return_lse=return_lse)
    assert (found.folded, found.split) == (expected == "folded", expected == "split")
    expected = {"folded": "sdpa", "split": "triton"}.get(expected, expected)
    assert found.backend == expected
    assert found.warning is None
    rule = rules.rule_for(plan.lowered, dtype, return_lse, torch.device("cuda", 0))
    assert found.reason == f"{rule.reason} ({rule.basis})"
    assert dict(found.rejected).keys() == {"sdpa", "triton", "eager"} - {expected}
    assert dict(found.rejected)["triton" if expected == "sdpa" else "sdpa"] == rule.against


def test_a_named_backend_runs_whatever_the_rules_say(on_gpu):
    assert on_gpu(fr.plan(), backend="triton").backend == "triton"
    assert not on_gpu(fr.plan(rope=ROPE, modulations=[BUCKETS]), backend="triton").split
    for plan, return_lse in ((fr.plan(rope=ROPE), False), (fr.plan(rope=ROPE), True), (fr.plan(key_mask=MASK), False)):
        found = on_gpu(plan, backend="sdpa", return_lse=return_lse)
        assert (found.backend, found.folded) == ("sdpa", not return_lse)


def test_gradients_go_to_sdpa_as_it_is(on_gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "differentiated", lambda x: True)
    for backend in ("auto", "sdpa"):
        found = on_gpu(fr.plan(rope=ROPE), backend=backend)
        assert (found.backend, found.folded) == ("sdpa", False)


def test_a_decision_is_made_once_for_what_it_depends_on(monkeypatch):
    plan, made, choose = fr.plan(rope=ROPE), [], dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *call: made.append(call) or choose(*call))
    x = torch.zeros(1, 12, 2, 16)
    calls = [
        ((x, x, x), {}), ((x, x, x), {"backend": "sdpa"}), ((x, x, x), {"return_lse": True}),
        ((x.half(),) * 3, {}), ((torch.zeros(1, 2, 12, 16).transpose(1, 2), x, x), {}),
        ((x, x, torch.zeros(385)[1:].view(1, 12, 2, 16)), {}), ((x.clone().requires_grad_(), x, x), {}),
    ]  # fmt: skip
    for n, (inputs, options) in enumerate(calls, start=1):
        for _ in range(2):
            fr.attention(*inputs, plan=plan, **options)
        assert len(made) == n
    for n, switch in enumerate(("FASTROPE_TMA", "FASTROPE_POLYNOMIAL", "FASTROPE_KERNELS"), start=len(calls) + 1):
        monkeypatch.setenv(switch, "0")
        fr.attention(x, x, x, plan=plan)
        assert len(made) == n
    with pytest.raises(ValueError, match="v: expected"):
        fr.attention(x, x, x[:, :5], plan=plan)


def test_a_decision_knows_a_plain_attention_by_its_name(monkeypatch):
    """Made once, it hands work to the function of each call, and keeps none of them alive."""
    plan, made, choose = fr.plan(rope=ROPE), [], dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *call: made.append(call) or choose(*call))
    x, held = torch.zeros(1, 12, 2, 16), []
    for value in (1.0, 2.0):

        def plain(query, key, value, number=value, **_):
            return torch.full_like(query, number)

        held.append(weakref.ref(plain))
        assert torch.equal(fr.attention(x, x, x, plan=plan, plain=plain), torch.full_like(x, value))
    assert len(made) == 1
    del plain, made[:]
    gc.collect()
    assert [function() for function in held] == [None, None]


def test_every_family_has_one_rule_and_the_last_takes_what_is_left():
    assert [family.name for family in rules.FAMILIES] == [rule.family for rule in rules.RULES]
    assert rules.FAMILIES[-1].applies(fr.plan(rope=ROPE).lowered, torch.bfloat16, False)
    for family, rule in zip(rules.FAMILIES, rules.RULES, strict=True):
        assert rule.route in family.routes
        assert set(family.routes) <= set(rules.ROUTES)
        assert rule.basis == "predicted" or rule.basis.startswith("measured")


# ---- rules measured on the card --------------------------------------------------------------------------------------


@pytest.fixture
def measured(on_gpu, tmp_path, monkeypatch):
    """Store rules as measured on a card of a name; versions are ours."""
    monkeypatch.setattr(card, "folder", lambda: tmp_path)
    monkeypatch.setattr(card, "name_of", lambda device: "NVIDIA GeForce RTX 4090 (sm_89)")
    monkeypatch.setattr(card, "_WARNED", set())
    for cached in (card.key, rules.local):
        cached.cache_clear()
    yield lambda *found: rules.store(list(found), torch.device("cuda", 0))
    for cached in (card.key, rules.local):
        cached.cache_clear()


HERE = rules.Rule("unmodulated", "loop", "the fastest: loop 1.50 ms, split 1.63 ms", "slower here", rules.HERE)
LEVELS = fr.plan(rope=ROPE, modulations=[BUCKETS])


def test_what_was_measured_here_wins(on_gpu, measured):
    measured(HERE)
    found = on_gpu(LEVELS)
    assert (found.backend, found.split) == ("triton", False)
    assert found.reason == "the fastest: loop 1.50 ms, split 1.63 ms (measured here)"
    assert on_gpu(fr.plan(rope=ROPE)).folded  # a family that was not measured keeps its rule
    assert on_gpu(fr.plan(rope=ROPE, modulations=[PER_QUERY]), torch.float16).backend == "triton"


def test_another_measurement_replaces_the_first_and_leaves_other_cards(on_gpu, measured, monkeypatch):
    measured(HERE)
    monkeypatch.setattr(card, "name_of", lambda device: "NVIDIA L40S (sm_89)")
    card.key.cache_clear()
    measured()
    assert on_gpu(LEVELS).split
    monkeypatch.setattr(card, "name_of", lambda device: "NVIDIA GeForce RTX 4090 (sm_89)")
    card.key.cache_clear()
    rules.local.cache_clear()
    assert not on_gpu(LEVELS).split
    assert len(json.loads(card.path(rules.FILE).read_text())["cards"]) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"loop"', '"sdpa"'),  # which has not the result of these calls' family
        lambda text: text.replace('"unmodulated"', '"nobody"'),
        lambda text: text.replace('"against"', '"because"'),
        lambda text: text.replace("torch ", "torch 1."),  # as an update of torch leaves it
    ],
)
def test_a_damaged_or_old_file_is_ignored_with_one_warning_that_names_it(on_gpu, measured, damage):
    measured(HERE)
    file = card.path(rules.FILE)
    file.write_text(damage(file.read_text()))
    with pytest.warns(UserWarning, match="rules.json") as warned:
        assert on_gpu(LEVELS).split
    rules.local.cache_clear()
    assert on_gpu(LEVELS).split
    assert len(warned) == 1
