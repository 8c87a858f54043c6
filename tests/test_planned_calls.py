"""What a planned call may not do on its way: read on the host, or hold logits."""

from __future__ import annotations

import pytest
import torch
from numerics import (
    DEVICE,
    Call,
    axial,
    biases_and_values,
    check,
    draw,
    every_modulation,
    generator,
    grid,
    key_masks,
    many_signatures,
    scales,
    skip_unless_runnable,
    tensors,
    uniform,
)
from watch import Live, Watch

import fastrope as fr
from fastrope import device as devices
from fastrope.backends import log_sum_exp, sdpa


@pytest.mark.parametrize("kind", ["levels", "distinct", "mixed"])
@pytest.mark.parametrize("mask", [None, "row"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_planned_call_reads_nothing_on_the_host(kind, mask, batched):
    g = generator(4)
    q, k, v = tensors(g, batch=2, queries=200, heads=2, dim=16)
    modulations = every_modulation(g, 200, 200, 16, kind, batch=2 if batched else None)
    plan = fr.plan(rope=axial(grid(200), 16), modulations=modulations, key_mask=key_masks(g, mask, 2, 200))
    with Watch() as watch:
        fr.attention(q, k, v, plan=plan, backend="sdpa", return_lse=True)
    assert watch.read == []


@pytest.mark.parametrize("mask", [None, "row"])
def test_biases_and_values_read_nothing_on_the_host(mask):
    g = generator(4)
    q, k, v = tensors(g, batch=2, queries=200, heads=2, dim=16)
    modulations = biases_and_values(g, 200, 200, batch=2)
    plan = fr.plan(rope=axial(grid(200), 16), modulations=modulations, key_mask=key_masks(g, mask, 2, 200))
    for each in (plan, plan.with_groups([(1.2, 0.7)])):
        with Watch(q, k, v, *each.tensors) as watch:
            fr.attention(q, k, v, plan=each, backend="sdpa", return_lse=True)
        assert watch.read == []


@pytest.mark.parametrize("kind", ["levels", "distinct", "gain"])
@pytest.mark.parametrize("mask", [None, "random"])
def test_handing_over_reads_nothing_on_the_host(kind, mask):
    g = generator(4)
    q, k, v = tensors(g, batch=2, queries=200, heads=2, dim=16)
    few = torch.arange(200, device=DEVICE) < 60
    r = torch.where(few, scales(g, "levels" if kind == "gain" else kind, 200), 1.0)
    loose = fr.LogitGain(r) if kind == "gain" else fr.QueryScale(r)
    plan = fr.plan(rope=axial(grid(200), 16), modulations=[loose], key_mask=key_masks(g, mask, 2, 200))
    given = []

    def plain(query, key, value, scale, **_):
        given.append(query.shape[1])
        return query

    with Watch(q, k, v, *plan.tensors) as watch:
        fr.attention(q, k, v, plan=plan, plain=plain)
    assert watch.read == []
    assert given == [int((r == 1).sum())] * (1 if mask is None else 2)


def test_the_watch_sees_reads():
    with Watch() as watch:
        x = torch.arange(4)
        x.sum().item()
        x[x > 1]
        x.nonzero()
    assert len(watch.read) >= 3
    known = torch.zeros(3, 2)
    with Watch(known) as watch:
        known[:, [0, 1]]
    assert watch.read == ["index"]
    with Watch(known) as watch:
        known[torch.arange(2)]
    assert watch.read == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["levels", "few"])
def test_sdpa_allocates_no_logits(kind, dtype):
    """2048 x 2048: the logits of one head alone are 64 times the keys. Query variants and copies stay small."""
    tokens, dim = 2048, 16
    g = generator(5)
    q, k, v = tensors(g, queries=tokens, heads=2, dim=dim, dtype=dtype)
    r = scales(g, kind, tokens)
    modulations = [
        fr.QueryScale(r, keys=slice(1024, None), axes=(1, 2)),
        fr.BandWeight(uniform(g, dim // 2), keys=slice(512, 1500)),
        fr.BiasDelta(1.1, 0.8, keys=slice(1024, 1600)),
        fr.LogitGain(uniform(g, tokens), keys=slice(1300, None)),
    ]
    plan = fr.plan(rope=axial(grid(tokens), dim), modulations=modulations)
    with Watch() as watch:
        fr.attention(q, k, v, plan=plan, backend="sdpa")
    keys_wide = k.numel() * 4
    variants = (
        5  # plain, scaled, scaled with gain; in half precision a gain takes two columns, and so does a plain gain
    )
    assert watch.largest <= 2 * variants * keys_wide, watch.where
    assert watch.largest < tokens * tokens * k.element_size(), watch.where


TOKENS = fr.TokenLayout(text=64, target=(16, 16), references=[(16, 16), (8, 8)])
LEFT = torch.zeros(16, 16)
LEFT[:, :8], LEFT[:, 8] = 1.0, 0.5
REGIONS = [
    fr.Region(LEFT, slice(0, 16), [0]),
    fr.Region(1 - LEFT, slice(16, 32), [1]),
    fr.Region(LEFT.T, slice(32, 48)),
]
BIASED = {
    "regions": fr.Regions(REGIONS), "local regions": fr.Regions(REGIONS, local=True),
    "strength": fr.ReferenceStrength([0.7, 1.5]), "words": fr.PromptWeights({3: 1.4, 5: 0.6}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_take_no_more_memory_than_none(dtype):
    """Beyond inputs, against the same call of a rotation alone: head dim 128 and the tokens of an image editor."""
    q, k, v = tensors(generator(5), queries=len(TOKENS), heads=8, dim=128, dtype=dtype)
    rope, site = fr.RoPE.axial(TOKENS.positions("flux"), (16, 56, 56)), fr.Site(TOKENS)

    def peak(modulations):
        plan = fr.plan(rope=rope, modulations=modulations)
        with Live() as live:
            fr.attention(q, k, v, plan=plan, backend="sdpa")
        return live.peak

    without = peak(())
    assert without <= (4.5 if dtype == torch.float32 else 8) * q.nbytes  # rotated q and k, rotations, and the output
    found = {name: peak(method.modulations(site)) / without for name, method in BIASED.items()}
    gain = torch.ones(len(TOKENS))
    gain[TOKENS.target] = torch.linspace(0.6, 1.3, 256)
    found["gain"] = peak([fr.LogitGain(gain, TOKENS.reference(0))]) / without
    assert max(found.values()) <= 1.02, found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_apart_give_what_they_give_together(dtype, monkeypatch):
    """Three key heads in four parts: one at a time, with the two query heads that share it."""
    g = generator(6)
    q, k, v = tensors(g, batch=2, queries=40, heads=6, key_heads=3, dim=16, dtype=dtype)
    modulations = biases_and_values(g, 40, 40, batch=2) + every_modulation(g, 40, 40, 16, "mixed")
    call = Call(q, k, v, axial(grid(40), 16), modulations=modulations, key_mask=key_masks(g, "row", 2, 40))
    seen, run = [], sdpa._run
    monkeypatch.setattr(sdpa, "_run", lambda q, *rest: seen.append(q.shape[2]) or run(q, *rest))
    monkeypatch.setattr(sdpa, "WORTH", 0)
    check(call, "sdpa")
    assert seen == [2, 2, 2]


def test_sdpa_stacks_few_key_copies_for_per_query_scales():
    tokens, dim = 1024, 16
    g = generator(6)
    q, k, v = tensors(g, queries=tokens, heads=1, dim=dim)
    r = torch.ones(tokens, device=DEVICE)
    r[:40] = uniform(g, 40)  # more than there may be buckets
    plan = fr.plan(rope=axial(grid(tokens), dim), modulations=[fr.QueryScale(r)])
    assert plan.lowered.scales.counts[0][0] == 40
    with Watch() as watch:
        fr.attention(q, k, v, plan=plan, backend="sdpa")
    assert watch.largest <= 16 * k.numel() * 4, watch.where


@pytest.mark.parametrize(("backend", "kind"), [("sdpa", "levels"), ("sdpa", None), ("triton", None)])
def test_memory_does_not_grow_with_the_key_signatures(backend, kind):
    """A group for every other key: what is held at once stays a small multiple of the keys, and no table is N x N."""
    tokens, dim = 100 if backend == "triton" and devices.interpreted() else 256, 16
    skip_unless_runnable(backend)
    g = generator(8)
    q, k, v = tensors(g, queries=tokens, heads=1, dim=dim)
    plan = fr.plan(rope=axial(grid(tokens), dim), modulations=many_signatures(g, tokens, tokens, dim, kind))
    assert len(plan.lowered.passes) > 5
    with Watch() as watch:
        fr.attention(q, k, v, plan=plan, backend=backend)
    assert watch.largest <= 12 * k.numel() * 4, watch.where
    assert max(t.numel() for t in plan.tensors) <= 12 * k.numel()


@pytest.mark.parametrize("masked", [False, True])
def test_a_log_sum_exp_differentiates_block_by_block(masked, monkeypatch):
    monkeypatch.setattr(log_sum_exp, "BLOCK_ROWS", 4)
    g = generator(9)
    q, k = (draw(g, 2, 2, n, 8, dtype=torch.float64).requires_grad_() for n in (10, 7))
    mask = key_masks(g, "random", 2, 7)[:, None, None] if masked else None

    def lse(q, k):
        return log_sum_exp.log_sum_exp(q, k, mask, 0.3)

    s = (q @ k.transpose(-1, -2)) * 0.3
    torch.testing.assert_close(lse(q, k), s.masked_fill(~mask, -torch.inf).logsumexp(-1) if masked else s.logsumexp(-1))
    assert torch.autograd.gradcheck(lse, (q, k), check_forward_ad=True)


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_log_sum_exp_is_made_in_blocks(return_lse):
    tokens, heads = 2048, 2
    q, k, v = tensors(generator(7), queries=tokens, heads=heads, dim=16)
    with Watch() as watch:
        fr.attention(q, k, v, backend="sdpa", return_lse=return_lse)
    assert watch.largest <= (heads * 256 * tokens * 4 if return_lse else 2 * k.numel() * 4), watch.where
