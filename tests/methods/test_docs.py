"""docs/grag.md, docs/looserope.md and docs/strength.md run as they stand: published names lead to tiny random models.
Their commands, and those of docs/nag.md and docs/positions.md, are carried out with ``--model tiny``, the others
parsed."""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import carry_out, commands_of, page, snippets

import fastrope as fr
from fastrope.commands import draw, edit

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "bindings"))
import tiny_pipelines  # noqa: E402
from methods import tiny_run  # noqa: E402

STEPS: list[int] = []
TOKENIZER = None


def words(prompt: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(prompt.encode())))


def small_kontext():
    pipe = tiny_run.pipeline()
    pipe.tokenizer_2 = TOKENIZER

    class Small(type(pipe)):
        def __call__(self, num_inference_steps, **arguments):
            STEPS.append(num_inference_steps)
            small = dict(width=16, height=16, max_area=256, _auto_resize=False)
            return super().__call__(num_inference_steps=num_inference_steps, **(arguments | small))

        def encode_prompt(self, prompt=None, prompt_embeds=None, pooled_prompt_embeds=None, **arguments):
            if prompt_embeds is not None:
                return prompt_embeds, pooled_prompt_embeds, torch.zeros(prompt_embeds.shape[1], 3)
            return words(prompt, 1, 8, 32), words(prompt, 1, 32), torch.zeros(8, 3)

        def to(self, *args, **kwargs):
            return self

    pipe.__class__ = Small
    return pipe


def small_qwen():
    pipe = tiny_pipelines.qwen_pipeline()

    class Small(type(pipe)):
        def __call__(self, num_inference_steps, **arguments):
            STEPS.append(num_inference_steps)
            return super().__call__(num_inference_steps=num_inference_steps, width=10, height=6, **arguments)

        def encode_prompt(self, prompt=None, prompt_embeds=None, **arguments):
            return words(prompt, 1, 5, 32), torch.ones(1, 5, dtype=torch.bool)

        def to(self, *args, **kwargs):
            return self

    pipe.__class__ = Small
    return pipe


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Names of models, and the files that the pages open."""
    monkeypatch.chdir(tmp_path)
    composite, original = tiny_run.pasted()
    for name, picture in (("composite", composite), ("original", original), ("photo", composite)):
        picture.save(f"{name}.png")
    known = {
        ("FluxKontextPipeline", "black-forest-labs/FLUX.1-Kontext-dev"): small_kontext,
        ("QwenImageEditPlusPipeline", "Qwen/Qwen-Image-Edit-2509"): small_qwen,
    }
    for kind, model in known:
        cls = getattr(diffusers, kind)
        load = classmethod(
            lambda cls, name, torch_dtype, build=known[kind, model], model=model: _checked(name, model, build)
        )
        monkeypatch.setattr(cls, "from_pretrained", load)
    monkeypatch.setattr(
        "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus.calculate_dimensions", lambda area, ratio: (10, 6)
    )
    STEPS.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _checked(name: str, model: str, build):
    assert name == model
    return build()


def run(name: str) -> dict:
    namespace = {"__name__": name}
    for code, _ in snippets(page(name)):
        exec(compile(code, name, "exec", dont_inherit=True), namespace)
    return namespace


def test_grag(published):
    found = run("grag.md")
    assert STEPS == [24] * 6
    assert all(Path(f"evening-{delta}.png").exists() for delta in (0.95, 1.0, 1.1, 1.2))
    site = fr.Site(fr.TokenLayout(4, (2, 2), [(2, 2)] * 2), layer=45, step=23, num_steps=24)
    assert found["ease_off"].modulations(site) == []
    assert [m.delta for m in found["two_pictures"].modulations(site)] == [1.15, 0.9]
    assert [m.delta for m in found["per_layer"].modulations(site)] == [1.2, 1.2]
    assert not found["handle"].bound


def test_looserope(published, monkeypatch):
    from fastrope.bindings.transformers import judge

    asked = []

    def load(name):
        assert name == "Qwen/Qwen3-VL-4B-Instruct"
        return lambda composite, estimate: asked.append(estimate.size) or ("neglect" if len(asked) == 1 else "success")

    monkeypatch.setattr(judge.ChatJudge, "from_pretrained", load)
    found = run("looserope.md")
    assert Path("blended.png").exists()
    assert [t.verdict.kind for t in found["steered"].tries] == ["neglect", "success"]
    assert asked == [(16, 16)] * 2
    assert set(STEPS) == {28}


def test_strength(published, monkeypatch, tokenizer):
    monkeypatch.setattr(sys.modules[__name__], "TOKENIZER", tokenizer)
    found = run("strength.md")
    assert STEPS == [28] * 6
    assert found["louder"].weights == {2: 1.4, 3: 0.8}
    pictures = [np.asarray(found[name]) for name in ("freer", "weighted", "kept", "divided", "large")]
    assert all((a != b).any() for n, a in enumerate(pictures) for b in pictures[:n])


def test_the_table_of_looserope_is_the_codes():
    rows = re.findall(
        r"^\| (range|crop) factor, (?:from )?steps? (\d+)\S*[^|]*\|(.*)\|$", page("looserope.md"), re.MULTILINE
    )
    assert len(rows) == 6
    method = fr.LooseRoPE(torch.ones(1, 1), torch.ones(1, 1), boost=1.0)
    centres = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    for kind, step, cells in rows:
        factors = method.factors(centres, method.phase(int(step), 28))[kind == "crop"]
        assert [float(c) for c in cells.split("|")] == pytest.approx(factors.tolist(), abs=5.1e-5)


COMMANDS = commands_of("grag.md", "looserope.md", "strength.md", "nag.md", "positions.md")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, tmp_path, monkeypatch, capsys):
    carry_out(command, {"draw": draw, "edit": edit}, 4, tmp_path, monkeypatch, capsys)


def test_commands_are_found():
    assert sum("--model tiny" in command for command in COMMANDS) == 8
    assert len(COMMANDS) == 20
