"""Untwisting RoPE in real pipelines with random weights: guidance, steps, native references, compilers, refusals."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from untwisting_calls import apply, call_of, plain_layout, source_of
from untwisting_runs import CARRIED, DIALS, GENERATE, NAMES, STEPS, Path, texts_of, to_float
from widening import widen

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS, assert_differ, assert_same
from shared_formulas import Row, band, sharing, watching
from tiny_transformers import TARGET, TEXT, run

from fastrope import device as devices


@contextlib.contextmanager
def by_formulas(host, pipe, source: Path, own_call: dict):
    """The pipeline with every call of its transformer by formulas: the reference first, by itself, then the target."""
    model, image, forward = (
        pipe.transformer,
        "x" if host.name == "z-image" else "hidden_states",
        pipe.transformer.forward,
    )
    clock = "t" if host.name == "z-image" else "timestep"
    text_name = "cap_feats" if host.name == "z-image" else "encoder_hidden_states"
    seen_steps = []

    def shared(*args, **kwargs):
        if host.name == "z-image":
            kwargs = dict(zip(("x", "t", "cap_feats"), args, strict=False)) | kwargs
        sigmas = pipe.scheduler.sigmas
        time = float(kwargs[clock].flatten()[0])
        time = 1 - time if host.name == "z-image" else time
        step = int((sigmas[:-1] - time).abs().argmin())
        seen_steps.append(step)
        latents = (1 - sigmas[step]) * source.clean + sigmas[step] * source.noise
        alone = own_call | {image: list(latents) if host.name == "z-image" else latents}
        alone[clock] = kwargs[clock][:1].expand(len(latents))
        if kwargs.get("guidance") is not None:
            alone["guidance"] = kwargs["guidance"][:1].expand(len(latents))
        elif "guidance" in alone:
            alone["guidance"] = None
        text = kwargs[text_name]
        rows = [Row.of(host, plain_layout(host, len(source.arguments[text_name][0])))]
        rows.append(Row.of(host, plain_layout(host, len(text[0]))))
        progress = step / (len(sigmas) - 2)
        high, low = (DIALS[name][0] + (DIALS[name][1] - DIALS[name][0]) * progress for name in ("s_hf", "s_lf"))
        with watching(host, model, rows[0]) as seen:
            forward(**alone)
        weights = band(high, low, DIALS["beta"], host.axes)
        with sharing(host, model, rows[1], seen, rows[0], weights=weights, adain=DIALS["adain"]):
            return forward(**kwargs)

    model.forward = shared
    try:
        yield seen_steps
    finally:
        del model.forward


@CARRIED
@pytest.mark.parametrize("name", NAMES)
def test_pipelines_follow_the_formulas(name, carried):
    """Two targets, both branches of guidance where there are two, prompts of different length, a schedule of steps."""
    host = TINY_HOSTS[name]
    pipe, generate = host.pipeline(), GENERATE.get(name, host.generate)
    positive, negative, own = texts_of(host)
    call = call_of(host, own, 1)
    call = {key: to_float(value) for key, value in call.items()}
    source = Path(call, "x" if name == "z-image" else "hidden_states")
    stock = generate(pipe, STEPS, 2, (positive, negative))
    with by_formulas(host, pipe, source, call) as steps:
        expected = generate(pipe, STEPS, 2, (positive, negative))
    reference = source if carried == "batched" else fr.ReferenceCache(source)
    calls = []
    watch = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with fr.apply(pipe, fr.UntwistingRoPE(**DIALS), reference=reference):
        out = generate(pipe, STEPS, 2, (positive, negative))
        count = len(calls)
        again = generate(pipe, STEPS, 2, (positive, negative))
    watch.remove()
    assert_same(out, expected, 1e-4)
    assert_differ(out, stock)
    assert torch.equal(again, out)
    assert torch.equal(generate(pipe, STEPS, 2, (positive, negative)), stock)
    sigmas = pipe.scheduler.sigmas.tolist()
    assert source.asked[: len(steps)] == [(step, sigmas[step]) for step in steps]
    extra = STEPS if carried == "kept" else 0  # one call more per step, whatever the branches, and none again
    assert (count, len(calls)) == (len(steps) + extra, 2 * len(steps) + extra)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_chroma_takes_either_mask(dtype):
    """Its pipelines hand a bool mask over as it is, and anything else as numbers to be added to the logits."""
    host = TINY_HOSTS["chroma"]
    pipe = host.pipeline()
    call = {key: to_float(value) for key, value in call_of(host, TEXT, 1).items()}
    path, mask = Path(call, "hidden_states"), torch.ones(2, TEXT, dtype=dtype)
    mask[:, -2:] = 0
    path.arguments["attention_mask"] = torch.cat([mask[:1], torch.ones(1, math.prod(TARGET), dtype=dtype)], dim=1)
    found = []
    for reference in (path, fr.ReferenceCache(path)):
        with fr.apply(pipe, fr.UntwistingRoPE(**DIALS), reference=reference):
            masks = {"prompt_attention_mask": mask}
            found.append(host.generate(pipe, STEPS, 2, (TEXT, None), **masks))
    assert_same(found[1], found[0], 1e-4)
    assert_differ(found[0], host.generate(pipe, STEPS, 2, (TEXT, None), **masks))


@CARRIED
def test_inference_mode_and_what_was_kept_in_it(carried):
    """Pipelines run in ``no_grad``; users put ``inference_mode`` around them. Kept keys serve either."""
    host = TINY_HOSTS["flux"]
    pipe = host.pipeline()
    call = {key: to_float(value) for key, value in call_of(host, TEXT, 1).items()}
    source = Path(call, "hidden_states")
    reference = source if carried == "batched" else fr.ReferenceCache(source)
    with fr.apply(pipe, fr.UntwistingRoPE(), reference=reference):
        with torch.inference_mode():
            first = host.generate(pipe, STEPS, 1, (TEXT, None)).clone()
        assert torch.equal(host.generate(pipe, STEPS, 1, (TEXT, None)), first)


def test_a_schedule_that_changes_in_place_is_read_again():
    host = TINY_HOSTS["flux"]
    pipe = host.pipeline()
    call = {key: to_float(value) for key, value in call_of(host, TEXT, 1).items()}
    source = Path(call, "hidden_states")
    with fr.apply(pipe, fr.UntwistingRoPE(), reference=source):
        for steps in (2, 3):
            host.generate(pipe, steps, 1, (TEXT, None))
            assert [step for step, _ in source.asked] == list(range(steps))
            assert [sigma for _, sigma in source.asked] == pipe.scheduler.sigmas[:-1].tolist()
            source.asked.clear()
        pipe.scheduler.sigmas[0] *= 0.5
        pipe.scheduler._step_index = 0
        pipe._current_timestep = pipe.scheduler.timesteps[0]
        run(pipe.transformer, call)
    assert source.asked == [(0, float(pipe.scheduler.sigmas[0]))]


def test_confined_to_some_steps_and_layers():
    """``fr.At`` around the method: elsewhere the target does not see the reference, and nothing is kept."""
    host = TINY_HOSTS["flux"]
    pipe = host.pipeline()
    call = {key: to_float(value) for key, value in call_of(host, TEXT, 1).items()}
    source, found = Path(call, "hidden_states"), []
    stock = host.generate(pipe, STEPS, 1, (TEXT, None))
    cache = fr.ReferenceCache(source)
    for reference in (source, cache):
        with fr.apply(pipe, fr.At(fr.UntwistingRoPE(), steps=1, layers=[0, 3]), reference=reference):
            found.append(host.generate(pipe, STEPS, 1, (TEXT, None)))
    assert_same(found[1], found[0])
    assert_differ(found[0], stock)
    snapshot = next(iter(cache._snapshots.values()))
    assert (len(cache), set(snapshot.layers)) == (1, {0, 3})
    for reference in (source, cache):
        with fr.apply(pipe, fr.At(fr.UntwistingRoPE(), steps=[]), reference=reference):
            assert_same(host.generate(pipe, STEPS, 1, (TEXT, None)), stock)


@pytest.mark.skipif(not devices.interpreted(), reason="runs the interpreted kernel")
@CARRIED
def test_the_fused_kernel_shares(carried):
    host = TINY_HOSTS["flux"]
    model = host.build()
    call, reference = ({k: to_float(v) for k, v in call_of(host, 5, 1).items()} for _ in range(2))
    found = []
    for backend in ("sdpa", "triton"):
        with apply(model, carried, source_of(host, reference), fr.UntwistingRoPE(**DIALS), backend=backend):
            found.append(run(model, call))
    assert_same(found[1], found[0], 1e-4)


@CARRIED
@pytest.mark.parametrize("name", ["flux", "qwen", "z-image"])
@pytest.mark.parametrize("rotation", ["op", "host"])
def test_half_precision_is_as_good_as_the_hosts(name, carried, rotation):
    """The error of shared bfloat16 attention, against float64 on the same weights, is that of the stock model."""
    host = TINY_HOSTS[name]
    low, exact = host.build().to(torch.bfloat16), host.build().double()
    exact.load_state_dict(low.state_dict())
    text = 20 if name == "z-image" else TEXT
    calls = [call_of(host, text, batch) for batch in (2, 1)]
    calls = [{key: rounded(value) for key, value in call.items()} for call in calls]
    wide = [{key: widen(value) for key, value in call.items()} for call in calls]
    stock = float((run(low, calls[0]).double() - run(exact, wide[0])).abs().max())
    row = Row.of(host, plain_layout(host, text))
    with watching(host, exact, row) as seen:
        run(exact, wide[1])
    weights = band(0.55, 1.25, DIALS["beta"], host.axes)
    with sharing(host, exact, row, seen, row, weights=weights, adain=DIALS["adain"]):
        expected = run(exact, wide[0])
    source = source_of(host, calls[1])
    reference = source if carried == "batched" else fr.ReferenceCache(source)
    with fr.apply(low, fr.UntwistingRoPE(**DIALS), reference=reference, rotation=rotation) as handle:
        handle.set_step(1, 3)
        error = float((run(low, calls[0]).double() - expected).abs().max())
    print(f"stock {stock:.3g}, shared {error:.3g}")
    assert error < 2.5 * stock


def rounded(value):
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        return [x.bfloat16() for x in value]
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


# ---- the host's own references ---------------------------------------------------------------------------------------


class Restyled:
    """The formulas' attention after AdaIN of the target from a reference of the same sequence."""

    def __init__(self, attend, layout: fr.TokenLayout, index: int, strength: float):
        self.attend, self.layout, self.index, self.strength = attend, layout, index, strength

    def __call__(self, q, k, v):
        made = []
        for x in (q, k):
            own, theirs = x[:, self.layout.target].double(), x[:, self.layout.reference(self.index)].double()
            mean, mean_r = own.mean(1, keepdim=True), theirs.mean(1, keepdim=True)
            std = (own.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
            std_r = (theirs.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
            new = x.clone()
            new[:, self.layout.target] = (
                (1 - self.strength) * own + self.strength * ((own - mean) / std * std_r + mean_r)
            ).to(x.dtype)
            made.append(new)
        return self.attend(*made, v)


@pytest.mark.parametrize("name", ["kontext", "longcat", "flux2", "qwen-edit", "qwen-edit-plus"])
@pytest.mark.parametrize("rotation", ["op", "host"])
def test_native_references_need_no_second_row(name, rotation):
    host = TINY_HOSTS[name]
    model, call = host.build().double(), host.call(host.layout)
    index = len(host.layout.reference_grids) - 1
    mods = [fr.BandWeight(band(0.55, 1.25, 2.0, host.axes), keys=host.layout.reference(index))]
    dials = dict(s_hf=(0.2, 0.9), s_lf=(0.9, 1.6), beta=2.0, reference=index)
    stock = run(model, call)
    for adain in (0.0, 0.5):
        attend = host.attend(mods)
        attend = Restyled(attend, host.layout, index, adain) if adain else attend
        with host.by_formulas(model, attend):
            expected = run(model, call)
        with fr.apply(model, fr.UntwistingRoPE(**dials, adain=adain), rotation=rotation) as handle:
            handle.set_step(1, 3)
            out = run(model, call)
        assert_same(out, expected, 1e-10 if rotation == "op" else 1e-5)
        assert_differ(out, stock)


@pytest.mark.parametrize("name", ["kontext", "flux2", "qwen-edit", "qwen-edit-plus"])
def test_native_references_in_pipelines(name):
    """One line on the pipe; neutral weights leave the host's own attention, to the same bits."""
    host = TINY_HOSTS[name]
    pipe = host.pipeline()
    stock = host.generate(pipe, steps=STEPS, lengths=host.lengths)
    with fr.apply(pipe, fr.UntwistingRoPE(reference=0)):
        assert_differ(host.generate(pipe, steps=STEPS, lengths=host.lengths), stock)
    with fr.apply(pipe, fr.UntwistingRoPE(s_hf=1.0, s_lf=1.0, reference=0, adain=0.0)):
        assert torch.equal(host.generate(pipe, steps=STEPS, lengths=host.lengths), stock)


def test_statistics_alone_and_looking_at_a_native_reference():
    """AdaIN without weights; the record sees attention after it."""
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    attend = host.attend([])
    with host.by_formulas(model, Restyled(attend, host.layout, 0, 0.7)):
        expected = run(model, call)
    method = fr.UntwistingRoPE(s_hf=1.0, s_lf=1.0, axis0=1.0, adain=0.7, reference=0)
    with fr.apply(model, method) as handle, handle.inspect(layers=0) as record:
        assert_same(run(model, call), expected, 1e-10)
    weights = attend.weights[0][:, :, host.layout.target]
    mass = float(weights[..., host.layout.reference(0)].sum(-1).mean())
    assert record.looks[0].mass["reference 0"] == pytest.approx(mass, rel=1e-5)
