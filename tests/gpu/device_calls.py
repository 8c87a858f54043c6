"""Calls that tests on a device share: real shapes, every modulation, every route."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from numerics import DEVICE, Call, axial, biases_and_values, every_modulation, generator, grid, key_masks, tensors

import fastrope as fr
from fastrope.bench.cases import CASES
from fastrope.bench.problem import Problem
from fastrope.bench.workloads import WORKLOADS

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
KINDS = ("levels", "distinct")  # five scales, and a scale of its own for every query


def a_call(
    kind="levels", dtype=torch.bfloat16, dim=64, tokens=300, batch=2, mask="random", layout="contiguous", **options
) -> Call:
    """A call with every modulation at once, grouped heads and a mask."""
    g = generator(0)
    q, k, v = tensors(
        g, batch=batch, queries=tokens, heads=4, key_heads=2, dim=dim, dtype=dtype, layout=layout, **options
    )
    target = (tokens + 1) // 2
    positions = torch.cat([grid(target, min(7, tokens // 4)), grid(tokens - target, frame=1)])
    modulations = every_modulation(g, tokens, tokens, dim, kind)
    return Call(q, k, v, axial(positions, dim), None, modulations, key_masks(g, mask, batch, tokens), label=kind)


@lru_cache(maxsize=1)
def kontext(case: str, dtype: torch.dtype) -> Problem:
    return Problem.make(WORKLOADS["kontext"], CASES[case], torch.device(DEVICE), dtype)


def attend_checked(problem: Problem, name: str, backend: str) -> None:
    """Run a problem and hold a sample of its queries against the reference."""
    errors = problem.check(fr.attention(problem.q, problem.k, problem.v, plan=problem.plan, backend=backend))
    print(f"{name}: {errors}")
    assert errors.passed, str(errors)


def a_folding_call(modulated=True, **options) -> Call:
    """Two weights and a group that overlap, or rotation alone."""
    call = a_call(mask=None, **options)
    kept = [m for m in call.modulations if isinstance(m, (fr.BandWeight, fr.BiasDelta))]
    return Call(call.q, call.k, call.v, call.rope, None, kept if modulated else ())


def a_biased_call(**options) -> Call:
    """Biases of queries and keys, and values changed, beside the modulations of :func:`a_call`."""
    call = a_call(**options)
    tokens = call.q.shape[1]
    more = biases_and_values(generator(1), tokens, tokens, len(call.q))
    return replace(call, modulations=[*call.modulations, *more])


def a_splitting_call(kind="levels", **options) -> Call:
    """Every third query set apart: by one scale, or in tiles of a polynomial; beside weights, a group and a gain."""
    call = a_folding_call(**options)
    tokens = call.q.shape[1]
    apart = torch.arange(tokens, device=DEVICE) % 3 == 0
    values = torch.linspace(0.8, 0.81 if kind == "polynomial" else 0.8, tokens, device=DEVICE)
    scale = fr.QueryScale(torch.where(apart, values, 1.0), keys=slice(tokens // 3, None), axes=(1, 2))
    gain = fr.LogitGain(torch.where(apart, 1.3, 1.0), keys=slice(tokens // 2, None))
    return replace(call, modulations=[scale, gain, *call.modulations])


def planned(call: Call, backend="triton", **changes):
    """A function of q, k, v, and the plan it holds."""
    plan = call.planned()
    return lambda q, k, v: fr.attention(q, k, v, plan=plan, scale=call.scale, backend=backend, **changes)


ROUTES = {**{kind: (lambda kind=kind: a_call(kind), "triton") for kind in KINDS}, "folded": (a_folding_call, "sdpa")}
ROUTES |= {kind: (lambda kind=kind: a_splitting_call(kind), "auto") for kind in ("split", "polynomial")}
