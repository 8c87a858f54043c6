"""Rescaled positions in bound transformers, against the same model with another rotary table and by the formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
import diffusers
from diffusers_hosts import TINY_HOSTS, assert_differ, assert_same, grag_like, loose_like, positions_of, run
from pages import DOCS, run_snippets
from tiny_transformers import lively

from fastrope.bindings.diffusers import identified
from fastrope.rescaling import Rescaling

ALL = pytest.mark.parametrize("host", TINY_HOSTS.values(), ids=TINY_HOSTS)


class Rescaled:
    """A method that asks for random factors and gains."""

    def __init__(self, pairs: int, gain: bool = True):
        draw = torch.rand(2, pairs, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5
        self.factor, self.gain = draw[0], draw[1] if gain else torch.ones(pairs, dtype=torch.float64)

    def modulations(self, site):
        return []

    def rescaling(self, site):
        return Rescaling(self.factor.tolist(), self.gain.tolist())


@ALL
def test_stock_layers_see_the_rescaled_table(host):
    """What modulates nothing runs the host's own attention, on tables of other frequencies: the same as a modulated
    layer that rotates by our own angles, which the formulas check."""
    model, call, method = host.build(), host.call(host.layout, dtype=torch.float32), Rescaled(sum(host.axes) // 2)
    stock = run(model, call)
    mods = grag_like(host.layout)
    with fr.apply(model, method) as handle:
        alone = run(model, call)
        assert all(attn.processor.unmodulated for _, attn in host.attentions(model))
        handle.update(method, *mods, *loose_like(host.layout))
        modulated = run(model, call)
        handle.update()
        assert torch.equal(run(model, call), stock)
    assert torch.equal(run(model, call), stock), "removed, the embedder is the model's own"
    assert_differ(alone, stock)
    for rotation in ("op", "host"):
        with fr.apply(model, method, mods, loose_like(host.layout), rotation=rotation):
            assert_same(run(model, call), modulated, 1e-5)
    # A modulation that is all but neutral takes the modulated path: the gain and the angles are then ours.
    tiny = fr.BiasDelta(1 + 1e-12, 1.0, keys=slice(0, 2))
    with fr.apply(model, method, tiny):
        assert_same(run(model, call), alone, 1e-5)


@pytest.mark.parametrize("kind", ["ntk", "yarn", "dype"])
def test_high_resolution_is_the_model_with_another_table(kind):
    """FLUX at 3 x 5 tokens as if trained with 2 x 3: its own embedder with scaled base, or scaled ids."""
    host = TINY_HOSTS["flux"]
    model, call = host.build(), host.call(host.layout, dtype=torch.float32)
    method = fr.HighResolution(kind, trained=(2, 3))
    seen = []

    def spy(embedder, args, output):
        seen.append(output)

    with fr.apply(model, method) as handle:
        handle.set_step(3, 10)
        model.pos_embed.register_forward_hook(spy)
        run(model, call)
    sigma = float(call["timestep"].flatten()[0]) if "timestep" in call else None
    site = fr.Site(host.layout, step=3, num_steps=10, axes_dim=host.axes, theta=host.theta, sigma=sigma)
    asked = method.rescaling(site)
    angles = fr.RoPE.axial(positions_of(host.layout, "flux").double(), host.axes).angles * torch.tensor(asked.factor)
    gain = torch.tensor(asked.gain)
    cos, sin = seen[-1]
    torch.testing.assert_close(cos[:, ::2].double(), gain * angles.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[:, 1::2].double(), gain * angles.sin(), atol=1e-6, rtol=0)
    assert len(set(asked.gain)) == (1 if kind == "ntk" else 3)


def test_the_noise_level_of_a_pipeline_reaches_the_method():
    host, seen = TINY_HOSTS["flux"], []

    class Spy(Rescaled):
        def rescaling(self, site):
            seen.append((site.step, site.sigma))

    pipe = host.pipeline()
    with fr.apply(pipe, Spy(8)):
        host.generate(pipe, steps=3)
    sigmas = pipe.scheduler.sigmas[:3].tolist()
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [sigma for _, sigma in seen] == pytest.approx(sigmas)


def test_what_cannot_be_rescaled_is_refused():
    host = TINY_HOSTS["flux"]
    model = host.build()
    with pytest.raises(ValueError, match="a model with an axis of frames"), fr.apply(model, fr.LongVideo(99)):
        run(model, host.call(host.layout, dtype=torch.float32))
    compiled = torch.compile(model)
    with pytest.raises(NotImplementedError, match="not compiled as a whole"):
        fr.apply(compiled, fr.HighResolution("ntk"))
    model.pos_embed.register_forward_hook(lambda m, a, out: (out[0] * 0, out[1]))
    fr.apply(model, fr.HighResolution("ntk", trained=(2, 2)))
    with pytest.raises(NotImplementedError, match="expected the rotary embedding"):
        run(model, host.call(host.layout, dtype=torch.float32))


def test_compiled_blocks_follow_the_steps():
    host = TINY_HOSTS["flux"]
    model, call = host.build(), host.call(host.layout, dtype=torch.float32)
    method = fr.HighResolution("dype-ntk", trained=(2, 2))
    with fr.apply(model, method) as handle:
        expected = []
        for time in (0.9, 0.3):
            call["timestep"] = torch.full_like(call["timestep"], time)
            expected.append(run(model, call))
        assert_differ(*expected)
        handle.remove()
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    with fr.apply(model, method):
        for time, out in zip((0.9, 0.3), expected, strict=True):
            call["timestep"] = torch.full_like(call["timestep"], time)
            assert_same(run(model, call), out, 1e-6)


def test_what_modulates_nothing_makes_no_angles(monkeypatch):
    """The model's own table is all that changes; angles of the whole sequence would be made at every step of DyPE."""
    host, made = TINY_HOSTS["flux"], []
    model, call = host.build(), host.call(host.layout, dtype=torch.float32)
    monkeypatch.setattr(identified.Identified, "rescaled", lambda self, rescaling: made.append(rescaling) or self)
    with fr.apply(model, fr.HighResolution("dype-ntk", trained=(2, 2))) as handle:
        run(model, call)
        assert not made
        handle.update(*handle.methods, *grag_like(host.layout))
        run(model, call)
        assert len(made) == 1


@pytest.mark.parametrize("rotation", ["op", "host"])
@pytest.mark.parametrize("kind", ["dype", "dype-ntk"])
def test_a_run_of_dype_takes_one_plan(kind, rotation, monkeypatch):
    """Steps differ in angles alone: later plans share all else with the first, and give the same bits as plans that are
    made anew for each step."""
    host = TINY_HOSTS["flux"]
    model, call, made = host.build(), host.call(host.layout, dtype=torch.float32), []
    method = fr.HighResolution(kind, trained=(2, 2))
    beside = [*grag_like(host.layout), fr.LogitBias(0.4, keys=host.layout.target)]
    monkeypatch.setattr(fr, "plan", lambda *a, _plan=fr.plan, **k: made.append(_plan(*a, **k)) or made[-1])

    def at(time):
        call["timestep"] = torch.full_like(call["timestep"], time)
        return run(model, call)

    expected = []
    for time in (0.9, 0.6, 0.3):
        with fr.apply(model, method, *beside, rotation=rotation):
            expected.append(at(time))
    each = len(made) // 3  # with a gain that we multiply, a second one tells whether the methods modulate
    assert_differ(*expected[:2])
    with fr.apply(model, method, *beside, rotation=rotation):
        for time, out in zip((0.9, 0.6, 0.3), expected, strict=True):
            assert torch.equal(at(time), out)
    assert len(made) == 4 * each


# ---- video ----------------------------------------------------------------------------------------------------------


def build_wan():
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=128,
    )  # fmt: skip


def build_hunyuan():
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip


def video_call(model, frames: int = 7) -> dict:
    draw = torch.Generator().manual_seed(2)
    call = dict(
        hidden_states=torch.randn(2, 4, frames, 4, 6, generator=draw), timestep=torch.tensor([700.0, 700.0]),
        encoder_hidden_states=torch.randn(2, 5, 16, generator=draw),
    )  # fmt: skip
    if "Hunyuan" in type(model).__name__:
        call |= dict(
            encoder_attention_mask=torch.ones(2, 5, dtype=torch.long),
            pooled_projections=torch.randn(2, 8, generator=draw), guidance=torch.tensor([6.0, 6.0]),
        )  # fmt: skip
    return call


VIDEO = pytest.mark.parametrize("build", [build_wan, build_hunyuan])


@VIDEO
def test_a_long_video_lowers_one_frequency_of_the_frames(build):
    model = lively(build())
    call, tables = video_call(model), []
    stock = run(model, call)
    with fr.apply(model, fr.LongVideo(6)) as handle:
        model.rope.register_forward_hook(lambda m, a, out: tables.append(out))
        assert torch.equal(run(model, call), stock), "one period is longer than that"
        handle.update(fr.LongVideo(40, repeats=6))
        assert_differ(run(model, call), stock)
        with pytest.raises(ValueError, match="attention is not modulated"):
            handle.update(fr.GRAG())
        with pytest.raises(ValueError, match="without a bound handle"):
            fr.apply(model, fr.LongVideo(6))
    assert torch.equal(run(model, call), stock)
    theta, dims, grid = (1e4, (4, 4, 4), (7, 2, 3)) if build is build_wan else (256.0, (4, 4, 8), (7, 4, 6))
    positions = torch.cartesian_prod(*map(torch.arange, grid))
    angles = fr.RoPE.axial(positions, dims, theta).angles
    angles[:, 0] = positions[:, 0] * 0.9 * 2 * math.pi / 40
    cos, sin = (x.reshape(len(positions), -1)[:, ::2].double() for x in tables[1])
    torch.testing.assert_close(cos, angles.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin, angles.sin(), atol=1e-5, rtol=0)


@VIDEO
def test_a_large_video_is_rescaled_like_a_picture(build):
    model = lively(build())
    call = video_call(model)
    stock = run(model, call)
    handle = fr.apply(model, fr.HighResolution("dype", trained=(1, 2)))
    handle.set_step(2, 10)
    assert_differ(run(model, call), stock)
    fr.remove(model)
    assert not handle.bound
    assert torch.equal(run(model, call), stock)


class Told:
    """A method that writes down the step and the noise level."""

    def __init__(self):
        self.seen = []

    def modulations(self, site):
        return []

    def rescaling(self, site):
        self.seen.append((site.step, site.num_steps, site.sigma))


def test_a_video_in_a_loop_of_ones_own_has_the_steps_of_its_pipeline():
    """Wan 2.2 has a timestep per token, and 0 for the tokens of a given picture."""
    model, told = lively(build_wan()), Told()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)

    class Pipeline:
        transformer = model

    pipe = Pipeline()
    pipe.scheduler = scheduler
    call = video_call(model)
    times = scheduler.timesteps[2].expand(2, 7 * 2 * 3).clone()
    times[:, :6] = 0
    with fr.apply(pipe, told):
        run(model, call | {"timestep": times})
    assert told.seen == [(2, 5, pytest.approx(float(scheduler.sigmas[2])))]


def test_what_a_video_cannot_have_is_refused(monkeypatch):
    model = lively(build_wan())
    for name, value in (("backend", "eager"), ("rotation", "host"), ("plain", "math"), ("reference", object())):
        with pytest.raises(ValueError, match=f"{name}: expected .* on a video transformer"):
            fr.apply(model, fr.LongVideo(6), **{name: value})
    with pytest.raises(ValueError, match="attention is not modulated"):
        fr.apply(model, fr.At(fr.LongVideo(6), fr.GRAG()))
    with fr.apply(model, fr.At(fr.LongVideo(40, repeats=6))) as handle:
        with pytest.raises(ValueError, match="step: expected an integer"):
            handle.set_step(1.5)
        with pytest.raises(NotImplementedError, match="inspect: expected a transformer whose attention"):
            handle.inspect()
        monkeypatch.setattr(model, "_parallel_config", SimpleNamespace(context_parallel_config=object()))
        with pytest.raises(NotImplementedError, match="context parallelism: expected no rescaled positions"):
            run(model, video_call(model))


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_runs(monkeypatch, capsys):
    """docs/positions.md; published names lead to tiny transformers, called once."""
    bound = []

    class Small:
        def __init__(self, transformer, call):
            self.transformer, self._call = transformer, call

        def __call__(self, prompt, **arguments):
            bound.append((type(self.transformer).__name__, arguments))
            run(self.transformer, self._call)
            return SimpleNamespace(images=["picture"], frames=["frames"])

        def to(self, device):
            return self

    flux, wan = TINY_HOSTS["flux"], lively(build_wan())
    pipes = {
        diffusers.FluxPipeline: Small(flux.build(), flux.call(flux.layout, dtype=torch.float32)),
        diffusers.WanPipeline: Small(wan, video_call(wan)),
    }
    for kind, pipe in pipes.items():
        monkeypatch.setattr(kind, "from_pretrained", lambda name, torch_dtype, pipe=pipe: pipe)
    run_snippets(DOCS / "positions.md", capsys)
    assert [name for name, _ in bound] == ["FluxTransformer2DModel", "WanTransformer3DModel"]
    assert bound[1][1] == {"num_frames": 129}
