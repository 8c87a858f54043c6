"""The reference against oracles that share no code with it: complex numbers in loops, closed forms, torch, numbers that
others published."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from numerics import (
    DEVICE,
    SCALES,
    Call,
    assert_close,
    axial,
    biases_and_values,
    draw,
    every_modulation,
    generator,
    grid,
    key_masks,
    members,
    scales,
    tensors,
    uniform,
)
from strategies import calls

import fastrope as fr

# ---- the definition, once more: complex pairs, one query and one key at a time -------------------------------------


def _complex(x: np.ndarray, pairing: str) -> np.ndarray:
    """Pairs of ``(..., D)`` as complex numbers ``(..., D/2)``."""
    half = x.shape[-1] // 2
    return x[..., 0::2] + 1j * x[..., 1::2] if pairing == "interleaved" else x[..., :half] + 1j * x[..., half:]


def _numbers(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _angles(rope: fr.RoPE | None, batch: int, tokens: int, pairs: int) -> np.ndarray:
    if rope is None:
        return np.zeros((batch, tokens, pairs))
    return np.broadcast_to(_numbers(rope.angles), (batch, tokens, pairs))


def by_definition(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """``out (B, Sq, H, D)`` and ``lse (B, H, Sq)`` of a call, float64."""
    pairing = call.rope.pairing if call.rope else "interleaved"
    key_rope = call.key_rope or call.rope
    q, k, v = _complex(_numbers(call.q), pairing), _complex(_numbers(call.k), pairing), _numbers(call.v)
    (batch, queries, heads, pairs), keys = q.shape, k.shape[1]
    share = heads // k.shape[2]
    phi_q, phi_k = _angles(call.rope, batch, queries, pairs), _angles(key_rope, batch, keys, pairs)
    if call.rope is not None and call.rope.applied:
        q = q * np.exp(-1j * phi_q)[:, :, None]
    if key_rope is not None and key_rope.applied:
        k = k * np.exp(-1j * phi_k)[:, :, None]
    seen = np.ones((batch, keys), bool)
    if call.key_mask is not None:
        seen = np.broadcast_to(call.key_mask.cpu().numpy(), (batch, keys))
    scale = call.scale if call.scale is not None else (2 * pairs) ** -0.5
    mods = [(m, members(getattr(m, "keys", slice(None)), keys).numpy()) for m in call.modulations]
    for m, _ in mods:
        if isinstance(m, fr.KeyBias):
            seen = seen & (np.broadcast_to(_numbers(m.bias), (batch, keys)) > -np.inf)

    def per_query(values, b, i):
        values = torch.as_tensor(values, dtype=torch.float64)
        for index in (i, b)[: values.ndim]:  # the last dimension first
            values = values[..., index if values.shape[-1] > 1 else 0]
        return float(values)

    def per_row(value, b):
        value = _numbers(torch.as_tensor(value, dtype=torch.float64)).reshape(-1)
        return value[b if len(value) > 1 else 0]

    def value(m, covered, b, j):
        """The gain of a ValueGain at a key that it covers."""
        gain = _numbers(torch.as_tensor(m.gain, dtype=torch.float64))
        if gain.ndim == 0:
            return float(gain)
        named = list(range(keys))[m.keys] if isinstance(m.keys, slice) else None
        named = named if named is not None else np.flatnonzero(covered).tolist()
        if isinstance(m.keys, torch.Tensor) and m.keys.dtype != torch.bool:
            named = m.keys.tolist()
        if gain.ndim == 1:
            gain = gain[None] if len(gain) == len(named) else gain[:, None]
        row = gain[b if len(gain) > 1 else 0]
        return row[named.index(j) if len(row) > 1 else 0]

    vt = np.array(v)
    for b in range(batch):
        for m, covered in mods:
            if isinstance(m, fr.BiasDelta) and m.on == "values" and (covered & seen[b]).any():
                nu = v[b, covered & seen[b]].mean(0)
                vt[b, covered] = per_row(m.bias, b) * nu + per_row(m.delta, b) * (v[b, covered] - nu)
        for m, covered in mods:
            for j in np.flatnonzero(covered) if isinstance(m, fr.ValueGain) else ():
                vt[b, j] *= value(m, covered, b, j)
    out, lse = np.zeros(_numbers(call.q).shape), np.full((batch, heads, queries), -np.inf)
    for b, i, h in np.ndindex(batch, queries, heads):
        turn = np.ones((keys, pairs))  # r on the pairs and keys that the QueryScale covers
        for m, covered in mods:
            if isinstance(m, fr.QueryScale):
                axis = np.zeros(pairs) if call.rope.axis is None else call.rope.axis.cpu().numpy()
                turned = np.ones(pairs, bool) if m.axes is None else np.isin(axis, m.axes)
                turn[np.outer(covered, turned)] = per_query(m.scale, b, i)
        khat = k[b, :, h // share] * np.exp(1j * turn * phi_k[b])
        kt = khat.copy()
        for m, covered in mods:
            if isinstance(m, fr.BiasDelta) and m.on == "keys" and (covered & seen[b]).any():
                mu = khat[covered & seen[b]].mean(0)
                kt[covered] = per_row(m.bias, b) * mu + per_row(m.delta, b) * (khat[covered] - mu)
        s = []
        for j in np.flatnonzero(seen[b]):
            ktt, gain, bias = kt[j], 1.0, 0.0
            for m, covered in mods:
                if isinstance(m, fr.BandWeight) and covered[j]:
                    ktt = ktt * _numbers(m.weight)
                if isinstance(m, fr.LogitGain) and covered[j]:
                    gain *= per_query(m.gain, b, i)
                if isinstance(m, fr.LogitBias) and covered[j]:
                    bias += per_query(m.bias, b, i)
                if isinstance(m, fr.KeyBias):
                    bias += per_query(m.bias, b, j)
            turned_q = q[b, i, h] * np.exp(1j * turn[j] * phi_q[b, i])
            s.append(bias + gain * scale * sum((a.conjugate() * c).real for a, c in zip(turned_q, ktt, strict=True)))
        if s and max(s) > -np.inf:
            p = np.exp(np.array(s) - max(s))
            out[b, i, h] = p @ vt[b, seen[b], h // share] / p.sum()
            lse[b, h, i] = max(s) + math.log(p.sum())
    return out, lse


def against_definition(call: Call) -> None:
    found = call.run("eager")
    for name, x, expected in zip(("out", "lse"), found, by_definition(call), strict=True):
        assert_close(x, torch.from_numpy(expected).to(x.device), x, name=f"{name} {call.label}")


@settings(max_examples=60)
@given(calls(torch.float64, tokens=(1, 2, 5, 7, 12), dims=(16, 20)))
def test_any_composition_by_definition(call):
    against_definition(call)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("mask", [None, "random", "row", "shared"])
def test_everything_at_once_by_definition(pairing, applied, kind, mask):
    g = generator(1)
    q, k, v = tensors(g, batch=2, queries=12, heads=4, key_heads=2, dim=16, dtype=torch.float64)
    rope = axial(grid(12, 2), 16, pairing, applied)
    modulations = every_modulation(g, 12, 12, 16, kind, batch=2) + biases_and_values(g, 12, 12, batch=2)
    against_definition(Call(q, k, v, rope, modulations=modulations, key_mask=key_masks(g, mask, 2, 12), label=kind))


@pytest.mark.parametrize(("queries_applied", "keys_applied"), [(False, True), (True, False)])
def test_only_one_side_already_rotated(queries_applied, keys_applied):
    g = generator(2)
    q, k, v = tensors(g, queries=7, keys=9, dim=16, dtype=torch.float64)
    rope, key_rope = axial(grid(7), 16, applied=queries_applied), axial(grid(9, frame=1), 16, applied=keys_applied)
    against_definition(Call(q, k, v, rope, key_rope, every_modulation(g, 7, 9, 16, "distinct")))


@pytest.mark.parametrize("kind", SCALES)
def test_rotated_beforehand_is_the_same_call(kind):
    g = generator(3)
    q, k, v = tensors(g, queries=20, heads=4, key_heads=2, dim=32, dtype=torch.float64)
    rope = axial(grid(20), 32)
    modulations = every_modulation(g, 20, 20, 32, kind)
    expected, _ = Call(q, k, v, rope, modulations=modulations).run("eager")
    turned = [_turn(x, rope) for x in (q, k)]
    out, _ = Call(*turned, v, rope.as_applied(), modulations=modulations).run("eager")
    assert_close(out, expected, expected)


def _turn(x: torch.Tensor, rope: fr.RoPE) -> torch.Tensor:
    """Interleaved pairs times ``exp(i phi)``."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(rope.angles), rope.angles)[:, None]).flatten(-2)


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_without_modulations_it_is_torch(rotated, masked, scale):
    g = generator(4)
    q, k, v = tensors(g, batch=2, queries=33, heads=6, key_heads=2, dim=32, dtype=torch.float64)
    rope = axial(grid(33), 32) if rotated else None
    mask = key_masks(g, "random", 2, 33) if masked else None
    out, lse = Call(q, k, v, rope, key_mask=mask, scale=scale).run("eager")
    tq, tk = (_turn(x, rope) if rotated else x for x in (q, k))
    heads_first = [x.transpose(1, 2) for x in (tq, tk, v)]
    bias = None if mask is None else mask[:, None, None]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=bias, scale=scale, enable_gqa=True)
    assert_close(out, expected.transpose(1, 2), out)
    logits = heads_first[0] @ heads_first[1].repeat_interleave(3, dim=1).mT * (scale or 32**-0.5)
    logits = logits if mask is None else logits.masked_fill(~bias, -torch.inf)
    assert_close(lse, logits.logsumexp(-1), lse, name="lse")


# ---- closed forms: with one key the log-sum-exp is the logit ---------------------------------------------------------


def _logit(q, k, rope, key_rope, modulations=(), scale=1.0) -> float:
    q, k = (torch.as_tensor(x, dtype=torch.float64, device=DEVICE).reshape(1, 1, 1, -1) for x in (q, k))
    _, lse = Call(q, k, k, rope, key_rope, modulations, scale=scale).run("eager")
    return float(lse)


def _token(*position: float) -> torch.Tensor:
    return torch.tensor([position], dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("pair", [0, 1, 5])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("r", [0.0, 0.65, 1.0, 1.5])
def test_logit_of_one_pair(pair, pairing, r):
    """``cos(r (p_i - p_j) theta^(-2c/D))``: only the scaled distance enters."""
    first, second = (2 * pair, 2 * pair + 1) if pairing == "interleaved" else (pair, pair + 8)
    unit = torch.zeros(16)
    unit[first] = 1
    ropes = [fr.RoPE.axial(_token(p), (16,), theta=100.0, pairing=pairing) for p in (41.5, 12.0)]
    scale = [fr.QueryScale(torch.tensor([r], dtype=torch.float64))]
    angle = r * 29.5 * 100.0 ** (-2 * pair / 16)
    assert _logit(unit, unit, *ropes, scale) == pytest.approx(math.cos(angle), abs=1e-12)
    quarter = torch.zeros(16)
    quarter[second] = 1  # a quarter turn ahead: fixes the sense of rotation
    assert _logit(unit, quarter, *ropes, scale) == pytest.approx(math.sin(angle), abs=1e-12)


def test_axes_scale_their_own_distance():
    """``axes`` picks the distances that shrink: rows by r, frames not."""
    unit = torch.ones(16)
    ropes = [fr.RoPE.axial(_token(*p), (4, 6, 6)) for p in ((1, 9, 4), (0, 2, 1))]
    r, expected = 0.5, 0.0
    for dim, distance, factor in ((4, 1, 1.0), (6, 7, r), (6, 3, 1.0)):
        expected += sum(2 * math.cos(factor * distance * 10_000 ** (-2 * c / dim)) for c in range(dim // 2))
    scale = fr.QueryScale(torch.tensor([r]), axes=(1,))
    assert _logit(unit, unit, *ropes, [scale]) == pytest.approx(expected, abs=1e-12)


def test_weight_gain_and_scale_multiply():
    unit = torch.zeros(16)
    unit[4] = 1
    ropes = [fr.RoPE.axial(_token(p), (16,)) for p in (3.0, 1.0)]
    w = torch.ones(8)
    w[2] = 0.25
    value = 0.5 * -1.5 * 0.25 * math.cos(2 * 10_000 ** (-4 / 16))
    found = _logit(unit, unit, *ropes, [fr.BandWeight(w), fr.LogitGain(torch.tensor([-1.5]))], scale=0.5)
    assert found == pytest.approx(value, abs=1e-12)


def test_bias_and_delta_on_the_logits():
    """``<q, kt> = delta <q, k> + (lambda - delta) <q, mu>``: with two keys, mu is halfway between them."""
    bias, delta = 1.4, 0.6
    q = torch.zeros(1, 1, 1, 16, dtype=torch.float64, device=DEVICE)
    q[..., 0] = 1
    k = q.new_zeros(1, 2, 1, 16)
    k[0, 0, 0, 0], k[0, 1, 0, 0] = 3.0, 1.0
    v = k.new_zeros(1, 2, 1, 16)
    v[0, 0] = 1
    out, lse = Call(q, k, v, modulations=[fr.BiasDelta(bias, delta)], scale=1.0).run("eager")
    logits = [bias * 2 + delta, bias * 2 - delta]
    assert float(lse) == pytest.approx(math.log(sum(math.exp(s) for s in logits)), abs=1e-12)
    assert float(out[0, 0, 0, 0]) == pytest.approx(1 / (1 + math.exp(-2 * delta)), abs=1e-12)


def test_bias_alone_moves_a_group_as_a_whole():
    """With delta = 1, lambda adds the same number to every logit of the group: ratios inside it stay."""
    g = generator(6)
    q, k, _ = tensors(g, queries=5, keys=9, heads=1, dim=16, dtype=torch.float64)
    v = torch.eye(9, 16, dtype=torch.float64, device=DEVICE)[None, :, None]
    plain, _ = Call(q, k, v).run("eager")
    moved, _ = Call(q, k, v, modulations=[fr.BiasDelta(1.7, 1.0, slice(4, 9))]).run("eager")
    ratio = (moved / plain)[0, :, 0, :9].log()
    shift = (0.7 * 0.25 * torch.einsum("id,jd->ij", q[0, :, 0], k[0, 4:, 0]).mean(1))[:, None]
    inside, outside = ratio[:, 4:], ratio[:, :4]
    assert torch.allclose(inside - outside[:, :1], shift.expand(-1, 5), atol=1e-12)
    assert torch.allclose(outside, outside[:, :1].expand(-1, 4), atol=1e-12)


# ---- numbers of others -----------------------------------------------------------------------------------------------


def test_frequencies_of_flux():
    """Axes (16, 56, 56), theta 10000: 8, 28 and 28 pairs, each axis from 1 down to theta^(-(d - 2) / d)."""
    rope = fr.RoPE.axial(_token(1, 1, 1), (16, 56, 56))
    assert rope.axis.tolist() == [0] * 8 + [1] * 28 + [2] * 28
    expected = [10_000 ** (-c / 8) for c in range(8)] + 2 * [10_000 ** (-c / 28) for c in range(28)]
    assert rope.angles[0].tolist() == pytest.approx(expected, rel=1e-14)
    assert rope.angles[0, 7].item() == pytest.approx(3.1622776601683795e-4)  # 10000 ** -(14/16)


def test_diffusers_tables():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    positions = grid(20, 3, frame=1)
    q, k, v = tensors(generator(8), queries=20, heads=2, dim=32, dtype=torch.float64)
    tables = [
        embeddings.get_1d_rotary_pos_embed(
            d, positions[:, a].double(), repeat_interleave_real=True, use_real=True, freqs_dtype=torch.float64
        )
        for a, d in enumerate((4, 14, 14))
    ]
    cos, sin = (torch.cat(parts, dim=-1).double() for parts in zip(*tables, strict=True))
    turned = [embeddings.apply_rotary_emb(x.transpose(1, 2), (cos, sin)).transpose(1, 2) for x in (q, k)]
    out, _ = Call(q, k, v, fr.RoPE.axial(positions, (4, 14, 14))).run("eager")
    expected, _ = Call(*turned, v).run("eager")
    assert (out - expected).abs().max() < 1e-6  # its tables are float32


def test_transformers_half_pairing():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, v = tensors(generator(9), queries=20, heads=2, dim=32, dtype=torch.float64)
    rope = fr.RoPE.axial(torch.arange(20, device=DEVICE)[:, None], (32,), pairing="half")
    angles = torch.cat([rope.angles, rope.angles], dim=-1)[None]
    turned = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), angles.cos(), angles.sin())
    out, _ = Call(q, k, v, rope).run("eager")
    expected, _ = Call(*(x.transpose(1, 2) for x in turned), v).run("eager")
    assert_close(out, expected, out)


# ---- what the reference promises beside the formulas -----------------------------------------------------------------


def test_a_mask_hides_nothing_but_keys():
    """A NaN in a query that has keys stays visible; in one that has none it becomes zeros."""
    g = generator(10)
    q, k, v = tensors(g, batch=2, queries=4, heads=1, dim=16, dtype=torch.float64)
    q[:, 1] = torch.nan
    mask = torch.ones(2, 4, dtype=torch.bool, device=DEVICE)
    mask[0, 2], mask[1] = False, False
    for backend in ("eager", "sdpa"):
        out, _ = Call(q, k, v, key_mask=mask).run(backend)
        assert bool(out[0, 1].isnan().all())
        assert bool(out[0, [0, 2, 3]].isfinite().all())
        assert not out[1].any()


def test_some_queries_only():
    from fastrope.backends import reference

    g = generator(12)
    q, k, v = tensors(g, batch=2, queries=30, heads=2, dim=32, dtype=torch.float64)
    call = Call(q, k, v, axial(grid(30), 32), modulations=every_modulation(g, 30, 30, 32, "distinct", batch=2))
    rows = torch.tensor([7, 0, 29], device=DEVICE)
    out, lse = reference.run(q, k, v, call.planned().resolved, 32**-0.5, True, queries=rows)
    expected, expected_lse = call.run("eager")
    assert_close(out, expected[:, rows], out)
    assert_close(lse, expected_lse[:, :, rows], lse)


def test_far_positions_keep_their_precision():
    """Float64 angles: position 100000 is as good as position 0, in float32 too."""
    q, k, v = tensors(generator(14), queries=30, heads=1, dim=32, dtype=torch.float32)
    near, far = (axial(grid(30) + offset, 32) for offset in (0, 100_000))
    scale = [fr.QueryScale(scales(generator(14), "levels", 30))]
    exact, _ = Call(q, k, v, near, modulations=scale).exact()
    out, _ = Call(q, k, v, far, modulations=scale).run("eager")
    assert_close(out, exact, Call(q, k, v, near, modulations=scale).low()[0])


def test_half_precision_rounds_where_it_says():
    """The low dtype's error is that of one rounding of q, k and p, not of positions or of the softmax."""
    q, k, v = tensors(generator(15), queries=200, heads=2, dim=64, dtype=torch.bfloat16)
    call = Call(q, k, v, axial(grid(200) + 3000, 64), modulations=[fr.LogitGain(uniform(generator(1), 200))])
    error = (call.low()[0].double() - call.exact()[0]).abs()
    assert float(error.mean()) < 2.0**-9 * float(draw(generator(2), 1000).abs().mean())
