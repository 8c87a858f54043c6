"""docs/hosts.md: its examples run, on tiny pipelines in place of the published weights; its table is the code's.

``FASTROPE_WRITE_DOCS=1`` writes the table.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path

import pytest
import torch

import fastrope as fr

diffusers = pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS  # noqa: E402
from tiny_transformers import TEXT  # noqa: E402

from fastrope.bindings.diffusers import hosts  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hosts.md"
TABLE = re.compile(r"(<!-- table: [^\n]* -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
SNIPPET = re.compile(r"^#+ (?P<title>[^\n]+)\n(?:(?!^#).)*?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = {m["title"]: m["code"] for m in SNIPPET.finditer(PAGE.read_text(encoding="utf-8"))}


def of_transformer(name: str) -> list:
    return [host for host in TINY_HOSTS.values() if type(host.build()).__name__ == name]


def table() -> str:
    lines = ["| transformer | layers | order | axes, theta | references | masked text | tested in |", "|---" * 7 + "|"]
    for row in hosts.HOSTS:
        tiny = of_transformer(row.transformer)
        defaults = inspect.signature(getattr(diffusers, row.transformer).__init__).parameters
        counts = {
            "transformer_blocks": "num_layers",
            "single_transformer_blocks": "num_single_layers",
            "layers": "n_layers",
        }
        layers = " + ".join(f"{defaults[counts[blocks]].default} {kind}" for blocks, kind in row.blocks.items())
        axes = next(defaults[name].default for name in ("axes_dims_rope", "axes_dims") if name in defaults)
        theta = row.theta(tiny[0].build())
        order = "target, text" if tiny[0].layout.order == "text-last" else "text, target"
        most = max(len(host.layout.reference_grids) for host in tiny)
        references = {0: "none", 1: "one"}.get(most, "several")
        order += ", references" if most else ""
        masked = {"identify_masked_ids": "yes", "identify_shapes": "yes", "identify_lists": "fillers of shorter rows"}
        pipelines = [f"`{type(host.pipeline()).__name__}`" for host in tiny if host.pipeline] or ["transformer alone"]
        cells = (f"`{row.transformer}`", layers, order, f"{', '.join(map(str, axes))}; {theta:g}", references,
                 masked.get(row.identify.__name__, "no"), ", ".join(dict.fromkeys(pipelines)))  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def test_the_table_is_that_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    written = TABLE.sub(lambda m: m[1] + table() + m[3], page)
    if os.environ.get("FASTROPE_WRITE_DOCS") == "1":
        PAGE.write_text(written, encoding="utf-8")
    else:
        assert page == written


def test_every_host_is_in_the_tests_and_on_the_page():
    assert {type(host.build()).__name__ for host in TINY_HOSTS.values()} == {row.transformer for row in hosts.HOSTS}
    page = PAGE.read_text(encoding="utf-8")
    for row in hosts.HOSTS:
        assert f"`{row.transformer}`" in page


class Offline:
    """A tiny pipeline under the name of a published one: checks the arguments it is called with, then runs small."""

    def __init__(self, cls):
        found = [host for host in TINY_HOSTS.values() if host.pipeline and type(host.pipeline()) is cls]
        self.host = found[0]
        self.pipe = self.host.pipeline()
        self.signature = inspect.signature(cls.__call__)
        self.runs = []

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def to(self, device):
        assert device == "cuda"
        return self

    def enable_model_cpu_offload(self):
        assert callable(self.pipe.enable_model_cpu_offload)

    def __call__(self, **arguments):
        self.signature.bind(self.pipe, **arguments)
        prompts = (TEXT, TEXT if "negative_prompt" in arguments else None)
        out = self.host.generate(self.pipe, batch=1, lengths=prompts)
        self.runs.append(out)
        return type("Output", (), {"images": [out]})


def test_the_example_without_a_download_runs(capsys):
    exec(compile(EXAMPLES["Without a download"], str(PAGE), "exec", dont_inherit=True), {"__name__": "page"})
    moved, restored = capsys.readouterr().out.splitlines()
    assert float(moved.removeprefix("moved by ")) > 1e-3
    assert restored == "restored: True"


@pytest.mark.parametrize("title", [t for t in EXAMPLES if t not in ("Without a download", "A host of your own")])
def test_examples_run(title, monkeypatch, tmp_path):
    """Each by itself, and the method it applies makes a difference."""
    from PIL import Image

    made, handles = [], []
    names = re.findall(r"^from diffusers import (\w+Pipeline)$", EXAMPLES[title], re.MULTILINE)
    assert len(names) == 1
    cls = getattr(diffusers, names[0])
    real = fr.apply

    def from_pretrained(model, torch_dtype):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model)
        assert torch_dtype is torch.bfloat16
        made.append(Offline(cls))
        return made[-1]

    monkeypatch.setattr(cls, "from_pretrained", from_pretrained)
    monkeypatch.setattr(fr, "apply", lambda *given: handles.append(real(*given)) or handles[-1])
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(set(re.findall(r'load_image\("([^"]+)"\)', EXAMPLES[title]))):
        picture = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
        picture.paste((200, 40 * n, 20), (16, 16, 48, 48))
        picture.save(tmp_path / name)
    exec(compile(EXAMPLES[title], str(PAGE), "exec", dont_inherit=True), {"__name__": "page"})
    (offline,), (handle,) = made, handles
    assert not handle.bound
    assert offline.runs
    if title == "Looking at attention":
        return
    prompts = (TEXT, TEXT if "negative_prompt" in EXAMPLES[title] else None)
    stock = offline.host.generate(offline.pipe, batch=1, lengths=prompts)
    assert all(float((out - stock).abs().max()) > 1e-4 for out in offline.runs)


def test_a_host_of_your_own_can_be_registered(monkeypatch):
    """The rows and the arithmetic; a complete one runs in test_diffusers_register.py."""
    monkeypatch.setattr(hosts, "HOSTS", list(hosts.HOSTS))
    namespace: dict = {}
    exec(compile(EXAMPLES["A host of your own"], str(PAGE), "exec", dont_inherit=True), namespace)
    assert hosts.HOSTS[0].transformer == "MyTransformer2DModel"
    layout = fr.TokenLayout(5, (3, 4))
    sequence = namespace["describe"](layout.positions("flux"), 5)
    assert sequence.layout() == layout
    assert torch.equal(sequence.positions, layout.positions("flux").double())
