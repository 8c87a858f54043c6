"""Every backend against the reference in float64, under the one tolerance rule, over any composition of modulations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from numerics import (
    DEVICE,
    LAYOUTS,
    SCALES,
    Call,
    Tally,
    axes_of,
    axial,
    biases_and_values,
    check,
    disjoint_sets,
    draw,
    every_modulation,
    generator,
    grid,
    key_masks,
    key_set,
    lay_out,
    many_signatures,
    scales,
    scatter,
    skip_unless_runnable,
    tensors,
    uniform,
)  # fmt: skip
from strategies import calls

import fastrope as fr
from fastrope import device as devices

INTERPRETED = devices.interpreted()
WIDE, HALF = (torch.float64, torch.float32), (torch.float16, torch.bfloat16)
# bfloat16 comes out wrong of triton's interpreter, and float64 has no kernel.
TRITON = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, *HALF)
# The interpreter takes about a millisecond per tile and operation: there the named cases run in float32, which is the
# strictest, and any composition in both.
SDPA_TARGETS = [("eager", torch.float64)] + [("sdpa", dtype) for dtype in WIDE + HALF]
TRITON_TARGETS = [("triton", dtype) for dtype in TRITON]
TARGETS = SDPA_TARGETS + (TRITON_TARGETS[:1] if INTERPRETED else TRITON_TARGETS)
TOKENS = 70 if INTERPRETED else 150


def over(pairs):
    names = [f"{backend}-{str(dtype).removeprefix('torch.')}" for backend, dtype in pairs]
    return pytest.mark.parametrize(("backend", "dtype"), pairs, ids=names)


targets = over(TARGETS)


@pytest.fixture(autouse=True)
def _runnable(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    skip_unless_runnable(parameters.get("backend"))


def fewest_buckets(backend: str, kind: str | None) -> str | None:
    """Two buckets for six: each is packed and attended alike, which takes the interpreter seconds."""
    return "two" if backend == "triton" and INTERPRETED and kind == "levels" else kind


# ---- any composition -------------------------------------------------------------------------------------------------

SMALL = {"tokens": (1, 2, 17, 33, 66), "dims": (16, 80), "heads": ((1, 1), (1, 2))}


@over([*SDPA_TARGETS[1:], *TRITON_TARGETS])
def test_any_composition(backend, dtype):
    tally = Tally()
    interpreted = backend == "triton" and INTERPRETED

    @settings(max_examples=10 if interpreted else 40)
    @given(calls(dtype, **SMALL) if interpreted else calls(dtype))
    def run(call):
        check(call, backend, tally)

    run()
    tally.check(f"{backend} {dtype}")


# ---- named cases -----------------------------------------------------------------------------------------------------


def picture(dtype, dim=64, tokens=TOKENS, reference=36, text=6, batch=1, heads=1, seed=0, **tensor_options):
    """``[text | target | reference]`` as in an image editor, and the generator its values come from."""
    g = generator(seed)
    target = tokens - reference
    positions = torch.cat([grid(target, text), grid(reference, frame=1)])
    q, k, v = tensors(g, batch=batch, queries=tokens, heads=heads, dim=dim, dtype=dtype, **tensor_options)
    return g, q, k, v, axial(positions, dim), slice(target, None)


@targets
@pytest.mark.parametrize("kind", SCALES)
def test_query_scale(backend, dtype, kind):
    g, q, k, v, rope, reference = picture(dtype)
    scale = fr.QueryScale(scales(g, kind, q.shape[1]), keys=reference, axes=(1, 2))
    call = Call(q, k, v, rope, modulations=[scale], label=kind)
    counts = call.planned().lowered.scales.counts[0]
    expected = {"levels": counts[0] == 0 and len(counts) == 7, "few": counts[0] == 0, "zero": counts[0] == 0}
    assert expected.get(kind, counts[0] > 8), counts
    check(call, backend)


@targets
def test_scale_buckets_beside_per_query_scales(backend, dtype):
    g, q, k, v, rope, reference = picture(dtype, tokens=210)
    r = uniform(g, 210)
    r[torch.randperm(210, generator=g)[:140]] = 0.75
    call = Call(q, k, v, rope, modulations=[fr.QueryScale(r, keys=reference, axes=(1, 2))], label="mixed")
    lowered = call.planned().lowered
    assert lowered.num_buckets == 1
    assert lowered.scales.counts[0][0] == 70
    check(call, backend)


@targets
@pytest.mark.parametrize("kind", ["levels", "distinct"])
def test_query_scale_per_batch_row(backend, dtype, kind):
    g, q, k, v, rope, reference = picture(dtype, tokens=48, reference=25, batch=2)
    check(Call(q, k, v, rope, modulations=[fr.QueryScale(scales(g, kind, 48, batch=2), reference)]), backend)


@targets
@pytest.mark.parametrize("axes", [(0,), (2,), (0, 1), (2, 0, 1)])
def test_query_scale_of_some_axes(backend, dtype, axes):
    g, q, k, v, rope, reference = picture(dtype, tokens=60, reference=36)
    check(Call(q, k, v, rope, modulations=[fr.QueryScale(scales(g, "distinct", 60), reference, axes)]), backend)


@targets
@pytest.mark.parametrize("kind", ["levels", "distinct"])
@pytest.mark.parametrize("batched", [False, True])
def test_positions_without_structure(backend, dtype, kind, batched):
    g = generator(3)
    q, k, v = tensors(g, batch=2 if batched else 1, queries=41, heads=1, dim=64, dtype=dtype)
    rope = axial(scatter(g, 41, batch=2 if batched else None), 64)
    check(Call(q, k, v, rope, modulations=[fr.QueryScale(scales(g, kind, 41), slice(10, None))]), backend)


@targets
@pytest.mark.parametrize("kind", ["levels", "distinct"])
def test_group_partly_under_a_scale(backend, dtype, kind):
    """The mean then depends on the query: it runs over keys turned by r_i and keys that are not."""
    g, q, k, v, rope, _ = picture(dtype, tokens=110)
    modulations = [
        fr.QueryScale(scales(g, kind, 110), keys=slice(60, 100), axes=(1, 2)),
        fr.BiasDelta(1.3, 0.7, keys=slice(40, 80)),
        fr.BiasDelta(0.6, 1.2, keys=slice(85, 95)),
    ]
    check(Call(q, k, v, rope, modulations=modulations, label="partial group"), backend)


@over([*SDPA_TARGETS, *TRITON_TARGETS])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_head_dims(backend, dtype, dim, pairing):
    g = generator(dim)
    q, k, v = tensors(g, queries=40, heads=2, key_heads=1, dim=dim, dtype=dtype)
    modulations = every_modulation(g, 40, 40, dim, "zero" if backend == "triton" else "levels")
    call = Call(q, k, v, axial(grid(40, 4), dim, pairing), modulations=modulations, label=pairing)
    check(call, backend)


@targets
@pytest.mark.parametrize("length", [1, 113, 239, 1023])
def test_lengths(backend, dtype, length):
    if backend == "triton" and INTERPRETED and length > 239:
        pytest.skip("the interpreter takes minutes")
    g = generator(length)
    q, k, v = tensors(g, queries=length, heads=1, dim=64, dtype=dtype)
    check(Call(q, k, v, axial(grid(length), 64), label="plain"), backend)
    kind = "zero" if backend == "triton" else "levels"
    check(Call(q, k, v, axial(grid(length), 64), modulations=every_modulation(g, length, length, 64, kind)), backend)


@targets
@pytest.mark.parametrize(("queries", "keys"), [(1, 130), (130, 1), (33, 100)])
@pytest.mark.parametrize("kind", ["levels", "distinct"])
def test_keys_of_other_tokens(backend, dtype, queries, keys, kind):
    g = generator(5)
    q, k, v = tensors(g, queries=queries, keys=keys, heads=1, dim=64, dtype=dtype)
    modulations = every_modulation(g, queries, keys, 64, kind)
    call = Call(q, k, v, axial(grid(queries), 64), axial(grid(keys, frame=1), 64, applied=True), modulations)
    check(call, backend)


@targets
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, dtype, layout):
    """What lies around a strided tensor is NaN, and none of it reaches the result."""
    g = generator(7)
    q, k, v = tensors(g, batch=2, queries=37, heads=2, dim=24, dtype=dtype, layout=layout)
    check(Call(q, k, v, axial(grid(37), 24), label=layout), backend)
    check(Call(q, k, v, axial(grid(37), 24), modulations=every_modulation(g, 37, 37, 24, "zero")), backend)
    check(Call(q, k, v, modulations=[fr.LogitGain(uniform(g, 37))]), backend)  # keys read where they lie


@targets
@pytest.mark.parametrize("kind", [None, "levels", "distinct"])
@pytest.mark.parametrize("mask", ["random", "row", "shared"])
def test_key_mask(backend, dtype, kind, mask):
    kind = fewest_buckets(backend, kind)
    g = generator(11)
    q, k, v = tensors(g, batch=2, queries=50, heads=1, dim=16, dtype=dtype)
    key_mask = key_masks(g, mask, 2, 50)
    hidden = ~key_mask.expand(2, -1)
    k, v = k.masked_fill(hidden[..., None, None], torch.nan), v.masked_fill(hidden[..., None, None], torch.inf)
    modulations = every_modulation(g, 50, 50, 16, kind) if kind else []
    call = Call(q, k, v, axial(grid(50), 16), modulations=modulations, key_mask=key_mask, label=mask)
    out, lse = check(call, backend)
    if mask == "row":
        assert not out[-1].any()
        assert bool((lse[-1] == -torch.inf).all())


@targets
def test_group_without_any_unmasked_key(backend, dtype):
    _, q, k, v, rope, _ = picture(dtype, tokens=40, reference=16, batch=2)
    key_mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    key_mask[1, 10:20] = False
    check(Call(q, k, v, rope, modulations=[fr.BiasDelta(2.0, 0.5, slice(10, 20))], key_mask=key_mask), backend)


@targets
@pytest.mark.parametrize("applied", [None, False, True])
def test_scattered_key_sets(backend, dtype, applied):
    """More runs of keys than a plan keeps in place, with and without a rotation that has to reach the sorted keys."""
    g = generator(13)
    q, k, v = tensors(g, batch=2, queries=90, heads=1, dim=64, dtype=dtype)
    rope = None if applied is None else axial(grid(90), 64, applied=applied)
    modulations = [fr.LogitGain(uniform(g, 2, 90, low=-1, high=1.5), key_set(g, "mask", 90))]
    modulations += [fr.BiasDelta(1.2, 0.9, keys) for keys in disjoint_sets(g, 2, 90)]
    call = Call(q, k, v, rope, modulations=modulations, key_mask=key_masks(g, "random", 2, 90), label=f"{applied}")
    assert call.planned().lowered.keys.order is not None
    check(call, backend)


@targets
def test_gain_alone_costs_no_precision(backend, dtype):
    """Nothing is rounded before the softmax here, so a gain rounded into the queries would show at once."""
    g = generator(17)
    q, k, v = tensors(g, queries=130, heads=2, dim=64, dtype=dtype)
    check(Call(q, k, v, modulations=[fr.LogitGain(uniform(g, 130, low=-1.0, high=3.0))], label="gain"), backend)


@targets
@pytest.mark.parametrize("scale", [None, -0.3, 0.0, 1e-3])
@pytest.mark.parametrize("kind", [None, "levels", "distinct"])
def test_biases_and_values(backend, dtype, scale, kind):
    """Hidden keys that hold NaN, segments that some queries do not see, and a query that sees nothing."""
    interpreted = backend == "triton" and INTERPRETED
    if interpreted and scale != {"levels": -0.3}.get(kind):
        pytest.skip("the scale is a number in the kernels")
    g = generator(31)
    heads = 2 if interpreted else 4
    q, k, v = tensors(g, batch=2, queries=40, heads=heads, key_heads=heads // 2, dim=16, dtype=dtype)
    modulations = biases_and_values(g, 40, 40, batch=2) + (every_modulation(g, 40, 40, 16, kind) if kind else [])
    sees_nothing = torch.zeros(40, device=DEVICE)
    sees_nothing[7] = -torch.inf
    modulations.append(fr.LogitBias(sees_nothing))
    hidden = next(m.bias for m in modulations if isinstance(m, fr.KeyBias)) == -torch.inf
    k, v = k.masked_fill(hidden[:, None, None], torch.nan), v.masked_fill(hidden[:, None, None], torch.inf)
    call = Call(q, k, v, axial(grid(40), 16), modulations=modulations, scale=scale, label=f"scale {scale} {kind}")
    out, lse = check(call, backend)
    assert not out[:, 7].any()
    assert bool((lse[:, :, 7] == -torch.inf).all())


@targets
def test_large_biases(backend, dtype):
    """Beyond what 8 or 11 bits tell apart: a bias is a float32 number in every dtype."""
    g = generator(37)
    q, k, v = tensors(g, queries=30, dim=16, dtype=dtype)
    b = 150 + uniform(g, 30)
    check(Call(q, k, v, modulations=[fr.LogitBias(b, slice(9, 20)), fr.KeyBias(140 + uniform(g, 30))]), backend)
    far = torch.where(torch.arange(30, device=DEVICE) < 4, -1e9, 0.0), torch.where(b > 150.5, -3e6, 0.5)
    check(Call(q, k, v, modulations=[fr.KeyBias(far[0]), fr.LogitBias(far[1], slice(9, 20))], label="far"), backend)


@over(SDPA_TARGETS)
def test_biases_are_rounded_once(backend, dtype):
    """Torch's factor comes after its sum, in which biases are. With many rows the rule tells means apart."""
    g = generator(41)
    q, k, v = tensors(g, batch=2, queries=1000, keys=300, heads=4, dim=16, dtype=dtype)
    biases = [fr.LogitBias(-0.7), *(fr.KeyBias(uniform(g, 300, high=4)) for _ in range(2))]
    check(Call(q, k, v, scale=0.05, modulations=biases, label="biases"), backend)


@over(SDPA_TARGETS)
def test_parts_are_weighted_exactly(backend, dtype):
    """Three passes, each with its log-sum-exp. Rounded to float32, those alone cost a third more of mean error."""
    g = generator(41)
    q, k, v = tensors(g, batch=2, queries=1000, keys=300, heads=4, dim=16, dtype=dtype)
    gains = [fr.LogitGain(uniform(g, 1000, low=0.5, high=1.5), keys=slice(n, n + 25)) for n in range(0, 300, 25)]
    check(Call(q, k, v, scale=0.05, modulations=gains, label="parts"), backend)


@targets
def test_values_may_be_large(backend, dtype):
    """Logits of some hundreds: the softmax must subtract its maximum."""
    g = generator(19)
    q, k, v = tensors(g, queries=33, heads=1, dim=64, dtype=dtype)
    check(Call(q * 16, lay_out(k * 16, "fused"), v, axial(grid(33), 64), label="large"), backend)


@targets
def test_angles_of_float32_and_no_axes(backend, dtype):
    g = generator(23)
    q, k, v = tensors(g, queries=33, heads=1, dim=64, dtype=dtype)
    rope = fr.RoPE(draw(g, 33, 32) * 20 * 0.8 ** torch.arange(32, device=DEVICE), pairing="half")
    check(Call(q, k, v, rope, modulations=[fr.QueryScale(scales(g, "distinct", 33))]), backend)


@targets
def test_one_axis_and_axes_without_channels(backend, dtype):
    g = generator(29)
    q, k, v = tensors(g, queries=60, heads=1, dim=32, dtype=dtype)
    modulations = [fr.QueryScale(scales(g, "distinct", 60), keys=slice(5, 50))]
    line = torch.arange(60, device=DEVICE)[:, None]
    check(Call(q, k, v, fr.RoPE.axial(line, (32,)), modulations=modulations, label="line"), backend)
    flat = fr.RoPE.axial(grid(60), (32, 0, 0))  # every position of axis 0 is the same: nothing to patch
    check(Call(q, k, v, flat, modulations=modulations, label="flat"), backend)
    assert axes_of(32)[0] > 0


@targets
@pytest.mark.parametrize("kind", ["levels", "distinct", None])
def test_more_key_signatures_than_one_launch_holds(backend, dtype, kind):
    g = generator(11)
    tokens, heads = (24, 1) if INTERPRETED else (300, 4)
    q, k, v = tensors(g, batch=2, queries=tokens, heads=heads, key_heads=(heads + 1) // 2, dim=16, dtype=dtype)
    modulations = many_signatures(g, tokens, tokens, 16, fewest_buckets(backend, kind))
    call = Call(q, k, v, axial(grid(tokens, 4), 16), None, modulations, key_masks(g, "row", 2, tokens), label=f"{kind}")
    assert len(call.planned().lowered.passes) > 2
    check(call, backend)
