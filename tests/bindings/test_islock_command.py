"""``fastrope ar-edit`` end to end, offline: the tiny model, and every host from folders of tiny random weights."""

from __future__ import annotations

import argparse
import html
import json
import re
import sys

import pytest
import tiny_hosts
import torch
from PIL import Image

from fastrope import cli
from fastrope.commands import ar_edit, ar_hosts, ar_report, ar_tiny
from fastrope.demo import report
from fastrope.pictures import open_picture

EDIT = ["--edit-prompt", "a green boat"]


def run(*arguments, out):
    return cli.main(["ar-edit", *map(str, arguments), "--out", str(out)])


def record(out):
    return json.loads((out / "record.json").read_text())


@pytest.fixture
def picture(tmp_path):
    data = (torch.rand(40, 60, 3) * 255).to(torch.uint8)
    path = tmp_path / "source.png"
    Image.frombytes("RGB", (60, 40), bytes(data.flatten().tolist())).save(path)
    return path


# ---- the tiny model -------------------------------------------------------------------------------------------------


def test_the_tiny_model_writes_a_report(tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--edit-prompt", "a forest", "--plain", "--size", 6, "--tau", 0.5]
    assert run("--model", "tiny", "--prompt", "a red boat", *EDIT, *more, out=out) == 0
    assert capsys.readouterr().out.split() == [str(out / "report.md"), str(out / "report.html")]
    for name in ("original", "edit-0", "edit-1"):
        assert Image.open(out / f"{name}.png").size == (48, 48)
    for name in ("pictures", "map", "window"):
        assert Image.open(out / f"{name}.png").width > 300
    found = record(out)
    assert found["lock"] == {"candidates": 24, "alpha": 0.6, "tau": 0.5, "metric": "l2"}
    assert [sum(found["counts"][name][row] for name in found["counts"]) for row in range(2)] == [36, 36]
    assert found["window"][0][0] == 24
    text = (out / "report.md").read_text()
    for word in ("a green boat", "a forest", "a red boat", "tau 0.5", "Kept", "![", "seed 0"):
        assert word in text


def test_prompts_are_text(tmp_path):
    """Neither mathematics in pictures nor mark-up in reports."""
    out, prompt = tmp_path / "out", r"<img src=x onerror=alert(1)> `a` | **b** $\frac{ & _c"
    assert run("--model", "tiny", "--prompt", prompt, "--edit-prompt", prompt, "--size", 3, out=out) == 0
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert page.count(html.escape(prompt)) == text.count(report.literal(prompt)) == 2
    assert "<img src=x" not in page
    assert not re.search(r"(?<!\\)<img src=x", text)
    assert record(out)["prompt"] == prompt


def test_only_files_that_were_announced_are_written(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", "tiny", "--prompt", "x", *EDIT, "--edit-prompt", "y", "--size", 3]
    assert run(*words, out=out) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(["record.json", *ar_report.names(2)])
    for path in out.iterdir():
        path.unlink()
    for name in ("record.json", "edit-1.png"):
        (out / name).write_text("mine")
        assert run(*words, out=out) == 2
        assert f"fastrope ar-edit: --out: {out / name} is there already" in capsys.readouterr().err
        assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]
        (out / name).unlink()


def test_the_same_prompt_with_every_token_allowed_changes_nothing(tmp_path):
    unlimited = ["--candidates", 125, "--alpha", 0, "--tau", "inf", "--size", 5]
    prompt = ["--prompt", "a red boat", "--edit-prompt", "a red boat"]
    assert run("--model", "tiny", *prompt, *unlimited, out=tmp_path) == 0
    found = record(tmp_path)
    assert found["counts"]["kept"] == [25]
    assert found["tokens"] == found["anchors"]
    assert (tmp_path / "original.png").read_bytes() == (tmp_path / "edit-0.png").read_bytes()


def test_seeds_decide(tmp_path):
    tokens = []
    for seed in (1, 1, 2):
        run("--model", "tiny", "--prompt", "x", *EDIT, "--size", 4, "--seed", seed, "--force", out=tmp_path)
        tokens.append(record(tmp_path)["tokens"])
    assert tokens[0] == tokens[1] != tokens[2]


def test_a_picture_takes_the_place_of_the_prompt(tmp_path, picture):
    out = tmp_path / "out"
    assert run("--model", "tiny", "--image", picture, *EDIT, "--size", 5, out=out) == 0
    fitted = ar_hosts.to_pixels(open_picture("x", picture), 40, 40) * 2 - 1
    anchors = ar_tiny.Mosaic(5, torch.device("cpu")).encode(fitted)
    assert record(out)["anchors"] == anchors.tolist()
    assert "between a picture and" in (out / "report.md").read_text()


def test_the_mosaic_keeps_pictures_of_its_colours():
    mosaic = ar_tiny.Mosaic(3, torch.device("cpu"))
    codes = torch.randint(125, (2, 9))
    assert torch.equal(mosaic.encode(mosaic.decode(codes)), codes)


def test_pictures_are_cut_in_the_middle():
    left, right = Image.new("RGB", (20, 40), (255, 0, 0)), Image.new("RGB", (20, 40), (0, 0, 255))
    whole = Image.new("RGB", (80, 40), (0, 255, 0))
    whole.paste(left, (20, 0))
    whole.paste(right, (40, 0))
    pixels = ar_hosts.to_pixels(whole, 8, 8)
    assert pixels.shape == (1, 3, 8, 8)
    assert pixels[0, :, 4, 0].tolist() == pytest.approx([1, 0, 0], abs=0.1)
    assert pixels[0, :, 4, 7].tolist() == pytest.approx([0, 0, 1], abs=0.1)


def test_tokens_are_mapped_by_class(tmp_path):
    from fastrope.bindings.anchors import Record

    window = torch.full((1, 4), 3)
    made = Record(
        torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 9, 3, 4]]), torch.zeros(1, 4), window,
        torch.tensor([[True, True, False, False]]),
    )  # fmt: skip
    found = ar_report.classes(argparse.Namespace(record=made, grid=(2, 2)), 0)
    assert found.tolist() == [[0, 1], [2, 2]]


# ---- what can go wrong ----------------------------------------------------------------------------------------------


def test_wrong_usage_is_explained(tmp_path, capsys):
    for arguments, message in [
        ([], "--model"), (["--model", "tiny", "--prompt", "x"], "--edit-prompt"),
        (["--model", "tiny", *EDIT], "--prompt (the original is generated) or --image"),
    ]:  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            run(*arguments, out=tmp_path)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny", "--tau", "-1"], "ISLock.tau"),
        (["--model", "tiny", "--image", "absent.png"], "--image: no file absent.png"),
        (["--model", "tiny", "--top-p", "2"], "top_p"),
        (["--model", "tiny", "--temperature", "0"], "top_k=1 takes the most probable token (greedy)"),
        (["--model", "janus", "--weights", "absent", "--temperature", "0"], "temperature: expected"),
        (["--model", "tiny", "--device", "mps"], "--device: expected cpu or cuda"),
        (["--model", "tiny", "--device", "nonsense"], "--device: Expected one of cpu, cuda"),
        (["--model", "tiny", "--guidance", "nan"], "--guidance: expected a finite number, received nan"),
        (["--model", "tiny", "--seed", 2**70], "--seed: expected a number of 64 bits"),
        (["--model", "tiny", "--size", 0], "--size: expected a whole number from 1, received 0"),
        (["--model", "llamagen"], "--weights is needed; LlamaGen takes t2i_XL_stage2_512.pt"),
        (["--model", "llamagen", "--weights", "absent.pt"], "--weights names no file: absent.pt; LlamaGen takes"),
        (["--model", "janus", "--weights", "absent/of/folders"], "cannot load absent/of/folders"),
        (["--model", "emu3", "--weights", "absent/of/folders"], "cannot load absent/of/folders"),
        (["--model", "janus", "--size", "3"], "--size: expected nothing else than 24 with janus"),
    ],
)
def test_what_is_missing_is_named(tmp_path, capsys, arguments, message):
    assert run(*arguments, "--prompt", "x", *EDIT, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fastrope ar-edit: ")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_named_before_anything_runs(tmp_path, capsys):
    (tmp_path / "out").write_text("x")
    assert run("--model", "tiny", "--prompt", "x", *EDIT, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--out: expected a folder" in error
    assert "token/s" not in error


def test_logits_that_are_no_numbers_are_an_error_and_no_picture(tmp_path, capsys, monkeypatch):
    build = ar_tiny.tiny_model

    def overflowing(*args):
        model = build(*args)
        torch.nn.init.constant_(model.output.weight, torch.inf)
        return model

    monkeypatch.setattr(ar_tiny, "tiny_model", overflowing)
    assert run("--model", "tiny", "--prompt", "x", *EDIT, "--size", 3, out=tmp_path / "out") == 2
    assert "--dtype: expected one in which the model's logits are numbers, received float32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "absent", "said"),
    [
        ("janus", ["transformers"], 'transformers is not installed: pip install "fastrope[transformers]"'),
        ("llamagen", ["transformers"], 'transformers is not installed: pip install "fastrope[transformers]"'),
        ("tiny", ["matplotlib"], 'matplotlib is not installed: pip install "fastrope[demo]"'),
        ("emu3", ["transformers", "PIL"], 'transformers, PIL are not installed: pip install "fastrope[demo]"'),
    ],
)
def test_missing_packages_are_named_and_how_to_get_all_of_them(model, absent, said, tmp_path, capsys, monkeypatch):
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    assert run("--model", model, "--prompt", "x", *EDIT, out=tmp_path) == 2
    assert f"fastrope ar-edit: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "weights", "size"),
    [
        ("llamagen", "files/t2i_XL_stage1_256.pt", 16), ("llamagen", "t2i_XL_stage2_512.pt", 32),
        ("llamagen", "c2i_L_384.pt", 24), ("llamagen", "mine.pt", 32), ("llamagen", None, 32), ("emu3", None, 90),
    ],
)  # fmt: skip
def test_a_published_name_tells_the_size(model, weights, size):
    assert ar_hosts.default_size(model, weights) == size


def test_help_lists_every_model(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["ar-edit", "--help"])
    assert stop.value.code == 0
    assert "{llamagen,emu3,janus,tiny}" in capsys.readouterr().out
    assert set(ar_hosts.DEFAULTS) == set(ar_edit.MODELS)


# ---- hosts from folders ---------------------------------------------------------------------------------------------


def check(out, host_grid):
    found = record(out)
    assert found["grid"] == list(host_grid)
    assert found["counts"]["kept"] == [host_grid[0] * host_grid[1]]
    assert (out / "original.png").read_bytes() == (out / "edit-0.png").read_bytes()


SAME = ["--prompt", "a boat", "--edit-prompt", "a boat", "--candidates", 9999, "--alpha", 0, "--tau", "inf"]


def test_janus_from_a_folder(tmp_path, picture):
    tiny_hosts.save_janus(tmp_path / "janus")
    weights = ["--model", "janus", "--weights", tmp_path / "janus", "--device", "cpu"]
    assert run(*weights, *SAME, out=tmp_path / "out") == 0
    check(tmp_path / "out", (4, 4))
    two = ["--edit-prompt", "a forest at night"]
    assert run(*weights, "--image", picture, *EDIT, *two, "--tau", 0.5, "--candidates", 8, out=tmp_path / "two") == 0
    assert len(record(tmp_path / "two")["tokens"]) == 2
    assert Image.open(tmp_path / "two" / "original.png").size == (8, 8)


def test_emu3_from_a_folder(tmp_path, picture):
    tiny_hosts.save_emu3(tmp_path / "emu3")
    weights = ["--model", "emu3", "--weights", tmp_path / "emu3", "--device", "cpu", "--size", 3]
    assert run(*weights, *SAME, out=tmp_path / "out") == 0
    check(tmp_path / "out", (3, 3))
    two = ["--edit-prompt", "a forest at night"]
    assert run(*weights, "--image", picture, *EDIT, *two, "--candidates", 8, out=tmp_path / "two") == 0
    found = record(tmp_path / "two")
    assert len(found["tokens"]) == 2
    assert all(60 <= token < 92 for row in found["tokens"] for token in row)
    assert Image.open(tmp_path / "two" / "original.png").size == (24, 24)


def test_llamagen_from_files(tmp_path, picture, monkeypatch, capsys):
    from fastrope.bindings import llamagen

    monkeypatch.setitem(llamagen.SIZES, "tiny", tiny_hosts.LLAMAGEN_SIZE)
    shapes = tiny_hosts.save_llamagen(tmp_path / "t2i.pt", tmp_path / "vq.pt", tmp_path / "t5")
    weights = ["--model", "llamagen", "--weights", tmp_path / "t2i.pt", "--tokenizer", tmp_path / "vq.pt"]
    weights += ["--text-encoder", tmp_path / "t5", "--size", 3, "--device", "cpu"]
    same = [*SAME[:4], "--candidates", 16384, *SAME[6:]]
    assert run(*weights, *same, out=tmp_path / "out") == 0
    check(tmp_path / "out", (3, 3))
    assert run(*weights, "--image", picture, *EDIT, out=tmp_path / "two") == 0
    found = record(tmp_path / "two")
    assert found["window"][0] == [150 * (15 - i) // 15 for i in range(9)]
    assert Image.open(tmp_path / "two" / "original.png").size == (48, 48)
    labels = llamagen.LlamaGenConfig(**{**shapes, "condition": "class", "prefix": 1})
    torch.save(llamagen.LlamaGen(labels).state_dict(), tmp_path / "c2i.pt")
    weights[3] = tmp_path / "c2i.pt"
    assert run(*weights, *SAME, out=tmp_path / "none") == 2
    assert "a text-conditional (t2i) checkpoint" in capsys.readouterr().err
