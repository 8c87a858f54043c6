"""What ``fastrope edit`` cannot do, and says in one line."""

from __future__ import annotations

import sys

import pytest
import tiny_flux
import torch
from command_files import edit, mask, photo

from fastrope.cli import main
from fastrope.commands import editors

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "grag", "--image", "none.png"], "fastrope edit: --image: no file none.png"),
    (["--method", "looserope", "--image", "photo.png"], "fastrope edit: looserope wants --mask or --original"),
    (["--method", "looserope", "--image", "photo.png", "--mask", "small.png"], "fastrope edit: mask: expected the si"),
    (["--method", "looserope", "--image", "text.png", "--mask", "mask.png"], "fastrope edit: --image: text.png is no"),
    (["--method", "looserope", "--image", "photo.png", "--original", "photo.png"], "fastrope edit: original: expected"),
    (["--method", "grag", "--image", "photo.png", "--image", "photo.png"], "fastrope edit: --image: expected one"),
    (["--method", "grag", "--delta", "1", "2"], "fastrope edit: GRAG.delta: expected 1 values, one per reference"),
    (["--method", "looserope", "--levels", "1"], "fastrope edit: LooseRoPE.levels: expected an integer of at least 2"),
    (["--method", "grag", "--out", "text.png/picture.png"], "fastrope edit: --out: "),
    (["--method", "grag", "--device", "nowhere"], "fastrope edit: --device: "),
    (["--method", "grag", "--layers", "7-9"], "fastrope edit: layers: expected some of the model's 3 layers"),
    (["--method", "grag", "--steps", "0"], "fastrope edit: --steps: expected at least 1, received 0"),
    (["--method", "grag", "--seed", str(2**64)], "fastrope edit: --seed: expected a number of 64 bits"),
    (["--method", "grag", "--guidance", "nan"], "fastrope edit: --guidance: expected a finite number, received nan"),
    (["--method", "grag", "--offload"], "fastrope edit: --offload: expected a GPU to keep parts on, received cpu"),
    (["--method", "grag", "--negative-prompt", "x"], "fastrope edit: --negative-prompt: FluxKontextPipeline takes"),
    (["--method", "looserope", "--out", "picture.what"], "fastrope edit: --out: unknown file extension: .what; pict"),
    (["--method", "looserope", "--out", "edited"], "fastrope edit: --out: unknown file extension: none; edited.png"),
])  # fmt: skip
def test_problems_are_named_in_one_line(words, message, capsys):
    photo("photo.png")
    mask("mask.png")
    mask("small.png", (10, 10))
    with open("text.png", "w") as file:
        file.write("text")
    assert edit(*words) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastrope edit: ")]
    assert len(said) == 1
    assert said[0].startswith(message)


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "grag", "--model", "tiny", "--boost", "1"], "--boost belongs to --method looserope"),
    (["--method", "looserope", "--model", "tiny", "--delta", "1"], "--delta belongs to --method grag"),
    (["--method", "grag", "--model", "tiny", "--max-tries", "1"], "--max-tries belongs to --method looserope"),
    (["--method", "looserope", "--model", "tiny", "--max-tries", "1"], "--max-tries wants a --judge"),
    (["--method", "grag", "--model", "x/y"], "--image is needed"),
    (["--method", "grag", "--model", "x/y", "--image", "a.png"], "grag wants a --prompt"),
    (["--method", "looserope", "--model", "x/y", "--image", "a.png"], "looserope wants --mask or --original"),
    (["--method", "looserope", "--model", "tiny", "--layers", "5-2"], "expected FIRST-LAST, received '5-2'"),
    (["--method", "looserope", "--model", "tiny", "--levels", "few"], 'expected a number or "continuous"'),
])  # fmt: skip
def test_usage(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["edit", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_absent_weights(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert (
        main(["edit", "--method", "grag", "--model", "nobody/nothing", "--image", photo("a.png"), "--prompt", "x"]) == 2
    )
    said = capsys.readouterr().err
    assert "fastrope edit: cannot load nobody/nothing: " in said
    assert "hf download nobody/nothing" in said


def test_an_absent_detector(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    assert edit("--method", "looserope", "--saliency", "mask_rcnn") == 2
    assert 'fastrope edit: saliency="mask_rcnn" needs torchvision' in capsys.readouterr().err


def test_nothing_is_loaded_for_a_result_that_cannot_be_written(capsys, monkeypatch):
    monkeypatch.setattr("fastrope.commands.edit.load", None)
    assert edit("--method", "grag", "--out", "picture.what") == 2


def test_absent_judge(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert edit("--method", "looserope", "--judge", "nobody/nothing") == 2
    assert "fastrope edit: --judge: cannot load nobody/nothing: " in capsys.readouterr().err


@pytest.mark.parametrize(("package", "extra"), [("diffusers",) * 2, ("transformers",) * 2, ("PIL", "demo")])
def test_absent_packages(capsys, monkeypatch, package, extra):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert edit("--method", "looserope") == 2
    said = capsys.readouterr().err
    assert f'fastrope edit: {package} is not installed: pip install "fastrope[{extra}]"' in said


def test_a_model_that_reads_no_picture_is_named(tmp_path, capsys):
    from diffusers import FluxPipeline

    FluxPipeline(**tiny_flux.parts()).save_pretrained(tmp_path / "flux")
    words = "--model", str(tmp_path / "flux"), "--image", photo("a.png"), "--prompt", "x"
    assert main(["edit", "--method", "grag", *words]) == 2
    said = capsys.readouterr().err
    assert "fastrope edit: --model: expected a model that reads pictures (FLUX.1 Kontext, FLUX.2, Qwen-Image" in said


def test_a_folder_without_is_named(tmp_path):
    with pytest.raises(editors.Missing, match=r"^cannot load .*: .*model_index.json"):
        editors.load(str(tmp_path), torch.device("cpu"), torch.float32, False)
