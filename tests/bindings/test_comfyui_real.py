"""The binding in the real ComfyUI: its sampler, tiny random models of every family. Needs ``COMFYUI_PATH``."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
import torch

import fastrope as fr

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("set COMFYUI_PATH to a checkout of ComfyUI to run these", allow_module_level=True)

import comfyui_models as real
import comfyui_oracle as oracle

from fastrope.bindings.comfyui.patching import steer, steering_of
from fastrope.bindings.comfyui.references import LatentReference

NEAR = dict(rtol=0, atol=2e-5)
PACK = Path(__file__).resolve().parents[2] / "bindings" / "comfyui" / "pack"


def edit(name: str, **options):
    """Conditionings of an edit, where the family has references; else of a prompt."""
    references = [real.latent(name, 4, 6, seed=9), real.latent(name, 6, 4, seed=8)] if name in real.EDITS else []
    return [real.conditioning(name, seed=seed, references=references, **options) for seed in (2, 3)]


def report(capsys, what: str, found, expected) -> None:
    with capsys.disabled():
        print(f"\n  {what}: largest difference {float((found - expected).abs().max()):.2e}", end="")


def test_the_recorded_interface_is_the_real_one():
    recorded = json.loads((Path(__file__).parent / "comfyui_interface.json").read_text(encoding="utf-8"))
    recorded.pop("comfyui")
    assert real.interface(recorded["signatures"]) == recorded


@pytest.mark.parametrize("name", real.MODELS)
def test_a_neutral_node_gives_the_same_bits(name):
    model, (positive, negative) = real.patcher(name), edit(name)
    stock = real.sample(model, name, positive, negative, cfg=2.0)
    assert torch.equal(stock, real.sample(steer(model, fr.GRAG(1.0, 1.0)), name, positive, negative, cfg=2.0))
    late = fr.At(fr.GRAG(text_delta=2.0), steps={7})
    assert torch.equal(stock, real.sample(steer(model, late), name, positive, negative, cfg=2.0))


@pytest.mark.parametrize("name", real.MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_grag_equals_an_independent_computation(name, batch, capsys):
    model, (positive, negative) = real.patcher(name), edit(name)
    run = dict(positive=positive, negative=negative, cfg=2.0, noise=real.latent(name, batch=batch))
    text = {"flux2": 512, "z-image": 32}.get(name, 5)
    if name in real.EDITS:
        method, rule = fr.GRAG(0.8, 1.5), oracle.grag(0.8, 1.5)
    else:
        method, rule = fr.GRAG(text_bias=1.3, text_delta=1.5), oracle.grag(1, 1, text, (1.3, 1.5))
    stock, found = real.sample(model, name, **run), real.sample(steer(model, method), name, **run)
    expected = real.sample(oracle.patched(model, rule), name, **run)
    report(capsys, f"GRAG, {name}, batch {batch}", found, expected)
    assert not torch.allclose(found, stock, rtol=0, atol=1e-3)
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("name", real.EDITS)
def test_reference_strength_equals_copies_of_the_reference(name, capsys):
    model, (positive, negative) = real.patcher(name), edit(name)

    def thrice(q, k, v, options, ids):
        """The last of two references three times."""
        count = options["reference_image_num_tokens"][-1]
        k, v = (torch.cat([x, x[:, :, -count:], x[:, :, -count:]], dim=2) for x in (k, v))
        return oracle.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, v)

    run = dict(positive=positive, negative=negative, cfg=2.0)
    found = real.sample(steer(model, fr.ReferenceStrength(3.0, [1])), name, **run)
    expected = real.sample(oracle.patched(model, thrice), name, **run)
    report(capsys, f"Reference strength, {name}", found, expected)
    assert not torch.allclose(found, real.sample(model, name, **run), rtol=0, atol=1e-3)
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "krea"])
@pytest.mark.parametrize("placed", [None, "offset", "uxo", "negative_index", "index_timestep_zero"])
def test_looserope_equals_an_independent_computation(name, placed, capsys):
    if (name, placed) == ("flux", "index_timestep_zero"):
        pytest.skip("the host's own code fails where guidance is embedded")
    model = real.patcher(name)
    positive, negative = edit(name, **({} if placed is None else {"reference_latents_method": placed}))
    dit = model.model.diffusion_model
    grid, patch = ((8, 12), 1) if name == "flux2" else ((4, 6), 2)
    saliency, mask = torch.rand(grid, generator=torch.Generator().manual_seed(4)), torch.zeros(grid)
    mask[1:3, 1:4] = 1
    method = fr.LooseRoPE(saliency, mask, levels=None, dilation=0, cutoffs=(), steps=None)
    energy, inside = method.on_grid(grid)
    scale, gain = (torch.where(inside, x, 1.0).flatten() for x in method.factors(energy))
    first = method._mask_on((4 // patch, 6 // patch)).flatten()
    crop = torch.cat([first, torch.zeros(6 * 4 // patch**2, dtype=torch.bool)])

    def rule(q, k, v, options, ids):
        """The first of two references alone is covered."""
        counts = options["reference_image_num_tokens"]
        one = oracle.loose(scale, gain, crop[: counts[0]], dit.pe_embedder.axes_dim, dit.pe_embedder.theta)
        return one(q, k, v, options, ids)

    references = [positive[0][1]["reference_latents"][:1]] * 2
    for conditioning, kept in zip((positive, negative), references, strict=True):
        conditioning[0][1]["reference_latents"] = kept
    run = dict(positive=positive, negative=negative, cfg=2.0)
    found = real.sample(steer(model, method, refers=True), name, **run)
    expected = real.sample(oracle.patched(model, rule), name, **run)
    report(capsys, f"LooseRoPE, {name}, references placed by {placed}", found, expected)
    assert not torch.allclose(found, real.sample(model, name, **run), rtol=0, atol=1e-4)
    torch.testing.assert_close(found, expected, **NEAR)


# ---- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", real.MODELS)
@pytest.mark.parametrize("placed", [None, "offset", "uxo", "negative_index", "index"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "ScaleROPE"])
def test_tokens_stand_where_the_host_puts_them(name, placed, scaled):
    """Three references of different shapes; the host's own rotary table is compared, rotation by rotation."""
    model, tables = real.patcher(name), []
    dit = model.model.diffusion_model
    sizes = [(4, 6), (8, 4), (6, 10)] if name in real.EDITS else []
    options = {"reference_latents_method": placed} if placed else {}
    positive = real.conditioning(name, references=[real.latent(name, *size) for size in sizes], **options)
    if scaled:
        model = model.clone()
        model.set_model_rope_options(1.5, 3.0, 0.75, -2.0, 1.0, 0.5)
    embedder = dit.rope_embedder if name == "z-image" else dit.pe_embedder
    handle = embedder.register_forward_hook(lambda module, given, out: tables.append(given[0][0].double()))
    steered = steer(model, fr.At(fr.GRAG(text_delta=2.0), steps={0}))
    seen = []
    prepare = steering_of(steered).prepare
    steering_of(steered).prepare = lambda *given: seen.append(prepare(*given)) or seen[-1]
    real.sample(steered, name, positive, steps=1)
    handle.remove()
    ours = seen[0]._positions.sequence.positions
    theirs = torch.cat(tables) if name == "z-image" else tables[-1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert seen[0]._positions.trusted


# ---- others ---------------------------------------------------------------------------------------------------------


def foreign(model):
    """A clone with another node's override, chained as the host's own nodes chain."""
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    before = options.get("optimized_attention_override")

    def louder(func, *args, **kwargs):
        out = func(*args, **kwargs) if before is None else before(func, *args, **kwargs)
        return out + 0.5 * out.roll(1, dims=-1)

    options["optimized_attention_override"] = louder
    return clone


@pytest.mark.parametrize("name", real.MODELS)
def test_two_nodes_and_a_foreign_override_in_any_order(name, capsys):
    positive, negative = edit(name)
    keep, text = fr.GRAG(0.9, 1.4), fr.GRAG(1.0, 1.0, 1.2, 0.8)
    if name not in real.EDITS:
        keep = fr.At(fr.GRAG(1.0, 1.0, 0.9, 1.1), layers={0, 1})
        text = fr.At(text, layers={2})
    nodes = (lambda m: steer(m, keep), lambda m: steer(m, text), foreign)
    found = []
    for order in [(0, 1, 2), (2, 1, 0), (1, 2, 0)]:
        model = real.patcher(name)
        for n in order:
            model = nodes[n](model)
        found.append(real.sample(model, name, positive, negative, cfg=2.0))
    report(capsys, f"orders of three nodes, {name}", found[1], found[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2e-6)
    alone = real.sample(steer(steer(real.patcher(name), keep), text), name, positive, negative, cfg=2.0)
    assert not torch.allclose(alone, found[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", real.MODELS)
def test_the_hosts_compile_node_goes_with_every_step(name, backend, capsys):
    """Steps differ in what acts; the node's compiled code is made once."""
    if backend == "inductor" and name != "flux":
        pytest.skip("one model is enough for the compiler itself")
    real.comfy()
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    positive, _ = edit(name)
    dials = dict(delta=1.5) if name in real.EDITS else dict(text_delta=1.5)
    steered = steer(real.patcher(name), fr.At(fr.GRAG(**dials), steps={1, 2}))
    stock, expected = (real.sample(m, name, positive, steps=4) for m in (real.patcher(name), steered))
    compiled = steered.clone()
    set_torch_compile_wrapper(model=compiled, backend=backend, options={"guard_filter_fn": skip_torch_compile_dict})
    found = real.sample(compiled, name, positive, steps=4)
    report(capsys, f"compiled, {name}, {backend}", found, expected)
    assert not torch.allclose(found, stock, rtol=0, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_lora_fp8_weights_and_previews_go_with_it(capsys):
    """Weights of 8 bits, cast by the host, under a patch of weights, with a preview at every step."""
    model, (positive, negative) = real.patcher("flux", torch.float8_e4m3fn), edit("flux")
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    assert model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.dtype == torch.float8_e4m3fn
    model.add_patches({key: ("diff", (0.3 * torch.randn(96, 32, generator=torch.Generator().manual_seed(5)),))})
    previews = []
    run = dict(positive=positive, negative=negative, cfg=2.0, callback=lambda step, x0, x, total: previews.append(step))
    found = real.sample(steer(model, fr.GRAG(0.8, 1.5)), "flux", **run)
    expected = real.sample(oracle.patched(model, oracle.grag(0.8, 1.5)), "flux", **run)
    report(capsys, "GRAG under a LoRA on fp8 weights, flux", found, expected)
    torch.testing.assert_close(found, expected, **NEAR)
    assert previews == [0, 1, 2] * 2
    plain = real.sample(steer(real.patcher("flux", torch.float8_e4m3fn), fr.GRAG(0.8, 1.5)), "flux", **run)
    assert not torch.allclose(found, plain, rtol=0, atol=1e-3)


# ---- the node pack --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """All classes of the host that the workflows use, and ours, loaded by the host's own loader."""
    real.comfy()
    import nodes as host

    from fastrope.commands.comfyui import install_into

    (tmp_path_factory.getbasetemp() / "custom_nodes").mkdir(exist_ok=True)
    place, _ = install_into(tmp_path_factory.getbasetemp(), copy=True)
    extras = Path(os.environ["COMFYUI_PATH"]) / "comfy_extras"
    for path in (
        place,
        *(extras / f"nodes_{name}.py" for name in ("flux", "edit_model", "sd3", "qwen", "mask", "model_advanced")),
    ):
        assert asyncio.run(host.load_custom_node(str(path))), path
    return host.NODE_CLASS_MAPPINGS


def test_the_host_loads_the_nodes(classes):
    ours = [name for name in classes if name.startswith("FastRoPE_")]
    assert len(ours) >= 5
    for name in ours:
        assert classes[name].INPUT_TYPES()["required"]["model" if "Chart" not in name else "record"]


@pytest.mark.parametrize("path", sorted((PACK / "example_workflows" / "api").glob("*.json")), ids=lambda p: p.stem)
def test_workflows_name_what_the_host_has(classes, path):
    """Every input is one of its class, none that is required is missing, links join equal types, choices exist."""
    prompt = json.loads(path.read_text())
    for node in prompt.values():
        cls = classes[node["class_type"]]
        told = cls.INPUT_TYPES()
        known = {**told.get("required", {}), **told.get("optional", {})}
        assert set(told.get("required", {})) <= set(node["inputs"]) <= set(known), node["class_type"]
        for name, value in node["inputs"].items():
            kind = known[name][0]
            if isinstance(value, list):
                source = classes[prompt[value[0]]["class_type"]]
                assert source.RETURN_TYPES[value[1]] == kind
            elif kind in ("FLOAT", "INT"):
                assert known[name][1].get("min", value) <= value <= known[name][1].get("max", value)
            elif name in ("type", "sampler_name", "scheduler", "weight_dtype", "preset", "timing", "channel"):
                choices = kind if isinstance(kind, (list, tuple)) else known[name][1]["options"]
                assert value in choices


def test_nodes_run_in_the_host(classes):
    """The classes as the host made them, on its model, through its sampler."""
    model, (positive, negative) = real.patcher("flux"), edit("flux")
    picture, mask = torch.rand(1, 64, 96, 3), torch.zeros(1, 64, 96)
    mask[:, 16:48, 16:64] = 1
    loose, preview = classes["FastRoPE_LooseRoPE"].execute(model, picture, 0.83, mask=mask).args
    kept = classes["FastRoPE_GRAG"].execute(loose, 1.3, 1.0).args[0]
    watched, record = classes["FastRoPE_Inspect"].execute(kept).args
    run = dict(positive=positive, negative=negative, cfg=2.0)
    found = real.sample(watched, "flux", **run)
    assert torch.equal(found, real.sample(kept, "flux", **run))
    assert not torch.allclose(found, real.sample(model, "flux", **run), rtol=0, atol=1e-3)
    chart, _ = classes["FastRoPE_AttentionChart"].execute(record, {"samples": found}).args
    assert chart.shape[-1] == preview.shape[-1] == 3
    assert {look.step for look in record.looks} == {0, 1, 2}


# ---- a reference latent ---------------------------------------------------------------------------------------------


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


# ---- positions beyond training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", real.MODELS)
def test_high_resolution_equals_other_frequencies_in_the_hosts_own_embedding(name, capsys):
    """NTK is another base on two axes; the host's embedding is given that, axis by axis."""
    model, (positive, negative) = real.patcher(name), edit(name)
    trained, grid = (2, 3), ((8, 12) if name == "flux2" else (4, 6))
    steered = steer(steer(model, fr.HighResolution("ntk", trained)), fr.GRAG(1.0, 1.0, 1.2, 0.9))
    run = dict(positive=positive, negative=negative, cfg=2.0)
    if name == "z-image":
        with pytest.raises(NotImplementedError, match="no patch reaches"):
            real.sample(steered, name, **run)
        return
    from comfy.ldm.flux.layers import EmbedND
    from comfy.ldm.flux.math import rope

    found = real.sample(steered, name, **run)
    text = {"flux2": 512}.get(name, 5)
    dit = model.model.diffusion_model
    scale = [1.0, grid[0] / trained[0], grid[1] / trained[1], 1.0]

    def forward(self, ids):
        bases = [self.theta * s ** (d / (d - 2)) if s > 1 else self.theta for s, d in zip(scale, self.axes_dim)]  # noqa: B905
        parts = [rope(ids[..., n], d, bases[n]) for n, d in enumerate(self.axes_dim)]
        return torch.cat(parts, dim=-3).unsqueeze(1)

    dit.pe_embedder.__class__ = type("Other", (EmbedND,), {"forward": forward})
    expected = real.sample(oracle.patched(model, oracle.grag(1, 1, text, (1.2, 0.9))), name, **run)
    report(capsys, f"High resolution and GRAG, {name}", found, expected)
    assert not torch.allclose(
        found, real.sample(steer(real.patcher(name), fr.GRAG(1.0, 1.0, 1.2, 0.9)), name, **run), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(found, expected, **NEAR)


# ---- the same weights in diffusers ----------------------------------------------------------------------------------


def diffusers_flux(model):
    """The host's transformer as diffusers', by the host's own map of names."""
    import diffusers

    host, config = real.comfy(), real.FLUX | {"mlp_ratio": 4.0}
    found = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    weights, names = model.model.diffusion_model.state_dict(), host.utils.flux_to_diffusers(config)
    made = {}
    for name in found.state_dict():
        source = names[name]
        source = (source, None) if isinstance(source, str) else source
        value = weights[source[0]]
        if source[1] is not None:
            value = value.narrow(*source[1])
        made[name] = source[2](value) if len(source) > 2 else value
    found.load_state_dict(made)
    return found


def diffusers_qwen(model):
    """Both name their weights alike."""
    import diffusers

    found = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    found.load_state_dict(model.model.diffusion_model.state_dict())
    return found


def packed(latent):
    """``(B, C, H, W)`` as tokens."""
    latent = latent.squeeze(2) if latent.ndim == 5 else latent
    return torch.nn.functional.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", ["flux", "qwen"])
@pytest.mark.parametrize("method", ["GRAG", "LooseRoPE", "UntwistingRoPE", "none"])
def test_the_same_weights_in_diffusers_give_the_same_velocities(name, method, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    if name == "flux":
        monkeypatch.setitem(real.MODELS, "flux", real.FLUX | {"mlp_ratio": 4.0})
    torch.manual_seed(0)
    saliency, mask = torch.rand(4, 6), torch.zeros(4, 6)
    mask[1:3, 1:4] = 1
    methods = {
        "GRAG": [fr.GRAG(0.8, 1.5, 1.2, 0.9)], "none": [],
        "LooseRoPE": [fr.LooseRoPE(saliency, mask, dilation=0)],
        "UntwistingRoPE": [fr.UntwistingRoPE(reference=0)],
    }[method]  # fmt: skip
    model = real.patcher(name)
    twin = (diffusers_flux if name == "flux" else diffusers_qwen)(model)
    steered = model
    for each in methods:
        steered = steer(steered, each)
    text = torch.randn(1, 5, 12)
    x, reference = real.latent(name), real.latent(name, 4, 8, seed=9)  # Qwen hosts centre odd sides differently
    inner, sigmas = model.model, torch.tensor([1.0, 0.7, 0.3, 0.0])
    given = dict(c_crossattn=text, ref_latents=[inner.process_latent_in(reference)])
    if name == "flux":
        given |= dict(y=torch.randn(1, 8), guidance=torch.tensor([3.0]))
    ids = [torch.zeros(rows, columns, 3) for rows, columns in ((4, 6), (2, 4))]
    for n, each in enumerate(ids):
        each[..., 0], each[..., 1], each[..., 2] = n, torch.arange(len(each))[:, None], torch.arange(each.shape[1])
    tokens = torch.cat([packed(x), packed(given["ref_latents"][0])], dim=1)
    largest = 0.0
    with torch.no_grad(), fr.apply(twin, *methods) as handle:
        for step, sigma in enumerate(sigmas[:-1]):
            options = {"sigmas": sigma[None], "sample_sigmas": sigmas, "wrappers": steered.wrappers}
            denoised = inner.apply_model(x, sigma[None], transformer_options=options, **given)
            found = packed((x - denoised) / sigma)
            handle.set_step(step, 3)
            call = dict(hidden_states=tokens, encoder_hidden_states=text, timestep=sigma[None])
            if name == "flux":
                call |= dict(pooled_projections=given["y"], guidance=given["guidance"], txt_ids=torch.zeros(5, 3))
                call |= dict(img_ids=torch.cat([each.flatten(0, 1) for each in ids]))
            else:
                call |= dict(img_shapes=[[(1, 4, 6), (1, 2, 4)]])
            expected = twin(**call, return_dict=False)[0][:, : found.shape[1]]
            largest = max(largest, float((found - expected).abs().max()))
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    with capsys.disabled():
        print(f"\n  diffusers binding, {name}, {method}: largest difference {largest:.2e}", end="")
