"""Rescaled positions in bound transformers, against the same model with another rotary table and by the formulas."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS, assert_differ, assert_same, grag_like, loose_like, positions_of, run

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
    with mock.patch.object(model.pos_embed, "theta", 77.0), pytest.raises(NotImplementedError, match="rotary"):
        model.pos_embed.register_forward_hook(lambda m, a, out: (out[0] * 0, out[1]))
        with fr.apply(model, fr.HighResolution("ntk", trained=(2, 2))):
            run(model, host.call(host.layout, dtype=torch.float32))
    assert math.isclose(model.pos_embed.theta, 10_000)


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
