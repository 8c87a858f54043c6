"""What may be done to all tokens, on every backend: a shift of positions, another order, rows one by one, masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from numerics import (
    DEVICE,
    SCALES,
    axial,
    biases_and_values,
    check,
    compare,
    disjoint_sets,
    every_modulation,
    grid,
    key_masks,
    members,
    scales,
    scatter,
    some_biases,
    uniform,
)
from twins import SOME_SCALES, backends, made, same

import fastrope as fr

# ---- positions -------------------------------------------------------------------------------------------------------


def shifted(rope: fr.RoPE, by: tuple[float, ...], dim: int, positions: torch.Tensor) -> fr.RoPE:
    return axial(positions + torch.tensor(by, dtype=torch.float64, device=DEVICE), dim, rope.pairing)


@backends
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("structured", [True, False])
def test_the_origin_does_not_matter(backend, dtype, kind, structured):
    g, call = made(dtype)
    positions = grid(48, 5) if structured else scatter(g, 48)
    call = replace(call, rope=axial(positions, 32))
    modulations = [m for m in every_modulation(g, 48, 48, 32, kind) if not isinstance(m, fr.BiasDelta)]
    call = replace(call, modulations=modulations)
    for by in ((0, 0, 7.5), (3, -200, 1000)):
        same(call, replace(call, rope=shifted(call.rope, by, 32, positions)), backend)


@backends
@pytest.mark.parametrize("covered", ["all", "none"])
def test_the_origin_does_not_matter_to_whole_groups(backend, dtype, covered):
    """A group turns as one, with its mean, where the QueryScale covers all of it or nothing."""
    g, call = made(dtype)
    group = slice(20, 40) if covered == "all" else slice(5, 15)
    modulations = [fr.QueryScale(scales(g, "distinct", 48), slice(15, None)), fr.BiasDelta(1.4, 0.7, group)]
    call = replace(call, modulations=modulations)
    same(call, replace(call, rope=shifted(call.rope, (1, -30, 12.5), 32, grid(48, 5))), backend)


def test_the_origin_matters_to_a_group_partly_under_a_scale():
    """By definition: mu_i averages keys turned by r_i with keys turned by 1, and a shift turns the two parts by
    different angles. The only call the origin reaches; groups of the methods are never cut this way."""
    g, call = made(torch.float64)
    modulations = [fr.QueryScale(scales(g, "distinct", 48), slice(15, None)), fr.BiasDelta(1.4, 0.7, slice(10, 30))]
    call = replace(call, modulations=modulations)
    moved = replace(call, rope=shifted(call.rope, (0, 0, 9), 32, grid(48, 5)))
    difference = (call.run("eager")[0] - moved.run("eager")[0]).abs().max()
    assert float(difference) > 1e-3
    for each in (call, moved):
        check(each, "sdpa")


@backends
def test_no_scale_without_positions(backend, dtype):
    """r = 0 on all axes: the covered keys are attended as if nothing was ever rotated."""
    _, call = made(dtype)
    zero = [fr.QueryScale(torch.zeros(48, device=DEVICE))]
    same(replace(call, modulations=zero), replace(call, rope=None), backend)


@backends
def test_no_scale_without_positions_on_some_keys(backend, dtype):
    """The same on a part of the keys: as if the others alone had positions, and these had the query's own."""
    _, call = made(dtype, tokens=20)
    zero = replace(call, modulations=[fr.QueryScale(torch.zeros(20, device=DEVICE), slice(8, None))])
    out, lse = zero.run(backend)
    wide = call.to(torch.float64)
    parts = [replace(wide, k=wide.k[:, :8], v=wide.v[:, :8], key_rope=axial(grid(20, 5)[:8], 32))]
    parts.append(replace(wide, k=wide.k[:, 8:], v=wide.v[:, 8:], rope=None))
    found = [part.run("eager") for part in parts]
    weights = torch.stack([x for _, x in found]).softmax(0).transpose(2, 3)[..., None]
    merged = sum(w * x for w, (x, _) in zip(weights, found, strict=True))
    assert torch.allclose(zero.exact()[0], merged, atol=1e-12)
    compare(zero, out, lse, backend)


@backends
@pytest.mark.parametrize("kind", SOME_SCALES)
def test_rotated_beforehand(backend, dtype, kind):
    """``applied=True`` on rotated tensors is ``applied=False`` on plain ones. Exact in float64 only: elsewhere the
    rotated tensors are rounded, which is another call."""
    if dtype not in (torch.float64, torch.float32):
        pytest.skip("rounds q and k first")
    g, call = made(dtype)
    call = replace(call, modulations=every_modulation(g, 48, 48, 32, kind))
    turned = [fr.rope.rotate(x.double(), call.rope.angles, "interleaved").to(dtype) for x in (call.q, call.k)]
    twin = replace(call, q=turned[0], k=turned[1], rope=call.rope.as_applied())
    check(twin, backend)
    if dtype == torch.float64:
        same(call, twin, backend)


# ---- keys and batch --------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("kind", SCALES)
def test_keys_may_be_permuted(backend, dtype, kind):
    """With their values, angles, mask and key sets."""
    g, call = made(dtype, batch=2)
    order = torch.randperm(48, generator=g).to(DEVICE)
    mask = key_masks(g, "random", 2, 48)
    values = biases_and_values(g, 48, 48, 2) if kind in SOME_SCALES else []
    modulations = every_modulation(g, 48, 48, 32, kind) + values
    call = replace(call, key_rope=call.rope, key_mask=mask, modulations=modulations)
    twin = replace(
        call, k=call.k[:, order], v=call.v[:, order], key_mask=mask[:, order],
        key_rope=fr.RoPE(call.rope.angles[order], call.rope.axis),
        modulations=[_permuted(m, order) for m in call.modulations],
    )  # fmt: skip
    same(call, twin, backend)


def _permuted(m, order: torch.Tensor):
    if isinstance(m, fr.KeyBias):
        return replace(m, bias=m.bias[..., order])
    if isinstance(m, fr.ValueGain) and isinstance(m.gain, torch.Tensor):  # a gain per key, in the order of the slice
        at = order.argsort()[torch.arange(48, device=DEVICE)[m.keys]]
        return replace(m, keys=at)
    return replace(m, keys=members(m.keys, 48).to(DEVICE)[order])


@backends
@pytest.mark.parametrize("kind", SCALES)
def test_a_batch_equals_its_rows(backend, dtype, kind):
    g, call = made(dtype, batch=2, tokens=40)
    groups = [fr.BiasDelta(0.5 + uniform(g, 2), 0.5 + uniform(g, 2), keys) for keys in disjoint_sets(g, 2, 40)]
    modulations = [m for m in every_modulation(g, 40, 40, 32, kind, batch=2) if not isinstance(m, fr.BiasDelta)]
    groups += [fr.BiasDelta(0.5 + uniform(g, 2), 0.5 + uniform(g, 2), slice(9, 30), on="values")]
    if kind in SOME_SCALES:
        groups += [fr.LogitBias(some_biases(g, 2, 40), slice(5, 30)), fr.LogitBias(some_biases(g, 2, 1)),
                   fr.KeyBias(some_biases(g, 2, 40)), fr.ValueGain(uniform(g, 2, 11), slice(0, 11))]  # fmt: skip
    rope, mask = axial(scatter(g, 40, batch=2), 32), key_masks(g, "row", 2, 40)
    call = replace(call, rope=rope, key_mask=mask, modulations=modulations + groups)
    out, lse = call.run(backend)
    for b in range(2):
        row = replace(
            call, q=call.q[b, None], k=call.k[b, None], v=call.v[b, None], key_mask=mask[b, None],
            rope=fr.RoPE(rope.angles[b, None], rope.axis), modulations=[_row(m, b) for m in call.modulations],
        )  # fmt: skip
        compare(row, out[b, None], lse[b, None], backend)


def _row(m, b: int):
    values = {n: getattr(m, n, None) for n in ("scale", "gain", "bias", "delta")}
    own = {n: x[b, None] for n, x in values.items() if isinstance(x, torch.Tensor) and x.shape[0] == 2}
    return replace(m, **own)


@backends
def test_heads_of_a_group_share_their_keys(backend, dtype):
    """Grouped-query attention equals repeated key heads."""
    g, call = made(dtype, heads=4, key_heads=2, tokens=30)
    call = replace(call, modulations=every_modulation(g, 30, 30, 32, "zero"))
    same(call, replace(call, k=call.k.repeat_interleave(2, 2), v=call.v.repeat_interleave(2, 2)), backend)


@backends
def test_masked_keys_are_absent(backend, dtype):
    """Masking keys equals leaving them out, of the mean of a group too."""
    g, call = made(dtype)
    keep = key_masks(g, "random", 1, 48)[0]
    modulations = every_modulation(g, 48, 48, 32, "levels")
    masked = replace(call, key_mask=keep[None], modulations=modulations)
    without = replace(
        call, k=call.k[:, keep], v=call.v[:, keep], key_rope=fr.RoPE(call.rope.angles[keep], call.rope.axis),
        modulations=[replace(m, keys=members(m.keys, 48).to(DEVICE)[keep]) for m in modulations],
    )  # fmt: skip
    same(masked, without, backend)
