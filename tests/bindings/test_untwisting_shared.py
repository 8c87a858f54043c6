"""Shared attention in every host: batched and kept references against processors written from the formulas."""

from __future__ import annotations

import pytest
import torch
from untwisting_calls import CARRIED, DIALS, STEP, STEPS, apply, call_of, plain_layout, source_of

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS, assert_differ, assert_same
from shared_formulas import Row, band, sharing, watching
from tiny_transformers import TARGET, TEXT, run

from fastrope.bindings.image.rotation import Rotation

NAMES = ("flux", "chroma", "longcat", "ovis", "flux2", "qwen", "z-image")
ALL = pytest.mark.parametrize("host", [TINY_HOSTS[name] for name in NAMES], ids=NAMES)


def lengths(host, carried: str) -> tuple[int, int]:
    """Texts of target and reference; LongCat's positions depend on them, so a batch has one length."""
    short, long = (20, 40) if host.name == "z-image" else (TEXT, TEXT + 3)
    return (short, short) if host.name == "longcat" and carried == "batched" else (short, long)


def dial(name: str) -> float:
    start, end = DIALS[name]
    return start + (end - start) * STEP / (STEPS - 1)


def weights_of(host, axis0="low") -> torch.Tensor:
    return band(dial("s_hf"), dial("s_lf"), DIALS["beta"], host.axes, axis0=axis0)


def by_formulas(host, model, call, reference, own: Row, theirs: Row, **dials) -> torch.Tensor:
    """What the target's call gives, after the reference's by itself; all dials at work unless others are given."""
    dials = dials or dict(weights=weights_of(host), adain=DIALS["adain"])
    with watching(host, model, theirs) as seen:
        run(model, reference)
    with sharing(host, model, own, seen, theirs, **dials):
        return run(model, call)


def expected_of(host, model, call, reference, texts, **dials) -> torch.Tensor:
    own, theirs = (Row.of(host, plain_layout(host, n)) for n in texts)
    return by_formulas(host, model, call, reference, own, theirs, **dials)


# ---- calls -----------------------------------------------------------------------------------------------------------


@ALL
@CARRIED
@pytest.mark.parametrize("rotation", ["op", "host"])
def test_shared_attention_follows_the_formulas(host, carried, rotation):
    """Two targets, one reference, texts of different length either way round, an odd grid, every dial at work."""
    model = host.build().double()
    for texts in (lengths(host, carried), lengths(host, carried)[::-1]):
        call, reference = call_of(host, texts[0], 2), call_of(host, texts[1], 1)
        stock = run(model, call)
        expected = expected_of(host, model, call, reference, texts)
        with apply(model, carried, source_of(host, reference), fr.UntwistingRoPE(**DIALS), rotation=rotation):
            out = run(model, call)
            assert out.shape == stock.shape
        assert_same(out, expected, 1e-10 if rotation == "op" else 1e-5)
        assert_differ(out, stock)
        assert torch.equal(run(model, call), stock)


@ALL
@CARRIED
def test_all_weights_one_is_plain_shared_attention(host, carried):
    """Three targets see two references, in some layers."""
    model, texts = host.build().double(), lengths(host, carried)
    call, reference = call_of(host, texts[0], 3), call_of(host, texts[1], 2)
    expected = expected_of(host, model, call, reference, texts, layers={0, 2})
    method = fr.UntwistingRoPE(s_hf=1.0, s_lf=1.0, axis0=1.0, adain=0.0, layers={0, 2})
    site = fr.Site(fr.TokenLayout(5, (3, 5), shared=[(3, 5)]))
    assert method.modulations(site) == []
    with apply(model, carried, source_of(host, reference), method):
        assert_same(run(model, call), expected)  # other layers are the host's own, which rotates in float32


@ALL
def test_the_references_rows_are_what_it_is_alone(host):
    model, texts = host.build().double(), lengths(host, "batched")
    call, reference = call_of(host, texts[0], 2), call_of(host, texts[1], 2)
    whole = []

    def see(module, args, output):
        whole.append(torch.stack(output[0]) if isinstance(output[0], list) else output[0])

    alone = run(model, reference)
    watch = model.register_forward_hook(see)
    with apply(model, "batched", source_of(host, reference), fr.UntwistingRoPE(**DIALS)):
        out = run(model, call)
    watch.remove()
    assert len(whole[0]) == 4
    assert torch.equal(whole[0][:2], out)
    assert_same(whole[0][2:], alone)


@ALL
def test_kept_equals_batched_and_is_made_once(host):
    """Also for other targets, batch sizes, texts and dials: nothing runs again."""
    model, texts = host.build().double(), lengths(host, "batched")
    reference = call_of(host, texts[1], 1)
    source, calls = source_of(host, reference), []
    cache = fr.ReferenceCache(source)
    watch = model.register_forward_hook(lambda *_: calls.append(1))
    for batch, dials in ((2, DIALS), (1, DIALS), (3, {"adain": 0.0, "axis0": "match"})):
        call = call_of(host, texts[0], batch)
        with apply(model, "batched", source, fr.UntwistingRoPE(**dials)):
            expected = run(model, call)
        calls.clear()
        with fr.apply(model, fr.UntwistingRoPE(**dials), reference=cache) as handle:
            handle.set_step(STEP, STEPS)
            assert_same(run(model, call), expected, 1e-10)
        assert len(calls) == (2 if batch == 2 else 1)
    watch.remove()
    assert len(cache) == 1
    count, tokens, width = len(host.attentions(model)), TARGET[0] * TARGET[1], 2 * 16
    assert cache.nbytes == 8 * count * (2 * tokens * width + 4 * width)


@pytest.mark.parametrize("reference", ["batched", "kept", "native"])
def test_angles_are_moved_once(reference, monkeypatch):
    """To a device, if layers see rotated keys: not by every layer, nor in every step."""
    host, moving, real = TINY_HOSTS["flux"], [], Rotation._of

    def see(self, span, device):
        moving.append(self)
        return real(self, span, device)

    monkeypatch.setattr(Rotation, "_of", see)
    model = host.build().double()
    if reference == "native":
        method, given = fr.UntwistingRoPE(**DIALS, reference=0), None
        call = host.call(fr.TokenLayout(5, TARGET, [TARGET]), batch=2)
    else:
        method, call, given = fr.UntwistingRoPE(**DIALS), call_of(host, 5, 2), source_of(host, call_of(host, 5, 1))
        given = given if reference == "batched" else fr.ReferenceCache(given)
    with fr.apply(model, method, reference=given, rotation="host") as handle:
        for step in range(STEPS):
            handle.set_step(step, STEPS)
            run(model, call)
    assert len(moving) > STEPS * len(host.attentions(model))
    assert len(set(map(id, moving))) == (1 if reference == "native" else 2)  # those of the target, of the reference


def test_kept_for_more_layers_when_more_are_asked_for():
    host = TINY_HOSTS["flux"]
    model, call, reference = host.build().double(), call_of(host, 5, 1), call_of(host, 5, 1)
    cache = fr.ReferenceCache(source_of(host, reference))
    both = []
    for blocks in ("single", None):
        with fr.apply(model, fr.UntwistingRoPE(blocks=blocks), reference=cache) as handle:
            handle.set_step(0, 2)
            both.append(run(model, call))
            both.append(len(next(iter(cache._snapshots.values())).layers))
    assert both[1::2] == [2, 4]
    fresh = fr.ReferenceCache(cache.source)
    with fr.apply(model, fr.UntwistingRoPE(), reference=fresh) as handle:
        handle.set_step(0, 2)
        assert_same(both[2], run(model, call))  # the first layers kept ran after the host's own, in float32
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "z-image"])
def test_a_kept_reference_of_another_grid(name):
    host, grid = TINY_HOSTS[name], (5, 2)
    model = host.build().double()
    call, reference = call_of(host, 7, 2), call_of(host, 7, 1, grid)
    own, theirs = (Row.of(host, plain_layout(host, 7, g)) for g in (TARGET, grid))
    expected = by_formulas(host, model, call, reference, own, theirs)
    source = source_of(host, reference)
    placed = {key: reference[key] for key in ("img_ids", "img_shapes") if key in reference}
    source = fr.Reference(source.latents, {**source.arguments, **placed})
    with apply(model, "kept", source, fr.UntwistingRoPE(**DIALS)):
        assert_same(run(model, call), expected, 1e-10)
    with (
        apply(model, "batched", source, fr.UntwistingRoPE(**DIALS)),
        pytest.raises(ValueError, match=r"^reference\.latents: expected .* or a fastrope\.ReferenceCache"),
    ):
        run(model, call)


@CARRIED
def test_a_kept_reference_serves_either_rotation(carried):
    host = TINY_HOSTS["flux"]
    model, call, reference = host.build().double(), call_of(host, 5, 2), call_of(host, 6, 1)
    cache, found = fr.ReferenceCache(source_of(host, reference), device="cpu"), []
    for rotation in ("op", "host", "op"):
        with fr.apply(model, fr.UntwistingRoPE(), reference=cache, rotation=rotation) as handle:
            handle.set_step(0, 2)
            found.append(run(model, call))
    assert_same(found[1], found[0])
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("name", ["qwen", "chroma"])
@CARRIED
def test_masked_texts(name, carried):
    """A target's prompt and the reference's are shorter than their neighbours in the batch."""
    host = TINY_HOSTS[name]
    model = host.build().double()
    texts = (TEXT, TEXT + 3)
    call, reference = call_of(host, texts[0], 2), call_of(host, texts[1], 2)
    rows = []
    for each, length, hidden in ((call, texts[0], 2), (reference, texts[1], 1)):
        layout = plain_layout(host, length)
        mask = torch.ones(2, len(layout), dtype=torch.bool)
        mask[1, length - hidden : length] = False
        joint = name == "chroma"
        each["attention_mask" if joint else "encoder_hidden_states_mask"] = mask if joint else mask[:, :length]
        rows.append(Row(layout, Row.of(host, layout).positions, mask))
    expected = by_formulas(host, model, call, reference, *rows)
    with apply(model, carried, source_of(host, reference), fr.UntwistingRoPE(**DIALS)):
        assert_same(run(model, call), expected, 1e-10)


@CARRIED
def test_masks_that_the_host_adds_to_the_logits(carried):
    """Chroma's pipelines hand them over as numbers; keys of the reference are outside."""
    host = TINY_HOSTS["chroma"]
    model, layout = host.build().double(), plain_layout(host)
    call, reference = call_of(host, TEXT, 2), call_of(host, TEXT, 2)
    rows = []
    for each, hidden in ((call, 2), (reference, 1)):
        mask = torch.ones(2, len(layout), dtype=torch.bool)
        mask[1, TEXT - hidden : TEXT] = False
        each["attention_mask"] = mask.double()
        rows.append(Row(layout, Row.of(host, layout).positions, bonus=mask))
    expected = by_formulas(host, model, call, reference, *rows)
    for rotation in ("op", "host"):
        with apply(model, carried, source_of(host, reference), fr.UntwistingRoPE(**DIALS), rotation=rotation):
            assert_same(run(model, call), expected, 1e-10 if rotation == "op" else 1e-5)
    call["attention_mask"] = call["attention_mask"].bool()
    with apply(model, carried, source_of(host, reference), fr.UntwistingRoPE(**DIALS)):
        if carried == "kept":  # each has its own
            assert_differ(run(model, call), expected)
        else:
            with pytest.raises(NotImplementedError, match=r"^attention_mask: expected bool masks, or floating-point"):
                run(model, call)


@CARRIED
def test_captions_of_different_length_in_a_batch(carried):
    """Z-Image: positions of the target's picture differ from row to row, and from the reference's."""
    host = TINY_HOSTS["z-image"]
    model = host.build().double()
    captions = [40, 7, 33]
    call = host.call(plain_layout(host, 40), batch=3, captions=captions)
    reference = call_of(host, 70, 1)
    layout, theirs = plain_layout(host, 64), Row.of(host, plain_layout(host, 96))
    positions, mask = torch.zeros(3, len(layout), 3), torch.zeros(3, len(layout), dtype=torch.bool)
    for n, length in enumerate(captions):
        own = plain_layout(host, length).positions("z-image")
        positions[n, : len(own)], mask[n, : len(own)] = own, True
    expected = by_formulas(host, model, call, reference, Row(layout, positions, mask), theirs)
    with apply(model, carried, source_of(host, reference), fr.UntwistingRoPE(**DIALS)):
        assert_same(run(model, call), expected, 1e-10)


@CARRIED
def test_other_modulations_keep_to_the_targets_own_sequence(carried):
    """Open and negative bounds end where the sequence ends; the reference's rows stay plain."""
    host = TINY_HOSTS["flux"]
    model, call, reference = host.build().double(), call_of(host, 5, 2), call_of(host, 5, 1)
    layout = plain_layout(host)
    both = [fr.KeyBias(torch.linspace(-1, 1, 20)), fr.ValueGain(torch.linspace(-1, 1, 10), keys=slice(10, 20))]
    gain = torch.full((20,), 1.3)
    written = [fr.BiasDelta(1.2, 0.6, keys=layout.text), fr.LogitGain(gain, keys=slice(10, 20)), *both]
    open_ended = [fr.BiasDelta(1.2, 0.6, keys=slice(-20, 5)), fr.LogitGain(gain, keys=slice(-10, None)), *both]
    boolean = torch.arange(20) >= 10
    masked = [written[0], fr.LogitGain(gain, keys=boolean), both[0], fr.ValueGain(both[1].gain, keys=boolean)]
    source, found = source_of(host, reference), []
    for mods in (written, open_ended, masked, []):
        with apply(model, carried, source, fr.UntwistingRoPE(**DIALS), mods):
            found.append(run(model, call))
    assert_same(found[1], found[0], 1e-12)
    assert_same(found[2], found[0], 1e-12)
    assert_differ(found[3], found[0])


@CARRIED
def test_bounds_before_the_targets_sequence_are_refused(carried):
    """As without a reference; its keys are not what they count back to."""
    host = TINY_HOSTS["flux"]
    model, call, reference = host.build().double(), call_of(host, 5, 2), call_of(host, 5, 1)
    for keys in (slice(None, -21), slice(-21, 5)):
        modulation = fr.BiasDelta(1.2, 0.6, keys=keys)
        expected = r"^BiasDelta\.keys: expected a slice within 20 keys"
        with fr.apply(model, modulation), pytest.raises(ValueError, match=expected):
            run(model, call)
        with (
            apply(model, carried, source_of(host, reference), fr.UntwistingRoPE(**DIALS), modulation),
            pytest.raises(ValueError, match=expected),
        ):
            run(model, call)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_a_target_takes_on_the_references_statistics():
    """Strength 1 gives the reference's mean and deviation, up to the epsilon; 0 changes nothing."""
    x, y = torch.randn(2, 30, 2, 8).double() * 3 + 1, torch.randn(1, 50, 2, 8).double() - 2
    goal = fr.sharing.Statistics.of(y)
    out = fr.sharing.adain(x, goal, 1.0)
    torch.testing.assert_close(out.mean(dim=1, keepdim=True), goal.mean.expand(2, -1, -1, -1))
    torch.testing.assert_close(
        out.std(dim=1, correction=0, keepdim=True), goal.std.expand(2, -1, -1, -1), rtol=1e-5, atol=0
    )
    assert torch.equal(fr.sharing.adain(x, goal, 0.0), x)
    half = fr.sharing.adain(x.bfloat16(), goal, 0.5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), (x + out) / 2, rtol=0.02, atol=0.05)
