"""The nodes, the folder that ComfyUI loads, and the example workflows, against doubles of the host's classes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import comfyui_doubles as host
import pytest
import torch
from comfyui_api import node_classes
from comfyui_api import run_node as run
from source_tree import ROOT

import fastrope
from fastrope.bindings.comfyui.patching import steering_of
from fastrope.cli import main

REFERENCE = host.picture(8, 12, seed=5)
PROMPT = host.prompt(references=[REFERENCE])
PACK = ROOT / "bindings" / "comfyui" / "pack"


@pytest.fixture
def nodes(monkeypatch):
    """Node classes by their ids."""
    return node_classes(monkeypatch)


@pytest.fixture
def docs(monkeypatch):
    """The generator of workflows."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("graphs", ROOT / "docs" / "comfyui" / "graphs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("workflows", None)


# ---- nodes ----------------------------------------------------------------------------------------------------------


def test_schemas_say_what_users_need(nodes):
    for name, node in nodes.items():
        schema = node.define_schema()
        assert name.startswith("FastRoPE_")
        assert schema.category == "FastRoPE"
        assert schema.search_aliases
        assert len(schema.description) > 40
        for each in schema.inputs:
            assert each.tooltip, f"{name}.{each.id} has no tooltip"
            if each.id in ("seed", "noise_seed"):  # names for which the editor adds a widget
                assert each.control_after_generate is False
            if hasattr(each, "min") and each.default is not None:
                assert each.min <= each.default <= each.max


def test_grag_edits(nodes):
    model = host.tiny()
    stock = host.sample(model, PROMPT)
    neutral, kept = (run(nodes["FastRoPE_GRAG"], model, delta=d).args[0] for d in (1.0, 1.6))
    assert torch.equal(host.sample(neutral, PROMPT), stock)
    assert not torch.allclose(host.sample(kept, PROMPT), stock, rtol=0, atol=1e-3)
    late = run(nodes["FastRoPE_GRAG"], model, delta=1.6, start_percent=0.5).args[0]
    one = run(nodes["FastRoPE_GRAG"], model, delta=1.6, layers="1, 3-3").args[0]
    values = run(nodes["FastRoPE_GRAG"], model, delta=1.0, value_delta=1.5).args[0]
    outs = [host.sample(m, PROMPT) for m in (kept, late, one, values, model)]
    assert len({out.sum().item() for out in outs}) == 5


def test_reference_strength_counts_a_picture_twice(nodes):
    """Weight 2 equals a second copy of every key and value of the reference."""
    model, count = host.tiny(), 4 * 6
    steered = run(nodes["FastRoPE_ReferenceStrength"], model, weight=2.0).args[0]

    def twice(func, q, k, v, heads, **kwargs):
        k, v = (torch.cat([x, x[:, :, -count:]], dim=2) for x in (k, v))
        return func(q, k, v, heads, **kwargs)

    expected = model.clone()
    expected.model_options["transformer_options"]["optimized_attention_override"] = twice
    torch.testing.assert_close(host.sample(steered, PROMPT), host.sample(expected, PROMPT), rtol=0, atol=1e-5)
    neutral = run(nodes["FastRoPE_ReferenceStrength"], model, weight=1.0).args[0]
    assert torch.equal(host.sample(neutral, PROMPT), host.sample(model, PROMPT))


def test_looserope_shows_what_it_sees(nodes):
    composite, mask = torch.rand(1, 64, 96, 3), torch.zeros(1, 64, 96)
    mask[:, 16:48, 32:64] = 1
    model, seen = run(nodes["FastRoPE_LooseRoPE"], host.tiny(), composite=composite, mask=mask).args
    assert seen.shape == (1, 64, 96, 3)
    outside = torch.ones(64, 96, dtype=torch.bool)
    outside[:, :] = (seen[0] - 0.35 * composite[0]).abs().amax(dim=-1) < 1e-6
    assert outside.any()
    assert not outside[16:48, 32:64].any()
    stock = host.sample(host.tiny(), PROMPT)
    assert not torch.allclose(host.sample(model, PROMPT), stock, rtol=0, atol=1e-4)
    again = run(nodes["FastRoPE_LooseRoPE"], host.tiny(), composite=composite, mask=mask[:, ::2, ::2]).args[0]
    torch.testing.assert_close(host.sample(again, PROMPT), host.sample(model, PROMPT), rtol=0, atol=1e-5)


def test_untwisting_takes_a_preset_or_its_own_numbers(nodes):
    node = nodes["FastRoPE_UntwistingRoPE"]
    paper, same = (run(node, host.tiny(), preset=name).args[0] for name in ("paper", "own numbers"))
    outs = [host.sample(m, PROMPT) for m in (paper, same, run(node, host.tiny(), preset="xmarre-0.2").args[0])]
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2], rtol=0, atol=1e-4)
    assert not torch.allclose(outs[0], host.sample(host.tiny(), PROMPT), rtol=0, atol=1e-3)


def test_untwisting_shares_attention_with_a_latent_of_its_own(nodes):
    node, model, plain = nodes["FastRoPE_UntwistingRoPE"], host.tiny(), host.prompt()
    style, shown = {"samples": host.picture(4, 6, seed=8)}, [[host.prompt(seed=9)["c_crossattn"], {}]]
    steered = run(node, model, reference_latent=style, reference_conditioning=shown).args[0]
    found = host.sample(steered, plain, host.prompt(seed=3))
    assert not torch.allclose(found, host.sample(model, plain, host.prompt(seed=3)), rtol=0, atol=1e-3)
    assert torch.equal(found, host.sample(steered, plain, host.prompt(seed=3)))
    kept = run(node, model, reference_latent=style, reference_conditioning=shown, keep=True).args[0]
    for _ in range(2):
        torch.testing.assert_close(host.sample(kept, plain, host.prompt(seed=3)), found, rtol=0, atol=1e-6)
    off = run(node, model, reference_latent=style, reference_conditioning=shown, end_percent=0.01).args[0]
    assert torch.equal(host.sample(off, plain), host.sample(model, plain))
    with pytest.raises(ValueError, match="reference_conditioning: expected a CONDITIONING"):
        run(node, model, reference_latent=style)
    with pytest.raises(ValueError, match="reference_latent: expected a LATENT"):
        run(node, model, reference_conditioning=shown)
    with pytest.raises(ValueError, match="reference_latent: expected one per model"):
        run(node, steered, reference_latent=style, reference_conditioning=shown)
    with pytest.raises(NotImplementedError, match="without a reference latent"):
        run(nodes["FastRoPE_Inspect"], steered)


def test_inspect_draws_the_latest_run_and_changes_nothing(nodes):
    model = run(nodes["FastRoPE_GRAG"], host.tiny(), delta=1.6).args[0]
    watched, record = run(nodes["FastRoPE_Inspect"], model, layers="0, 3").args
    for _ in range(2):
        assert torch.equal(host.sample(watched, PROMPT, steps=2), host.sample(model, PROMPT, steps=2))
    assert [(look.step, look.layer) for look in record.looks] == [(0, 0), (0, 3), (1, 0), (1, 3)]
    for look in record.looks:
        assert set(look.mass) == {"text", "target", "reference 0"}
        assert sum(look.mass.values()) == pytest.approx(1, abs=1e-4)
    chart, latent = nodes["FastRoPE_AttentionChart"].execute(record, {"samples": 1}).args
    assert chart.shape[0] == 1
    assert chart.shape[3] == 3
    assert float(chart.min()) < 0.3
    assert latent == {"samples": 1}


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("GRAG", dict(start_percent=0.6, end_percent=0.4), "end_percent: expected a number above start_percent"),
        ("GRAG", dict(layers="3-1"), "layers: expected ranges that count up"),
        ("GRAG", dict(layers="first"), "layers: expected numbers and ranges"),
        ("LooseRoPE", dict(composite=torch.rand(1, 64, 64, 3)), "mask: expected either a mask or an original"),
        ("LooseRoPE", dict(composite=torch.rand(2, 64, 64, 3), mask=torch.ones(1, 64, 64)), "composite: expected one"),
        ("LooseRoPE", dict(composite=torch.rand(1, 64, 64, 3), mask=torch.zeros(1, 64, 64)), "mask: expected"),
        ("LooseRoPE", dict(composite=torch.rand(1, 64, 64, 3), mask=torch.ones(1, 64, 96)), "mask: expected the prop"),
        ("LooseRoPE", dict(composite=torch.rand(1, 64, 64, 3), mask=torch.ones(1, 64, 64), levels=1), "levels"),
    ],
)  # fmt: skip
def test_inputs_that_make_no_sense_are_told_at_the_node(nodes, name, values, said):
    with pytest.raises(ValueError, match=said):
        run(nodes[f"FastRoPE_{name}"], host.tiny(), **values)


def test_a_chart_before_the_run_says_so(nodes):
    _, record = run(nodes["FastRoPE_Inspect"], host.tiny()).args
    with pytest.raises(ValueError, match="a run of the sampler before this node"):
        nodes["FastRoPE_AttentionChart"].execute(record, {})


def test_nodes_chain_on_one_model(nodes):
    model = run(nodes["FastRoPE_UntwistingRoPE"], run(nodes["FastRoPE_GRAG"], host.tiny()).args[0]).args[0]
    assert [type(each.method).__name__ for each in steering_of(model).bound] == ["GRAG", "UntwistingRoPE"]


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_install_links_or_copies_and_takes_nothing_of_others_away(tmp_path, capsys):
    nodes = tmp_path / "ComfyUI" / "custom_nodes"
    nodes.mkdir(parents=True)
    for path, flags in [(nodes.parent, []), (nodes, ["--copy"]), (nodes.parent, ["--copy"]), (nodes.parent, [])]:
        assert main(["comfyui", "install", str(path), *flags]) == 0
        assert (nodes / "fastrope").is_symlink() == (not flags)
        assert (nodes / "fastrope" / "__init__.py").read_bytes() == (PACK / "__init__.py").read_bytes()
        assert not (nodes / "fastrope" / "__pycache__").exists() or not flags
    (nodes / "fastrope").unlink()
    foreign = nodes / "fastrope"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("precious")
    assert main(["comfyui", "install", str(nodes)]) == 2
    assert "files of another's" in capsys.readouterr().err
    assert (foreign / "mine.txt").exists()
    assert main(["comfyui", "install", str(tmp_path)]) == 2
    assert "with custom_nodes in it" in capsys.readouterr().err


def test_where_links_are_not_allowed_the_folder_is_copied(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("a required privilege is not held by the client")

    (tmp_path / "custom_nodes").mkdir()
    monkeypatch.setattr(os, "symlink", refused)
    monkeypatch.setattr(Path, "symlink_to", refused)
    assert main(["comfyui", "install", str(tmp_path)]) == 0
    assert not (tmp_path / "custom_nodes" / "fastrope").is_symlink()
    assert (tmp_path / "custom_nodes" / "fastrope" / "pyproject.toml").exists()


def test_the_zip_is_the_folder_and_the_same_every_time(tmp_path):
    first, second = tmp_path / "a.zip", tmp_path / "b.zip"
    assert main(["comfyui", "zip", str(first)]) == main(["comfyui", "zip", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    names = zipfile.ZipFile(first).namelist()
    assert {"fastrope/__init__.py", "fastrope/pyproject.toml", "fastrope/requirements.txt"} <= set(names)
    assert any(name.startswith("fastrope/example_workflows/api/") for name in names)


def test_metadata_are_those_of_the_package():
    text = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{fastrope.__version__}"' in text
    assert f'"fastrope>={fastrope.__version__}"' in text
    assert "[tool.comfy]" in text
    assert 'PublisherId = "fastrope"' in text
    assert (PACK / "requirements.txt").read_text().strip() == f"fastrope>={fastrope.__version__}"


# ---- example workflows ----------------------------------------------------------------------------------------------


def test_workflows_are_those_of_their_script(docs):
    made = docs.files()
    for path, content in made.items():
        assert path.read_bytes() == content, "run python docs/comfyui/graphs.py"
    assert set(PACK.rglob("*.json")) == set(made)
    for name in docs.WORKFLOWS:
        assert (ROOT / "docs" / "comfyui" / f"{name}.png").exists()


def test_every_node_is_in_a_workflow_with_its_inputs_in_order(docs, nodes):
    used = {kind for _, graph, _ in docs.WORKFLOWS.values() for kind, _ in graph.values()}
    assert nodes.keys() <= used
    for name, node in nodes.items():
        schema, (inputs, outputs) = node.define_schema(), docs.CLASSES[name]
        assert [each.id for each in schema.inputs] == list(inputs)
        assert len(schema.outputs) == len(outputs)
        defaults = sys.modules["workflows"].OURS[name]
        assert defaults == {
            each.id: each.default for each in schema.inputs if getattr(each, "default", None) is not None
        }


def test_links_join_what_fits(docs):
    mask = docs.widgets("LoadImageMask", dict(image="mask.png", channel="red"))
    assert [value for _, value in mask] == ["mask.png", "red", "image"]  # the editor's upload comes last
    for _, graph, _ in docs.WORKFLOWS.values():
        for kind, values in graph.values():
            for name, value in values.items():
                wanted = docs.CLASSES[kind][0][name]
                assert isinstance(value, tuple) == wanted.isupper()
                if isinstance(value, tuple):
                    assert docs.CLASSES[graph[value[0]][0]][1][value[1]] == wanted
        prompt = json.loads(json.dumps(docs.as_prompt(graph)))
        assert all(set(node) == {"class_type", "inputs", "_meta"} for node in prompt.values())


def test_the_page_shows_every_node_and_workflow(docs, nodes):
    page = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    for name, node in nodes.items():
        assert node.define_schema().display_name in page, name
    for name in docs.WORKFLOWS:
        assert f"comfyui/{name}.png" in page
    for link in re.findall(r"\]\(([\w/.-]+)(?:#[\w-]+)?\)", page):
        assert (ROOT / "docs" / link).exists(), link
