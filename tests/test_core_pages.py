"""The pages about the core (architecture, attention, backends and methods in docs/) run, and say what the code does.

``FASTROPE_WRITE_DOCS=1`` writes the table of rules.
"""

from __future__ import annotations

import os
import re

import pytest
import torch
from on_gpu import OnGpu, pretend
from pages import DOCS, ROOT, offline_kontext, page, run_snippets
from torch.nn.attention import SDPBackend

import fastrope as fr
from fastrope import api, dispatch, rules
from fastrope import device as devices
from fastrope.backends import folded
from fastrope.planning import scales, segments

RULES = re.compile(r"(<!-- rules: [^\n]* -->\n)(.*?)(<!-- end of rules -->)", re.DOTALL)
WORDS = dict(enumerate(("no", "one", "two", "three", "four", "five", "six", "seven", "eight")))


@pytest.fixture
def without_interpreter(monkeypatch):
    """As for a reader with a CPU."""
    monkeypatch.setattr(devices, "interpreted", lambda: False)


@pytest.mark.parametrize("name", ["attention.md", "backends.md"])
def test_snippets_run(name, without_interpreter, capsys):
    found = run_snippets(DOCS / name, capsys)
    if name == "attention.md":
        assert found["out"].shape == (1, len(found["tokens"]), 4, 128)


def test_methods_of_your_own_run(tmp_path, monkeypatch, capsys):
    pipe = offline_kontext(monkeypatch, tmp_path)
    processors = dict(pipe.transformer.attn_processors)
    found = run_snippets(DOCS / "methods.md", capsys)
    assert pipe.transformer.attn_processors == processors
    assert found["tokens"] == fr.TokenLayout(512, (8, 8), [(8, 8)])
    pictures = [found[name].tobytes() for name in ("loosened", "held")]
    assert found["photo"].tobytes() not in pictures
    assert pictures[0] != pictures[1]
    places = []

    class Spy(found["Hold"]):
        def modulations(self, site):
            places.append((site.layer, site.step, site.num_steps))
            return super().modulations(site)

    with fr.apply(pipe, Spy()):
        pipe(image=found["photo"], prompt="", guidance_scale=2.5)
    layers = range(len(processors))
    assert places == [(layer, step, 4) for step in range(4) for layer in layers]


def table_of_rules() -> str:
    lines = ["| calls | route | reason | rests on |", "|---|---|---|---|"]
    for family, rule in zip(rules.FAMILIES, rules.RULES, strict=True):
        lines.append(f"| {family.calls} | {rule.route} | {rule.reason} | {rule.basis} |")
    return "\n".join(lines) + "\n"


def test_the_rules_are_the_codes():
    text = page("backends.md")
    written = RULES.sub(lambda m: m[1] + table_of_rules() + m[3], text)
    if os.environ.get("FASTROPE_WRITE_DOCS") == "1":
        (DOCS / "backends.md").write_text(written, encoding="utf-8")
    else:
        assert text == written


def test_the_limits_of_a_launch_are_the_codes():
    text = " ".join(page("backends.md").split())
    assert f"Up to {segments.MAX_RUNS} runs, keys stay where they are" in text
    assert f"Up to {WORDS[scales.MAX_BUCKETS]} distinct scales each get one" in text
    assert f"at least {scales.MIN_BUCKET_QUERIES} queries share gets one" in text
    assert (
        f"One launch holds {segments.MAX_VARIANTS} query variants and {segments.MAX_RUNS} segments, and with per-query "
        f"scales {segments.MAX_PER_QUERY_GROUPS} groups." in text
    )


def test_every_switch_is_on_the_page():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "fastrope").rglob("*.py")]
    read = {name for text in sources for name in re.findall(r'switched_on\("(FASTROPE_\w+)"', text)}
    assert set(re.findall(r"^\| `(FASTROPE_\w+)` \| ", page("backends.md"), re.MULTILINE)) == read


def test_grag_on_an_h100_is_as_the_architecture_says(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setattr(api, "decide", lambda lowered, *qkv_and: dispatch.decide(
        lowered, *(OnGpu(x) for x in qkv_and[:3]), *qkv_and[3:]))  # fmt: skip
    monkeypatch.setattr(devices, "on_gpu", lambda q: True)
    assert "sm_90" in folded.CUDNN_ARCHS
    monkeypatch.setattr(api, "kernel_name", lambda q, k: folded.NAMES[SDPBackend.CUDNN_ATTENTION])
    tokens = fr.TokenLayout(text=512, target=(64, 64), references=[(64, 64)])
    rope = fr.RoPE.axial(tokens.positions("flux"), axes_dim=(16, 56, 56))
    q = torch.zeros(1, len(tokens), 1, 128, dtype=torch.bfloat16)
    modulations = fr.GRAG().modulations(fr.Site(tokens))
    said = str(fr.explain(q, q, q, rope=rope, modulations=modulations))
    assert f"```text\n{said}\n```" in page("architecture.md")


def test_every_path_of_the_architecture_exists():
    """Those in the table of folders; files in the second column lie in the folder of the first."""
    text = page("architecture.md")
    inside = text.index("## Inside the diffusers binding")
    binding = text[inside : text.index("## Where do I add a modulation?")]
    named = set(re.findall(r"(?<!image/)\b(\w+\.py)\b", binding))
    assert named == {path.name for path in (ROOT / "bindings" / "diffusers").glob("*.py")} - {"__init__.py"}
    table = text[text.index("## Folders") : inside]
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", table, re.MULTILINE)
    assert len(rows) > 15
    for first, second in rows:
        paths = re.findall(r"`([^`]+)`", first)
        paths += [f"{paths[0]}{name}" for name in re.findall(r"`([\w/]+\.(?:py|md))`", second) if paths[0][-1] == "/"]
        assert not [path for path in paths if not (ROOT / path).exists()]
    named = {path.name for path in (ROOT / "fastrope").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert named - {"__init__.py", "__pycache__"} <= set(re.findall(r"`fastrope/(\w+(?:\.py)?)/?`", table))


PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_test_file_a_page_names_exists(path):
    for name in re.findall(r"`(tests/[\w/]+\.py)`", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{path.name} names {name}"
