"""docs/untwisting.md runs as it stands: published names lead to tiny random models, commands with ``--model tiny`` are
carried out, the others parsed; its tables are the code's."""

from __future__ import annotations

import functools
import inspect
import math
import re
import shlex
import zlib
from pathlib import Path

import pytest
import torch
from pages import carry_out, commands_of, page

import fastrope as fr
from fastrope.commands import style, sweep
from fastrope.methods.untwisting import PRESETS

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipelines  # noqa: E402
import tiny_transformers  # noqa: E402
from trajectory_runs import PIPELINES  # noqa: E402

from fastrope.bindings.diffusers import trajectories  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PAGE = page("untwisting.md")
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = commands_of("untwisting.md")
MODELS = {
    "FluxPipeline": ("black-forest-labs/FLUX.1-dev", "flux"),
    "Flux2Pipeline": ("black-forest-labs/FLUX.2-dev", "flux2"),
    "QwenImagePipeline": ("Qwen/Qwen-Image", "qwen"),
    "ZImagePipeline": ("Tongyi-MAI/Z-Image-Turbo", "z-image"),
    "FluxKontextPipeline": ("black-forest-labs/FLUX.1-Kontext-dev", "kontext"),
    "QwenImageEditPlusPipeline": ("Qwen/Qwen-Image-Edit-2509", "qwen-edit-plus"),
}


def words(prompt, rows: int = 1) -> torch.Tensor:
    several = [prompt] * rows if isinstance(prompt, str) else prompt
    made = [tiny_pipelines.prompt(1, tiny_transformers.TEXT, zlib.crc32(p.encode())) for p in several]
    return torch.cat(made)


def encoded(name: str, prompt) -> tuple:
    """What ``encode_prompt`` of a host gives."""
    embeds = words(prompt)
    if name in ("flux", "kontext"):
        return embeds, embeds.mean(dim=1), torch.zeros(tiny_transformers.TEXT, 3)
    if name == "flux2":
        ids = torch.zeros(len(embeds), tiny_transformers.TEXT, 4)
        ids[..., 3] = torch.arange(tiny_transformers.TEXT)
        return embeds, ids
    if name == "z-image":
        return list(embeds), []
    return embeds, torch.ones(embeds.shape[:2], dtype=torch.bool)


def small(name: str):
    """A pipeline under its published name: sizes shrunk by 64 and few steps, where the page asks for real ones."""
    torch.manual_seed(0)
    pipe = tiny_pipelines.qwen_pipeline() if name == "qwen-edit-plus" else PIPELINES[name]()
    kind = type(pipe)

    runs: list[int] = []

    class Small(kind):
        @functools.wraps(kind.__call__)
        def __call__(self, *args, num_inference_steps, height=1024, width=1024, **arguments):
            runs.append(num_inference_steps)
            arguments |= {"height": height // 64, "width": width // 64, "num_inference_steps": 3}
            if name == "kontext":
                arguments |= {"max_area": 64, "_auto_resize": False}
            return super().__call__(*args, **arguments)

        def encode_prompt(self, prompt=None, **arguments):
            return encoded(name, prompt)

        def to(self, *args, **kwargs):
            return self

        def enable_model_cpu_offload(self):
            pass

    pipe.__class__ = Small
    pipe.__dict__["runs"] = runs
    return pipe


@pytest.fixture
def published(monkeypatch, tmp_path):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for name in ("ref", "photo"):
        picture = Image.radial_gradient("L").resize((64, 65 if name == "photo" else 64)).convert("RGB")
        picture.paste((200, 40, 20), (16, 16, 48, 48))
        picture.save(f"{name}.png")
    loaded = []
    for kind, (model, name) in MODELS.items():

        def load(cls, given, torch_dtype, model=model, name=name):
            assert given == model
            assert torch_dtype is torch.bfloat16
            loaded.append(small(name))
            return loaded[-1]

        monkeypatch.setattr(getattr(diffusers, kind), "from_pretrained", classmethod(load))
    module = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus"
    monkeypatch.setattr(f"{module}.calculate_dimensions", lambda area, ratio: (10, 6))
    return loaded


def chains() -> list[list[str]]:
    """Snippets that go on where the last one ended, and a new chain wherever one imports torch anew."""
    found: list[list[str]] = []
    for code in PYTHON:
        if code.startswith("import torch"):
            found.append([])
        found[-1].append(code)
    return found


@pytest.mark.parametrize("chain", chains(), ids=lambda chain: re.search(r"import (\w+Pipeline)", chain[0])[1])
def test_examples_run(chain, published, monkeypatch):
    """And the method makes a difference: the same call without it draws something else."""
    handles = []
    real = fr.apply

    def apply(pipe, *methods, **options):
        assert methods
        handles.append(real(pipe, *methods, **options))
        return handles[-1]

    monkeypatch.setattr(fr, "apply", apply)
    namespace = {"__name__": "page"}
    for code in chain:
        exec(compile(code, "untwisting.md", "exec", dont_inherit=True), namespace)
    (pipe,) = published
    assert pipe.runs
    assert handles
    assert not any(handle.bound for handle in handles)
    drawn = [Path(name) for name in re.findall(r'save\("([^"]+)"\)', "".join(chain))]
    assert drawn
    assert all(path.stat().st_size > 0 for path in drawn)
    monkeypatch.setattr(fr, "apply", lambda pipe, *methods, **options: real(pipe))
    before = drawn[0].read_bytes()
    namespace = {"__name__": "page"}
    exec(compile(chain[0], "untwisting.md", "exec", dont_inherit=True), namespace)
    assert drawn[0].read_bytes() != before


def test_every_host_has_an_example():
    assert {re.search(r"import (\w+Pipeline)", chain[0])[1] for chain in chains()} == set(MODELS)


def test_the_bands_are_the_codes():
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [0, 7, 14, 21, 27]
    tokens = fr.TokenLayout(4, (2, 2))
    first, last = (fr.UntwistingRoPE().weights(fr.Site(tokens, step=step, num_steps=28)) for step in (0, 27))
    for d, period, at_first, at_last in rows:
        d = int(d)
        assert float(period) == pytest.approx(2 * math.pi * 10_000 ** (d / 28), rel=0.01)
        assert float(at_first) == pytest.approx(float(first[8 + d]), abs=5.1e-4)
        assert float(at_last) == pytest.approx(float(last[8 + d]), abs=5.1e-4)
    slowest = re.search(r"the slowest pair turns in (\d+) tokens", PAGE)
    assert int(slowest[1]) == round(2 * math.pi * 256 ** (23 / 24))


def test_the_dials_are_the_codes():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \| [^|]+ \|$", PAGE, re.MULTILINE))
    assert set(rows) == {"s_hf", "s_lf", "beta", "adain", "axis0", "ramp"}
    for name, text in rows.items():
        assert eval(text) == getattr(fr.UntwistingRoPE(), name)


def test_the_presets_are_the_codes():
    rows = re.findall(r"^\| `([\w.-]+)` \| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \| ", PAGE, re.MULTILINE)
    assert {row[0] for row in rows} == set(PRESETS)
    for preset, *texts in rows:
        method = fr.UntwistingRoPE.from_preset(preset)
        for name, text in zip(("s_hf", "s_lf", "beta", "adain"), texts, strict=True):
            assert eval(text) == getattr(method, name)


def test_the_default_gamma_is_as_stated():
    gamma = inspect.signature(trajectories.prepare_reference).parameters["gamma"].default
    assert f"The default is the published {gamma:g}." in PAGE
    assert gamma == 0.5


def test_the_memory_is_as_stated():
    layer = 2 * 4096 * 24 * 128 * 2 / 2**20
    assert f"takes {layer:.0f} MiB per layer and step" in PAGE
    assert f"are {38 * 28 * layer / 1024:.0f} GiB" in PAGE


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, tmp_path, monkeypatch, capsys):
    carry_out(command, {"style": style, "sweep": sweep}, 2, tmp_path, monkeypatch, capsys)


def test_commands_are_found():
    assert sum("--model tiny" in command for command in COMMANDS) == 2
    assert len(COMMANDS) == 6


def test_the_picture_is_of_the_command_below_it():
    from PIL import Image

    shown = re.search(r"^!\[[^\]]*\]\(([^)]+)\)\n\n`fastrope sweep ([^`]+)`", PAGE, re.MULTILINE)
    with Image.open(ROOT / "docs" / shown[1]) as picture:
        assert picture.width > 600
    options = sweep._parser().parse_args(shlex.split(shown[2].replace("\n", " ")))
    assert (options.model, len(options.s_hf), len(options.s_lf)) == ("tiny", 4, 3)
