"""Files that ``fastrope edit`` keeps, replaces or refuses, and runs that break off."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from command_files import edit, pixels
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def only_line(capsys, start: str) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "fastrope edit: " in line]
    assert line.startswith(f"fastrope edit: {start}")
    return line


@pytest.mark.parametrize(("taken", "words"), [
    ("photo.json", ["--out", "photo.png"]), ("photo-plain.png", ["--out", "photo.png", "--plain"]), ("edit.png", []),
    ("edit.json", []),
])  # fmt: skip
def test_files_that_nobody_named_are_kept(taken, words, capsys, monkeypatch):
    Path(taken).write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("fastrope.commands.edit.load", None)  # nothing is loaded before it is said
        assert edit("--method", "grag", *words) == 2
    only_line(capsys, f"--out: {taken} is there already; --force replaces it")
    assert Path(taken).read_text() == "mine"
    assert edit("--method", "grag", *words, "--force") == 0
    assert Path(taken).read_bytes() != b"mine"


@pytest.mark.parametrize(("out", "message"), [
    ("folder.png", "--out: expected a file, received folder.png"), ("a.psd", "--out: pictures in PSD can be read but "),
    ("text/a.png", "--out: expected a folder, received text"),
])  # fmt: skip
def test_a_result_that_cannot_be_written_is_refused_before_the_work(out, message, capsys, monkeypatch):
    monkeypatch.setattr("fastrope.commands.edit.load", None)
    Path("folder.png").mkdir()
    Path("text").touch()
    assert edit("--method", "grag", "--out", out) == 2
    only_line(capsys, message)


def test_a_result_that_is_not_finite_is_no_picture(capsys, monkeypatch):
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert edit("--method", "grag", "--delta", "1e300") == 2
    only_line(capsys, "the result: expected finite pixels (smaller dials, or the --dtype that")
    step = FlowMatchEulerDiscreteScheduler.step  # no dial of LooseRoPE goes so far
    broken = lambda self, *given, **more: (step(self, *given, **more)[0] * torch.nan,)  # noqa: E731
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", broken)
    assert edit("--method", "looserope", "--judge", "region", "--max-tries", "1") == 2
    assert "fastrope edit: the result: expected finite pixels" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(capsys, monkeypatch):
    Path("photo.png").write_text("mine")

    def save(self, path, format=None):
        if isinstance(path, Path):  # the trial of the format goes to memory
            path.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert edit("--method", "grag", "--out", "photo.png") == 2
    only_line(capsys, "photo.png: No space left on device")
    assert [path.name for path in Path().iterdir()] == ["photo.png"]
    assert Path("photo.png").read_text() == "mine"


@pytest.mark.parametrize(("error", "code", "message"), [
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory; --offload, --dtype bfloat16 or a small"),
    (KeyboardInterrupt(), 130, "interrupted"),
])  # fmt: skip
def test_a_run_that_is_broken_off_is_told_in_one_line(error, code, message, capsys, monkeypatch):
    def fail(*given, **more):
        raise error

    monkeypatch.setattr("diffusers.FlowMatchEulerDiscreteScheduler.step", fail)
    assert edit("--method", "grag") == code
    only_line(capsys, message)
    assert list(Path().iterdir()) == []


def test_a_result_that_was_named_is_replaced():
    Path("photo.png").write_text("mine")
    assert edit("--method", "grag", "--out", "photo.png") == 0
    assert pixels("photo.png").shape == (32, 32, 3)
