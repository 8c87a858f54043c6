"""The algebra of the modulations, line by line, on every backend: neutral values, composition, ends of dials."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from numerics import (
    DEVICE,
    assert_close,
    biases_and_values,
    check,
    every_modulation,
    key_masks,
    key_set,
    members,
    some_biases,
    uniform,
)
from twins import SOME_SCALES, backends, bitwise, made, same

import fastrope as fr

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
