"""What ``auto`` takes on a GPU, and that it says why; no GPU is needed to choose."""

from __future__ import annotations

import types

import pytest
import torch

import fastrope as fr
from fastrope import api, rules

ROPE = fr.RoPE.axial(torch.arange(12)[:, None], (16,))
LEVELS = fr.QueryScale(torch.where(torch.arange(12) < 6, 0.5, 1.0))
# More distinct values than there are levels.
CONTINUOUS = fr.QueryScale(torch.linspace(0.3, 0.9, 12))
GRAG = fr.BiasDelta(1.0, 1.1, keys=slice(6, 12))


@pytest.fixture
def on_gpu(monkeypatch):
    """``choose`` as for tensors on a GPU with kernels."""
    monkeypatch.setattr(api, "differentiated", lambda x: False)
    monkeypatch.setattr(api.triton, "unsupported", lambda q: None)

    def choose(plan, dtype=torch.bfloat16, backend="auto"):
        x = types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        return api.choose(x, x, x, plan, backend)

    return choose


@pytest.mark.parametrize(
    ("arguments", "dtype", "expected"),
    [
        ({}, torch.bfloat16, "sdpa"),
        ({"rope": ROPE.as_applied()}, torch.float16, "sdpa"),
        ({"rope": ROPE}, torch.bfloat16, "triton"),
        ({"rope": ROPE.as_applied(), "modulations": [GRAG]}, torch.bfloat16, "triton"),
        ({"rope": ROPE, "modulations": [LEVELS, GRAG]}, torch.float16, "triton"),
        ({"rope": ROPE, "modulations": [LEVELS, GRAG]}, torch.float32, "sdpa"),
        ({"rope": ROPE, "modulations": [CONTINUOUS]}, torch.float32, "triton"),
    ],
)
def test_rules(on_gpu, arguments, dtype, expected):
    plan = fr.plan(**arguments)
    found = on_gpu(plan, dtype)
    assert found.backend == expected
    assert found.warning is None
    rule = rules.rule_for(plan, dtype)
    assert found.reason == f"{rule.reason} ({rule.basis})"
    assert dict(found.rejected).keys() == {"sdpa", "triton", "eager"} - {expected}
    assert dict(found.rejected)["triton" if expected == "sdpa" else "sdpa"] == rule.against


def test_a_named_backend_runs_whatever_the_rules_say(on_gpu):
    assert on_gpu(fr.plan(), backend="triton").backend == "triton"


def test_the_last_rule_takes_what_is_left():
    assert rules.RULES[-1].applies(fr.plan(rope=ROPE), torch.bfloat16)
    for rule in rules.RULES:
        assert rule.backend in ("sdpa", "triton")
        assert rule.basis == "predicted" or rule.basis.startswith("measured")
