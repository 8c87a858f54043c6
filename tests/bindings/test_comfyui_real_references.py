"""Reference latents that the real ComfyUI runs by themselves. Needs ``COMFYUI_PATH``."""

from __future__ import annotations

import comfyui_models as real
import comfyui_oracle as oracle
import pytest
import torch
from comfyui_models import edit, report

import fastrope as fr
from fastrope.bindings.comfyui.patching import steer
from fastrope.bindings.comfyui.references import LatentReference


@pytest.mark.parametrize("name", real.MODELS)
@pytest.mark.parametrize("adain", [0.0, 0.5])
def test_a_reference_latent_equals_an_independent_computation(name, adain, capsys):
    """Euler once more, by hand: at every level the model runs the reference with hooks that record its keys, and then
    the target with hooks that append these keys, weighted."""
    model = real.patcher(name)
    inner, dit = model.model, model.model.diffusion_model
    style = real.latent(name, 6, 8, seed=11)
    own = real.conditioning(name, tokens=4, seed=12)
    reference = LatentReference(style, own, seed=5)
    method = fr.UntwistingRoPE((0.3, 0.9), (1.0, 1.4), 2.0, adain=adain)
    positive, negative = edit(name)
    steered = steer(model, method, reference=reference)
    found = real.sample(steered, name, positive, negative, cfg=2.0)
    again = real.sample(steered, name, positive, negative, cfg=2.0)
    assert torch.equal(found, again)

    text = {"flux2": 512, "z-image": 32}.get(name, 5)
    itself = {"flux2": 512, "z-image": 32}.get(name, 4)
    grid = (6, 8) if name == "flux2" else (3, 4)
    embedder = dit.rope_embedder if name == "z-image" else dit.pe_embedder
    axes, theta = embedder.axes_dim, embedder.theta
    ids = torch.zeros(grid[0], grid[1], len(axes), dtype=torch.float64)
    shift = [-(n // 2) for n in grid] if name == "qwen" else (0, 0)
    ids[..., 1] = (torch.arange(grid[0]) + shift[0])[:, None]
    ids[..., 2] = torch.arange(grid[1]) + shift[1]
    ids[..., 0] = itself + 1 if name == "z-image" else 0
    recorded = {}

    def record(func, q, k, v, heads, *args, **kwargs):
        options, span = kwargs["transformer_options"], slice(itself, itself + grid[0] * grid[1])
        if options.get("block_index") is not None:
            where = options["block_type"], options["block_index"]
            recorded[where] = [x[:1, :, span].double() for x in (q, k, v)]
        return func(q, k, v, heads, *args, **kwargs)

    def share(weight, target_ids):
        def rule(q, k, v, options, _):
            shared = recorded[options["block_type"], options["block_index"]]
            span = slice(text, text + target_ids.shape[0])
            if adain:
                for mine, theirs in ((q, shared[0]), (k, shared[1])):
                    a = oracle.turn(mine[:, :, span], -oracle.angles(target_ids, axes, theta))
                    b = oracle.turn(theirs, -oracle.angles(ids.flatten(0, 1), axes, theta))
                    spread = [(x.var(dim=2, correction=0, keepdim=True) + 1e-6).sqrt() for x in (a, b)]
                    new = (a - a.mean(2, True)) / spread[0] * spread[1] + b.mean(2, True)
                    mine[:, :, span] = oracle.turn(
                        adain * new + (1 - adain) * a, oracle.angles(target_ids, axes, theta)
                    )
            keys = torch.cat([k, (weight.repeat_interleave(2) * shared[1]).expand(len(k), -1, -1, -1)], dim=2)
            values = torch.cat([v, shared[2].expand(len(v), -1, -1, -1)], dim=2)
            return oracle.softmax(q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5, values)

        return rule

    spans = [(8, 12) if name == "flux2" else (4, 6)]
    target_ids = torch.zeros(*spans[0], len(axes), dtype=torch.float64)
    centre = [-(n // 2) for n in spans[0]] if name == "qwen" else (0, 0)
    target_ids[..., 1] = (torch.arange(spans[0][0]) + centre[0])[:, None]
    target_ids[..., 2] = torch.arange(spans[0][1]) + centre[1]
    target_ids[..., 0] = text + 1 if name == "z-image" else 0
    noise = torch.randn(style.shape, generator=torch.Generator().manual_seed(5))
    seen = []

    def wrapper(executor, x, t, *args, **kwargs):
        """The reference first, at the same level."""
        sigma, options = float(t[0]), args[3]
        step = [n for n, level in enumerate(options["sample_sigmas"].tolist()[:-1]) if level >= sigma * 0.9999][-1]
        clean = inner.process_latent_in(style)
        given = inner.extra_conds(cross_attn=own[0][0], device=x.device, noise=clean, width=64, height=48, **own[0][1])
        given = {key: value.process_cond(batch_size=1, area=None).cond for key, value in given.items()}
        alone = {**options, "optimized_attention_override": record, "patches": {}}
        noisy = inner.model_sampling.noise_scaling(torch.tensor(sigma), noise, clean)
        executor(noisy, torch.tensor([sigma]), None, given.pop("c_crossattn"), None, alone, **given)
        progress = step / 2
        high, low = 0.3 + 0.6 * progress, 1.0 + 0.4 * progress
        weight = torch.cat([
            high + (low - high) * (torch.arange(d // 2, dtype=torch.float64) / max(d // 2 - 1, 1)) ** 2.0
            if n in (1, 2) else torch.full((d // 2,), low, dtype=torch.float64)
            for n, d in enumerate(axes)
        ])  # fmt: skip
        seen.append(step)
        rule = share(weight, target_ids.flatten(0, 1))

        def override(func, q, k, v, heads, *rest, **named):
            if named["transformer_options"].get("block_index") is None:
                return func(q, k, v, heads, *rest, **named)
            out = rule(*(y.double() for y in (q, k, v)), named["transformer_options"], None)
            return out.transpose(1, 2).flatten(2).to(q.dtype)

        return executor(x, t, *args[:3], {**options, "optimized_attention_override": override}, **kwargs)

    by_hand = model.clone()
    by_hand.add_wrapper_with_key("apply_model", "by hand", wrapper)
    expected = real.sample(by_hand, name, positive, negative, cfg=2.0)
    report(capsys, f"reference latent, {name}, AdaIN {adain}", found, expected)
    assert set(seen) == {0, 1, 2}
    assert not torch.allclose(found, real.sample(model, name, positive, negative, cfg=2.0), rtol=0, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_a_kept_reference_runs_once_per_level():
    model, calls = real.patcher("flux"), []
    model.model.diffusion_model.register_forward_hook(lambda module, given, out: calls.append(len(out)))
    positive, negative = edit("flux")
    for keep, expected in ((True, [6, 3]), (False, [6, 6])):
        reference = LatentReference(real.latent("flux", 6, 8, seed=11), real.conditioning("flux"), keep=keep)
        steered, counts, found = steer(model, fr.UntwistingRoPE(), reference=reference), [], []
        for _ in range(2):
            calls.clear()
            found.append(real.sample(steered, "flux", positive, negative, cfg=2.0))
            counts.append(len(calls))
        assert counts == expected
        assert torch.equal(*found)
