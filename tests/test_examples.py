"""``examples/``: every script runs on the tiny models, and its method changes the picture."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import runpy
import sys
from pathlib import Path

import pytest
import torch
from source_tree import ROOT

import fastrope as fr

FOLDER = ROOT / "examples"
SCREEN = 50  # lines
PICTURES = {
    "grag": ["grag-0.95", "grag-1", "grag-1.15"],
    "looserope": ["looserope"],
    "untwisting": ["untwisting"],
    "islock": ["islock-original", "islock-edit"],
    "custom_method": ["custom-method"],
    "inspect_attention": ["attention-stock", "attention-grag"],
    "strength": ["strength-freer", "strength-louder", "strength-without"],
    "regions": ["regions"],
    "nag": ["nag-1", "nag-5"],
    "high_resolution": [f"high-resolution-{name}" for name in ("stock", "sharper", "rescaled")],
    "long_video": ["long-video-stock", "long-video-rescaled"],
    "attention_op": [],
    "any_attention": [],
}
ELSEWHERE = ("common", "parallel_edit")  # the latter is run by bindings/test_diffusers_parallel.py
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if path.stem not in ELSEWHERE]


@pytest.fixture(autouse=True)
def _threads():
    """Scripts with ``--tiny`` set their number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(name: str, monkeypatch, *arguments: object) -> None:
    """As ``python examples/name.py`` does, in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [name, "--tiny", *map(str, arguments)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def pixels(path: Path) -> torch.Tensor:
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as picture:
        return torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.uint8)


@pytest.mark.parametrize("name", PICTURES)
def test_runs_anywhere(name, tmp_path, monkeypatch):
    for host in ("diffusers", "transformers", "matplotlib"):
        pytest.importorskip(host)
    run(name, monkeypatch, *(["--out", tmp_path] if PICTURES[name] else []))
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(PICTURES[name])
    pictures = [pixels(tmp_path / f"{stem}.png") for stem in PICTURES[name]]
    assert all(len(picture.unique()) > 1 for picture in pictures)
    assert not any(torch.equal(a, b) for n, a in enumerate(pictures) for b in pictures[:n])


@pytest.mark.parametrize(("name", "picture"), [
    ("looserope", "looserope"), ("custom_method", "custom-method"), ("regions", "regions"),
])  # fmt: skip
def test_the_method_changes_the_picture(name, picture, tmp_path, monkeypatch):
    """Against the same script without one."""
    run(name, monkeypatch, "--out", tmp_path)
    made = pixels(tmp_path / f"{picture}.png")
    monkeypatch.setattr(fr, "apply", lambda pipe, *methods: contextlib.nullcontext())
    run(name, monkeypatch, "--out", tmp_path)
    assert not torch.equal(made, pixels(tmp_path / f"{picture}.png"))


@pytest.mark.parametrize(("make", "name"), [
    ("editor", "FluxKontextPipeline"), ("text_to_image", "FluxPipeline"), ("video", "WanPipeline"),
])  # fmt: skip
def test_published_pipelines_take_what_they_are_called_with(make, name, tmp_path, monkeypatch):
    kind, image = getattr(pytest.importorskip("diffusers"), name), pytest.importorskip("PIL.Image")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["script", "--image", str(tmp_path / "photo.png")])
    image.new("RGB", (48, 32)).save(tmp_path / "photo.png")
    offloaded: list[object] = []
    monkeypatch.setattr(kind, "enable_model_cpu_offload", lambda pipe: offloaded.append(pipe))
    monkeypatch.setattr(kind, "from_pretrained", classmethod(lambda cls, model, torch_dtype: object.__new__(cls)))
    common = importlib.import_module("common")
    options = common.options("", prompt=("a harbour", "a 3"), image="", delta=1.5)
    assert (options.prompt, options.delta) == ("a harbour", 1.5)
    pipe, call = getattr(common, make)(options)
    inspect.signature(kind.__call__).bind(pipe, **call, generator=None)
    assert (call["prompt"], offloaded) == ("a harbour", [pipe])
    assert make != "editor" or (call["width"], call["height"]) == (48, 32)


def test_every_script_is_run_and_fits_a_screen():
    assert {path.stem for path in SCRIPTS} == set(PICTURES)
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= SCREEN, path.name
        assert f"python examples/{path.name} --tiny" in text
