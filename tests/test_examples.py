"""``examples/``: every script runs on the tiny models, and its method changes the picture."""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path

import pytest
import torch
from source_tree import ROOT

import fastrope as fr

FOLDER = ROOT / "examples"
SCREEN = 70  # lines
PICTURES = {
    "grag": ["grag-0.95", "grag-1", "grag-1.15"],
    "looserope": ["looserope"],
    "untwisting": ["untwisting"],
    "islock": ["islock-original", "islock-edit"],
    "custom_method": ["custom-method"],
    "inspect_attention": ["attention-stock", "attention-grag"],
    "attention_op": [],
}
ELSEWHERE = ("tiny_models", "parallel_edit")  # the latter is run by bindings/test_diffusers_parallel.py
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if path.stem not in ELSEWHERE]


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


@pytest.mark.parametrize(("name", "picture"), [("looserope", "looserope"), ("custom_method", "custom-method")])
def test_the_method_changes_the_picture(name, picture, tmp_path, monkeypatch):
    """Against the same script without one."""
    run(name, monkeypatch, "--out", tmp_path)
    made = pixels(tmp_path / f"{picture}.png")
    monkeypatch.setattr(fr, "apply", lambda pipe, *methods: contextlib.nullcontext())
    run(name, monkeypatch, "--out", tmp_path)
    assert not torch.equal(made, pixels(tmp_path / f"{picture}.png"))


def test_every_script_is_run_and_fits_a_screen():
    assert {path.stem for path in SCRIPTS} == set(PICTURES)
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= SCREEN, path.name
        assert f"python examples/{path.name} --tiny" in text
