"""What else the real ComfyUI has: positions, other nodes, compilation, LoRAs, its loader, the example workflows.

Needs ``COMFYUI_PATH``.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import comfyui_models as real
import comfyui_oracle as oracle
import pytest
import torch
from comfyui_models import NEAR, edit, report

import fastrope as fr
from fastrope.bindings.comfyui.patching import steer, steering_of

CHOICES = ("type", "sampler_name", "scheduler", "weight_dtype", "preset", "timing", "channel", "set_cond_area")
PACK = Path(__file__).resolve().parents[2] / "bindings" / "comfyui" / "pack"

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


@pytest.mark.parametrize("name", real.MODELS)
def test_two_nodes_and_a_foreign_override_in_any_order(name, capsys):
    positive, negative = edit(name)
    keep, text = fr.GRAG(0.9, 1.4), fr.GRAG(1.0, 1.0, 1.2, 0.8)
    if name not in real.EDITS:
        keep = fr.At(fr.GRAG(1.0, 1.0, 0.9, 1.1), layers={0, 1})
        text = fr.At(text, layers={2})
    nodes = (lambda m: steer(m, keep), lambda m: steer(m, text), real.foreign)
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
            elif name in CHOICES:
                choices = kind if isinstance(kind, (list, tuple)) else known[name][1]["options"]
                assert value in choices


@pytest.mark.parametrize("path", sorted((PACK / "example_workflows").glob("*.json")), ids=lambda p: p.stem)
def test_the_editor_reads_the_same_values(classes, path):
    """It takes a node's values in the order of its widgets: inputs that are required, then others, with a further
    widget behind a seed, and one at the end of those required for a picture to upload."""
    prompt = json.loads((path.parent / "api" / path.name).read_text())
    for node in json.loads(path.read_text())["nodes"]:
        told, expected, linked = classes[node["type"]].INPUT_TYPES(), [], []
        for part in ("required", "optional"):
            for name, (kind, *options) in told.get(part, {}).items():
                value, options = prompt[str(node["id"])]["inputs"].get(name), (options or [{}])[0]
                if isinstance(kind, (list, tuple)) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                    expected.append(value)
                    seed = options.get("control_after_generate", name in ("seed", "noise_seed"))
                    expected += ["fixed"] if seed and kind == "INT" else []
                else:
                    linked.append(name)
            uploads = any((options or [{}])[0].get("image_upload") for _, *options in told.get(part, {}).values())
            expected += ["image"] if uploads else []
        while expected and expected[-1] is None:  # the editor's own default
            expected.pop()
        names = [each["name"] for each in node["inputs"]]
        assert names == linked[: len(names)], node["type"]
        assert node["widgets_values"] == expected, node["type"]


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
