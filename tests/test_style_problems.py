"""What ``fastrope style`` and ``fastrope sweep`` cannot do, and say in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_files import draw, photo

from fastrope.cli import main

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", ["style", "sweep"])
@pytest.mark.parametrize(("words", "message"), [
    (["--reference", "none.png"], "--reference: no file none.png"),
    (["--reference", "text.png"], "--reference: text.png is no picture"),
    (["--beta", "0"], "UntwistingRoPE.beta: expected a number above 0, received 0.0"),
    (["--adain", "2"], "UntwistingRoPE.adain: expected a strength in 0..1, received 2.0"),
    (["--trajectory", "rf_inversion", "--gamma", "2"], "gamma: expected a number in 0..1, received 2.0"),
    (["--out", "picture.what"], "--out: unknown file extension"),
    (["--out", "text.png/picture.png"], "--out: "),
    (["--steps", "0"], "--steps: expected at least 1, received 0"),
    (["--width", "0"], "--width: expected at least 1, received 0"),
    (["--native", "--height", "-8"], "--height: expected at least 1, received -8"),
    (["--seed", str(-(2**64))], "--seed: expected a number of 64 bits"),
    (["--reference-seed", str(2**70)], "--reference-seed: expected a number of 64 bits"),
    (["--guidance", "inf"], "--guidance: expected a finite number, received inf"),
    (["--negative-prompt", "x"], "--negative-prompt: FluxPipeline takes none, its guidance is distilled"),
    (["--device", "nowhere"], "--device: "),
    (["--offload", "--device", "cpu"], "--offload: expected a GPU to keep parts on, received cpu"),
    (["--blocks", "joint"], "kinds: expected some of the model's kinds of block, ('double', 'single'), received"),
    (["--layers", "7-9"], "layers: expected some of the model's 3 layers"),
    (["--native", "--reference", "ref.png", "--reference", "ref.png"], "--image: expected one picture"),
])  # fmt: skip
def test_problems_are_named_in_one_line(words, message, command, capsys):
    photo("ref.png")
    Path("text.png").write_text("text")
    assert draw(*words, command=command) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"fastrope {command}: ")]
    assert len(said) == 1
    assert said[0].startswith(f"fastrope {command}: {message}")


def test_three_numbers_are_too_many(capsys):
    assert draw("--s-hf", "0", "1", "2") == 2
    assert "fastrope style: --s-hf: expected one number, or those of the first and the last step" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["style", "sweep"])
@pytest.mark.parametrize(("words", "message"), [
    (["--model", "x/y", "--prompt", "x"], "--reference is needed, for every model but tiny"),
    (["--model", "x/y", "--reference", "a.png"], "--prompt is needed, for every model but tiny"),
    (["--model", "tiny", "--gamma", "0.5"], "--gamma belongs to --trajectory rf_inversion"),
    (["--model", "tiny", "--native", "--cache", "host"], "--cache is for a shared reference"),
    (["--model", "tiny", "--native", "--trajectory", "rf_inversion"], "--trajectory is for a shared reference"),
    (["--model", "tiny", "--native", "--reference-prompt", "x"], "--reference-prompt is for a shared reference"),
    (["--model", "tiny", "--native", "--reference-seed", "3"], "--reference-seed is for a shared reference"),
    (["--model", "tiny", "--trajectory", "ddim"], "invalid choice: 'ddim'"),
    (["--model", "tiny", "--preset", "mine"], "invalid choice: 'mine'"),
    (["--model", "tiny", "--axis0", "high"], "expected low, match or a number, received 'high'"),
    (["--model", "tiny", "--layers", "5-2"], "expected FIRST-LAST, received '5-2'"),
    (["--model", "tiny", "--s-hf", "few"], "few"),
])  # fmt: skip
def test_usage(words, message, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["style", "sweep"])
def test_absent_weights(command, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([command, "--model", "nobody/nothing", "--reference", photo("a.png"), "--prompt", "x"]) == 2
    said = capsys.readouterr().err
    assert f"fastrope {command}: cannot load nobody/nothing: " in said
    assert "hf download nobody/nothing" in said


@pytest.mark.parametrize(("command", "package", "extra"), [
    ("style", "diffusers", "diffusers"), ("style", "transformers", "transformers"), ("style", "PIL", "demo"),
    ("sweep", "diffusers", "diffusers"), ("sweep", "matplotlib", "demo"), ("sweep", "tqdm", "demo"),
])  # fmt: skip
def test_absent_packages(command, package, extra, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert draw(command=command) == 2
    said = capsys.readouterr().err
    assert f'fastrope {command}: {package} is not installed: pip install "fastrope[{extra}]"' in said


def test_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    assert "style" in listed
    assert "sweep" in listed
