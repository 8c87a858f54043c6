"""The snippets of docs/autoregressive.md run as they stand, on tiny random weights under the published names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import tiny_hosts
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "autoregressive.md"
SECTION = re.compile(r"^## (?P<title>[^\n]+)\n(?P<body>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def snippet(title: str, *smaller: tuple[str, str]) -> str:
    """The one python block of a section, with sizes made smaller."""
    (body,) = (m["body"] for m in SECTION.finditer(PAGE.read_text(encoding="utf-8")) if m["title"].startswith(title))
    (code,) = re.findall(r"^```python\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
    for old, new in smaller:
        assert code.count(old) == 1, f"{old!r} is not in the snippet of {title}"
        code = code.replace(old, new)
    return code


def run(code: str) -> dict:
    namespace = {"__name__": "page"}
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), namespace)
    return namespace


def redirect(monkeypatch, name: str, folder: Path, *classes: str) -> None:
    """Let ``from_pretrained(name)`` of transformers' classes load ``folder``."""
    transformers = importlib.import_module("transformers")
    for cls in (getattr(transformers, c) for c in classes):
        original = cls.from_pretrained

        def load(given, *args, original=original, **kwargs):
            assert given == name
            return original(folder, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", load)


def counted(namespace: dict, tokens: int) -> None:
    record = namespace["edit"].record
    assert record.tokens.shape == (1, tokens)
    assert sum(found[0] for found in record.counts().values()) == tokens
    assert torch.equal(record.anchors, namespace["original"].tokens)


def test_llamagen(tmp_path, monkeypatch):
    from fastrope.bindings import llamagen

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(llamagen.SIZES, "tiny", tiny_hosts.LLAMAGEN_SIZE)
    tiny_hosts.save_llamagen(tmp_path / "t2i_XL_stage2_512.pt", tmp_path / "vq_ds16_t2i.pt", tmp_path / "t5")
    redirect(monkeypatch, "google/flan-t5-xl", tmp_path / "t5", "T5EncoderModel", "AutoTokenizer")
    found = run(snippet("LlamaGen", ('"cpu", 32', '"cpu", 4')))
    counted(found, 16)
    assert found["pixels"].shape == (1, 3, 64, 64)


def test_janus(tmp_path, monkeypatch):
    tiny_hosts.save_janus(tmp_path / "janus")
    classes = ("JanusForConditionalGeneration", "JanusProcessor")
    redirect(monkeypatch, "deepseek-community/Janus-Pro-1B", tmp_path / "janus", *classes)
    found = run(snippet("Janus"))
    counted(found, 16)
    assert found["pixels"].shape == (1, 3, 8, 8)


def test_emu3(tmp_path, monkeypatch):
    tiny_hosts.save_emu3(tmp_path / "emu3")
    redirect(monkeypatch, "BAAI/Emu3-Gen-hf", tmp_path / "emu3", "Emu3ForConditionalGeneration", "Emu3Processor")
    found = run(snippet("Emu3", ('"BAAI/Emu3-Gen-hf", 90', '"BAAI/Emu3-Gen-hf", 3')))
    counted(found, 9)
    assert found["pixels"].shape == (1, 3, 24, 24)


def test_lumina():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=9000, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    model, anchors = LlamaForCausalLM(config).eval(), torch.randint(4, 8196, (1, 4))
    processors = run(snippet("Lumina"))["edit_processors"](model, anchors, 2, 2)
    grid = processors[-1].grid
    ids = torch.randint(8900, 9000, (1, 5))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=grid.length, logits_processor=processors
    )
    record = processors[-1].record
    assert torch.equal(grid.flatten(out[:, 5:]), record.tokens)
    assert torch.equal(record.anchors, anchors)


def test_a_changed_page_is_noticed():
    with pytest.raises(AssertionError, match="is not in the snippet"):
        snippet("Janus", ("no such text", ""))


def test_what_fresh_processors_make_by_default_is_refused(tmp_path):
    """Emu3's pads on the right, Janus's makes prompts of text mode: the two silent mistakes that are made most."""
    from transformers import Emu3ForConditionalGeneration, Emu3Processor, JanusForConditionalGeneration, JanusProcessor

    from fastrope.bindings.transformers import emu3, janus

    tiny_hosts.save_emu3(tmp_path / "emu3")
    tiny_hosts.save_janus(tmp_path / "janus")
    words = ["a boat", "a red boat"]
    processor = Emu3Processor.from_pretrained(tmp_path / "emu3")
    options = dict(return_for_image_generation=True, ratio="1:1", image_area=24**2, return_tensors="pt", padding=True)
    inputs, model = processor(text=words, **options), Emu3ForConditionalGeneration.from_pretrained(tmp_path / "emu3")
    with pytest.raises(ValueError, match=r"attention_mask: expected padding on the left.* in row\(s\) \[0\]"):
        emu3.generate(model, inputs, 3, 3, guidance=None)
    processor = JanusProcessor.from_pretrained(tmp_path / "janus")
    model = JanusForConditionalGeneration.from_pretrained(tmp_path / "janus")
    with pytest.raises(ValueError, match=r"input_ids: expected prompts of image mode.*generation_mode=\"image\""):
        janus.generate(model, processor(text=words, padding=True, return_tensors="pt"), image_start=5)
