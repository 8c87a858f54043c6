"""What ISLock may be told, and its windows."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch

import fastrope as fr
from fastrope import ISLock


def test_windows_of_the_paper():
    """150 candidates shrink to 60 over 1024 tokens at alpha 0.6."""
    lock = ISLock(candidates=150, alpha=0.6)
    windows = [lock.window(i, 1024) for i in range(1024)]
    assert windows[0] == 150
    assert windows[-1] == 60
    assert windows == sorted(windows, reverse=True)
    assert windows[512] == 105  # 150 (1 - 0.3), a whole number
    table = lock.matcher(torch.zeros(4, 2), num_tokens=1024).windows
    assert table.tolist() == windows


def test_windows_reach_whole_numbers():
    """``floor`` of a product that is whole, where floating point falls short of it."""
    short = [
        (k, a, i, n)
        for k in (50, 100, 150) for a in (0.1, 0.3, 0.6, 0.7, 0.9) for n in (10, 100) for i in range(n)
        if int(k * (1 - a * i / n)) != k * (1 - Fraction(str(a)) * i / n) // 1
    ]  # fmt: skip
    assert short, "no case where it matters"
    for k, a, i, n in short:
        assert ISLock(candidates=k, alpha=a).window(i, n) == int(k * (1 - a * i / n)) + 1


def test_a_window_holds_at_least_one():
    assert ISLock(candidates=3, alpha=1.0).window(99, 100) == 1
    assert ISLock(candidates=1).window(7, 8) == 1


def test_defaults_are_those_for_llamagen():
    assert ISLock() == ISLock(candidates=150, alpha=0.6, tau=1.0, metric="l2")
    with pytest.raises(dataclasses.FrozenInstanceError):
        ISLock().tau = 2.0


@pytest.mark.parametrize(
    "fields",
    [{"candidates": 0}, {"candidates": 2**31}, {"candidates": 1.5}, {"candidates": True}, {"alpha": -0.1},
     {"alpha": 1.1}, {"alpha": "0.6"}, {"tau": -1}, {"tau": float("nan")}, {"tau": None}, {"metric": "L2"},
     {"metric": None}],
    ids=str,
)  # fmt: skip
def test_fields_out_of_range(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"ISLock.{name}: expected .*, received"):
        fr.ISLock(**fields)


@pytest.mark.parametrize(("i", "n"), [(-1, 4), (4, 4), (0, 0), (0.5, 4), (True, 4)])
def test_positions_out_of_range(i, n):
    with pytest.raises(ValueError, match="expected .*, received"):
        ISLock().window(i, n)
