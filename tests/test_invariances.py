"""The algebra of the modulations, line by line, on every backend.

Two calls that mean the same are compared through the reference: the result of one is held against the other's
reference in float64, under the one tolerance rule.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from numerics import (
    DEVICE,
    SCALES,
    Call,
    assert_close,
    axial,
    biases_and_values,
    check,
    compare,
    disjoint_sets,
    every_modulation,
    generator,
    grid,
    key_masks,
    key_set,
    members,
    scales,
    scatter,
    skip_unless_runnable,
    some_biases,
    tensors,
    uniform,
)

import fastrope as fr
from fastrope import device as devices

BACKENDS = [("eager", torch.float64), ("sdpa", torch.float64), ("sdpa", torch.bfloat16), ("triton", torch.float32)]
if not devices.interpreted():
    BACKENDS += [("triton", torch.bfloat16)]
backends = pytest.mark.parametrize(
    ("backend", "dtype"), BACKENDS, ids=[f"{b}-{str(d).removeprefix('torch.')}" for b, d in BACKENDS]
)
SOME_SCALES = ("levels", "distinct")


@pytest.fixture(autouse=True)
def _runnable(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    skip_unless_runnable(parameters.get("backend"))


def made(dtype, tokens=48, dim=32, batch=1, heads=1, key_heads=1, seed=0, rope=True):
    """A plain call and the generator its values come from."""
    g = generator(seed)
    q, k, v = tensors(g, batch=batch, queries=tokens, heads=heads, key_heads=key_heads, dim=dim, dtype=dtype)
    return g, Call(q, k, v, axial(grid(tokens, 5), dim) if rope else None)


def same(call: Call, twin: Call, backend: str) -> None:
    """Both calls mean the same: a result of one is as near to the other's reference as the rule asks of it."""
    compare(call, *twin.run(backend), name=backend, twin=twin)
    if backend != "triton" or not devices.interpreted():  # slow, and each call against itself is tested elsewhere
        compare(twin, *call.run(backend), name=backend, twin=call)


def bitwise(call: Call, twin: Call, backend: str) -> None:
    for x, y in zip(call.run(backend), twin.run(backend), strict=True):
        assert torch.equal(x, y)


# ---- neutral values --------------------------------------------------------------------------------------------------


def neutral(tokens: int, pairs: int, batch: int) -> list:
    one = torch.ones(tokens, device=DEVICE)
    return [
        fr.QueryScale(one.expand(batch, -1), keys=slice(10, None), axes=(1, 2)),
        fr.BandWeight(torch.ones(pairs, device=DEVICE), keys=slice(3, 20)),
        fr.BandWeight(torch.ones(pairs, device=DEVICE)),
        fr.BiasDelta(1.0, torch.ones(batch, device=DEVICE), keys=slice(0, 7)),
        fr.BiasDelta(keys=slice(7, 30)),
        fr.LogitGain(one, keys=slice(5, 40)),
        fr.LogitGain(one.double()),
        fr.LogitBias(0.0, keys=slice(5, 40)),
        fr.LogitBias(0 * one.expand(batch, -1)),
        fr.KeyBias(0 * one),
        fr.ValueGain(1.0, keys=slice(3, 9)),
        fr.ValueGain(one.expand(batch, -1)),
        fr.BiasDelta(1.0, torch.ones(batch, device=DEVICE), keys=slice(0, 30), on="values"),
    ]


@backends
@pytest.mark.parametrize("applied", [None, False, True])
def test_neutral_modulations_leave_every_bit(backend, dtype, applied):
    _, call = made(dtype, batch=2, rope=applied is not None)
    modulations = neutral(48, 16, 2)
    if applied is None:
        modulations = [m for m in modulations if not isinstance(m, (fr.QueryScale, fr.BandWeight))]
    else:
        call = replace(call, rope=call.rope.as_applied(applied))
    bitwise(call, replace(call, modulations=modulations), backend)
    for m in modulations:
        bitwise(call, replace(call, modulations=[m]), backend)


@backends
def test_neutral_beside_others_leaves_every_bit(backend, dtype):
    g, call = made(dtype, batch=2)
    others = [m for m in every_modulation(g, 48, 48, 32, "levels") if not isinstance(m, fr.QueryScale)]
    others += biases_and_values(g, 48, 48)
    extra = [m for m in neutral(48, 16, 2) if not isinstance(m, fr.BiasDelta)]
    bitwise(replace(call, modulations=others), replace(call, modulations=others + extra), backend)


@backends
def test_a_full_key_mask_leaves_every_bit(backend, dtype):
    _, call = made(dtype, batch=2)
    full = torch.ones(2, 48, dtype=torch.bool, device=DEVICE)
    bitwise(call, replace(call, key_mask=full), backend)


# ---- composition -----------------------------------------------------------------------------------------------------


@backends
def test_band_weights_multiply(backend, dtype):
    g, call = made(dtype)
    first, second = (uniform(g, 16, low=0.3, high=1.4) for _ in range(2))
    a, b = slice(4, 30), key_set(g, "mask", 48)
    inside = members(a, 48).to(DEVICE)
    apart = [
        fr.BandWeight(first, inside & ~b),
        fr.BandWeight(second, b & ~inside),
        fr.BandWeight(first * second, inside & b),
    ]
    together = [fr.BandWeight(first, a), fr.BandWeight(second, b)]
    same(replace(call, modulations=apart), replace(call, modulations=together), backend)


@backends
def test_logit_gains_multiply(backend, dtype):
    g, call = made(dtype, batch=2)
    first, second = uniform(g, 48, low=-1, high=1.4), uniform(g, 2, 48, low=0.3, high=1.4)
    a, b = slice(4, 30), key_set(g, "mask", 48)
    inside = members(a, 48).to(DEVICE)
    apart = [
        fr.LogitGain(first, inside & ~b),
        fr.LogitGain(second, b & ~inside),
        fr.LogitGain(first * second, inside & b),
    ]
    together = [fr.LogitGain(first, a), fr.LogitGain(second, b)]
    same(replace(call, modulations=apart), replace(call, modulations=together), backend)


@backends
def test_biases_add_and_value_gains_multiply(backend, dtype):
    """Over the same keys; a bias that hides wins over any other."""
    g, call = made(dtype, batch=2)
    a, b = slice(4, 30), key_set(g, "mask", 48)
    inside = members(a, 48).to(DEVICE)
    first, second = some_biases(g, 48), some_biases(g, 2, 48)
    u, w = uniform(g, 48, low=-1.5, high=1.5), uniform(g, 2, 1, low=-1.5, high=1.5)
    apart = [
        fr.LogitBias(first, inside & ~b),
        fr.LogitBias(second, b & ~inside),
        fr.LogitBias(first + second, inside & b),
        fr.ValueGain(torch.where(inside, u, 1.0) * torch.where(b, w, 1.0)),
    ]
    together = [fr.LogitBias(first, a), fr.LogitBias(second, b), fr.ValueGain(u[4:30], a), fr.ValueGain(w, b)]
    same(replace(call, modulations=apart), replace(call, modulations=together), backend)
    bitwise(replace(call, modulations=together), replace(call, modulations=together[::-1]), "sdpa")


@backends
def test_a_bias_of_all_keys_moves_the_log_sum_exp_alone(backend, dtype):
    """Per key or per query, it is one number on every logit of a query."""
    g, call = made(dtype, batch=2)
    b = some_biases(g, 2, 48, hidden=0.0)
    (out, lse), low = check(replace(call, modulations=[fr.LogitBias(b)]), backend), call.low()
    plain = call.exact()
    assert_close(out, plain[0], low[0])
    assert_close(lse, plain[1] + b[:, None], low[1] + b[:, None].to(low[1]), dtype, name="lse")
    same(replace(call, modulations=[fr.KeyBias(torch.full((48,), 0.7, dtype=torch.float64, device=DEVICE))]),
         replace(call, modulations=[fr.LogitBias(0.7)]), backend)  # fmt: skip


@backends
def test_a_bias_of_log_n_is_n_copies(backend, dtype):
    g, call = made(dtype, tokens=30)
    copies = torch.randint(1, 4, (30,), generator=g).to(DEVICE)
    twin = replace(call, k=call.k.repeat_interleave(copies, 1), v=call.v.repeat_interleave(copies, 1),
                   key_rope=fr.RoPE(call.rope.angles.repeat_interleave(copies, 0), call.rope.axis))  # fmt: skip
    same(twin, replace(call, modulations=[fr.KeyBias(copies.double().log())]), backend)


@backends
def test_a_key_bias_that_hides_is_absence_and_a_logit_bias_that_hides_is_not(backend, dtype):
    """From means, of keys and of values, too: the one leaves them out, the other leaves them alone."""
    g, call = made(dtype, batch=2)
    keep = key_masks(g, "random", 2, 48)
    groups = [fr.BiasDelta(1.3, 0.6, slice(10, 40)), fr.BiasDelta(0.7, 1.4, slice(20, None), on="values")]
    hides = torch.where(keep, 0.0, -torch.inf)
    masked = replace(call, key_mask=keep, modulations=groups)
    bitwise(masked, replace(call, modulations=[*groups, fr.KeyBias(hides)]), backend)
    only = replace(call, modulations=[*groups, fr.LogitBias(-torch.inf, slice(30, None))])
    check(only, backend)
    gone = replace(call, key_mask=torch.arange(48, device=DEVICE)[None] < 30, modulations=groups)
    assert float((only.exact()[0] - gone.exact()[0]).abs().max()) > 1e-3


@backends
def test_values_change_no_weight(backend, dtype):
    """Nor the log-sum-exp, to the bit; a gain of -1 on all keys turns the output into its opposite."""
    g, call = made(dtype, batch=2)
    modulations = [m for m in biases_and_values(g, 48, 48, 2) if isinstance(m, (fr.LogitBias, fr.KeyBias))]
    call = replace(call, modulations=modulations)
    changes = [fr.ValueGain(-1.0), fr.BiasDelta(1.4, 0.3, slice(9, 30), on="values")]
    lses = [replace(call, modulations=[*modulations, m]).run(backend)[1] for m in changes]
    out, lse = call.run(backend)
    assert all(torch.equal(x, lse) for x in lses)
    assert torch.equal(replace(call, modulations=[*modulations, changes[0]]).run(backend)[0], -out)


@backends
@pytest.mark.parametrize("kind", SOME_SCALES)
def test_order_in_the_list_does_not_matter(backend, dtype, kind):
    g, call = made(dtype)
    modulations = every_modulation(g, 48, 48, 32, kind) + biases_and_values(g, 48, 48)
    modulations += [fr.LogitGain(uniform(g, 48), slice(20, 33)), fr.BiasDelta(0.9, 1.2, slice(40, 44))]
    first = replace(call, modulations=modulations)
    same(first, replace(call, modulations=modulations[::-1]), backend)
    shuffled = [modulations[n] for n in torch.randperm(len(modulations), generator=g).tolist()]
    same(first, replace(call, modulations=shuffled), backend)


@backends
@pytest.mark.parametrize(("a", "b"), [(slice(0, 9), slice(8, 20)), (slice(None), torch.tensor([47]))])
def test_groups_that_share_a_key_are_an_error(backend, dtype, a, b):
    """Even where one is neutral: whether a call is valid must not depend on a dial's value."""
    _, call = made(dtype)
    for bias, on in itertools.product((1.0, 1.2), ("keys", "values")):
        groups = [fr.BiasDelta(1.3, 1.0, a, on), fr.BiasDelta(bias, 1.0, b, on)]
        with pytest.raises(ValueError, match=r"BiasDelta\.keys.*overlapping"):
            replace(call, modulations=groups).run(backend)
    other = [fr.BiasDelta(1.3, 1.0, a), fr.BiasDelta(1.2, 1.0, b, on="values")]
    check(replace(call, modulations=other), backend)


@backends
def test_two_query_scales_are_an_error(backend, dtype):
    _, call = made(dtype)
    one = torch.ones(48, device=DEVICE)
    with pytest.raises(ValueError, match="at most one QueryScale"):
        replace(call, modulations=[fr.QueryScale(one, slice(0, 4)), fr.QueryScale(one, slice(4, 8))]).run(backend)


@backends
@pytest.mark.parametrize("kind", ["slice", "negative", "step", "one"])
def test_forms_of_a_key_set(backend, dtype, kind):
    """A slice, its mask and its indices are one key set."""
    g, call = made(dtype)
    keys = key_set(g, kind, 48)
    mask = members(keys, 48).to(DEVICE)
    index = mask.nonzero().flatten().flip(0)
    for form in (mask, index, index.int()):
        bitwise(*(replace(call, modulations=[fr.BiasDelta(1.2, 0.8, keys=x)]) for x in (keys, form)), backend)


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


# ---- values at the ends of the dials ---------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("how", ["bias and delta", "gain", "weight"])
def test_zero_makes_logits_zero(backend, dtype, how):
    """On all keys: uniform attention, and a log-sum-exp of log Sk."""
    _, call = made(dtype)
    zero = {
        "bias and delta": fr.BiasDelta(0.0, 0.0), "gain": fr.LogitGain(torch.zeros(48, device=DEVICE)),
        "weight": fr.BandWeight(torch.zeros(16, device=DEVICE)),
    }[how]  # fmt: skip
    call = replace(call, modulations=[zero])
    _, lse = check(call, backend)
    assert float((lse - torch.tensor(48.0).log()).abs().max()) < 1e-5
    exact = call.exact()[0]
    uniform_mean = call.v.double().mean(1, keepdim=True).expand_as(exact)
    assert float((exact - uniform_mean).abs().max()) < 1e-12


@backends
def test_zero_on_a_group_makes_its_logits_zero(backend, dtype):
    """lambda = delta = 0 on a group: what a gain of zero does."""
    _, call = made(dtype)
    group = fr.BiasDelta(0.0, 0.0, slice(10, 30))
    gain = fr.LogitGain(torch.zeros(48, device=DEVICE), slice(10, 30))
    same(replace(call, modulations=[group]), replace(call, modulations=[gain]), backend)


@backends
def test_delta_is_a_temperature_inside_the_group(backend, dtype):
    """lambda = delta multiplies the group's logits: a gain that is the same for every query."""
    _, call = made(dtype)
    half = [fr.BiasDelta(0.5, 0.5, slice(10, 30))]
    gain = [fr.LogitGain(torch.full((48,), 0.5, device=DEVICE), slice(10, 30))]
    weight = [fr.BandWeight(torch.full((16,), 0.5, device=DEVICE), slice(10, 30))]
    same(replace(call, modulations=half), replace(call, modulations=gain), backend)
    same(replace(call, modulations=weight), replace(call, modulations=gain), backend)
