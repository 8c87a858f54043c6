"""Calls that fold into the keys, and a way to run them so on any device."""

from __future__ import annotations

import pytest
import torch
from numerics import (
    Call,
    axial,
    disjoint_sets,
    generator,
    grid,
    key_set,
    tensors,
    uniform,
)  # fmt: skip

import fastrope as fr
from fastrope.backends import folded

DTYPES = (torch.float32, torch.float16)


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(call: Call, plan: fr.Plan | None = None) -> torch.Tensor:
    plan = call.planned() if plan is None else plan
    assert folded.folds(plan.lowered)
    scale = call.q.shape[3] ** -0.5 if call.scale is None else call.scale
    prepares = folded.prepares(call.q, call.k, call.v, plan.lowered)
    return folded.run(call.q, call.k, call.v, plan.lowered, scale, prepares)


def weight(g, dim: int = 16, keys=slice(None)) -> fr.BandWeight:
    return fr.BandWeight(uniform(g, dim // 2, low=0.25, high=1.5), keys=keys)


def a_call(dtype=torch.float32, tokens: int = 37, batch: int = 2, dim: int = 16, modulations=None, **options) -> Call:
    """A call of ``modulations(generator)``, rotated."""
    g = generator(1)
    q, k, v = tensors(g, batch=batch, queries=tokens, dim=dim, dtype=dtype, **options)
    return Call(q, k, v, axial(grid(tokens, min(4, tokens)), dim), modulations=modulations(g) if modulations else ())


def both(g) -> list:
    """Weights inside, outside and across a group, some of them over the same keys."""
    return [weight(g, keys=slice(3, 30)), fr.BiasDelta(1.3, 0.6, slice(10, 25)), weight(g, keys=slice(20, None))]


MODULATIONS = {
    "a weight": lambda g: [weight(g, keys=slice(9, 30))],
    "weights of all keys": lambda g: [weight(g), weight(g)],
    "weights over the same keys": lambda g: [weight(g, keys=slice(20)), weight(g, keys=slice(10, 30))],
    "a group": lambda g: [fr.BiasDelta(1.3, 0.6, slice(10, None))],
    "a group of each row": lambda g: [fr.BiasDelta(0.5 + uniform(g, 2), 0.5 + uniform(g, 2), slice(5, 20))],
    "delta 0": lambda g: [fr.BiasDelta(0.7, torch.tensor([0.0, 1.2]), slice(5, 20))],
    "lambda 0": lambda g: [fr.BiasDelta(torch.tensor([0.0, 1.2]), 0.7, slice(5, 20))],
    "lambda and delta 0": lambda g: [fr.BiasDelta(0.0, 0.0, slice(5, 20))],
    "two groups": lambda g: [fr.BiasDelta(1.2, 0.8, slice(3, 12)), fr.BiasDelta(0.6, 1.4, slice(20, 33))],
    "a group in parts": lambda g: [fr.BiasDelta(1.3, 0.6, torch.tensor([1, 2, 3, 17, 18, 30]))],
    "scattered": lambda g: [weight(g, keys=key_set(g, "mask", 37)), *(
        fr.BiasDelta(1.2, 0.6, keys) for keys in disjoint_sets(g, 2, 37))],
    "value gains": lambda g: [fr.ValueGain(-0.5, slice(3, 20)), fr.ValueGain(uniform(g, 2, 9), slice(15, 24)),
                              fr.BiasDelta(1.3, 0.6 + uniform(g, 2), slice(9, 30), on="values")],
    "a group of values": lambda g: [fr.BiasDelta(1.3, 0.6, slice(10, None), on="values")],
    "values and scattered": lambda g: [
        *(weight(g, keys=key_set(g, "mask", 37)) for _ in range(2)), fr.ValueGain(2.0, key_set(g, "mask", 37)),
        *(fr.BiasDelta(1.2, 0.6, keys, on="values") for keys in disjoint_sets(g, 2, 37))],
    "together": both,
}  # fmt: skip


SORTED = ("scattered", "values and scattered")


GROUPED = ("a group", "scattered", "together", "a group of values")
