"""``fastrope ar-edit`` end to end, offline: the trained tiny model, and every host from folders of random weights."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import shots
import tiny_hosts
import torch
from PIL import Image
from shots import differ, pixels

from fastrope import cli, lab
from fastrope.bindings.anchors import Record
from fastrope.commands import ar_edit, ar_hosts
from fastrope.lab.codes import Codebook
from fastrope.pictures import open_picture

pytest.importorskip("diffusers")
EDIT = ["--edit-prompt", "a green 5"]
TINY = ["--model", "tiny", "--prompt", "a red 3 on white", *EDIT]
FILES = ["edit-0.png", "original.png", "record.json", "sheet.png"]


def run(*arguments, out):
    return cli.main(["ar-edit", *map(str, arguments), "--out", str(out)])


def record(out):
    return shots.record(out / "record.json")


@pytest.fixture
def picture(tmp_path):
    return shots.photo(str(tmp_path / "source.png"), (60, 40))


# ---- the tiny model -------------------------------------------------------------------------------------------------


def test_the_tiny_model_draws_edits_and_what_happened_to_tokens(tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--edit-prompt", "a blue 3 in checks", "--plain", "--tau", 0.5, "--candidates", 24]
    assert run(*TINY, *more, out=out) == 0
    said = capsys.readouterr()
    names = ["record.json", "sheet.png", "original.png", "edit-0.png", "edit-1.png"]
    assert said.out.split() == [str(out / name) for name in names]
    assert all(f"{label}: 100%" in said.err for label in ("original", "without anchors", "edit"))
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names[2:]:
        assert Image.open(out / name).size == (256, 256)
    assert Image.open(out / "sheet.png").width > 1000
    found = record(out)
    assert found["lock"] == {"candidates": 24, "alpha": 0.6, "tau": 0.5, "metric": "l2"}
    assert [sum(found["counts"][name][row] for name in found["counts"]) for row in range(2)] == [64, 64]
    assert found["window"][0][0] == 24
    assert (found["prompt"], found["edit_prompt"]) == ("a red 3 on white", ["a green 5", "a blue 3 in checks"])
    assert (found["seed"], found["device"], found["grid"]) == (0, "cpu", [8, 8])


def test_a_newcomer_needs_no_prompt(tmp_path):
    assert run("--model", "tiny", out=tmp_path) == 0
    assert record(tmp_path)["edit_prompt"] == [ar_edit.TINY_EDIT]
    assert differ(tmp_path / "original.png", tmp_path / "edit-0.png")


def test_files_that_nobody_named_are_kept(tmp_path, capsys):
    for name in FILES:
        (tmp_path / name).write_text("mine")
        assert run(*TINY, out=tmp_path) == 2
        assert f"fastrope ar-edit: --out: {tmp_path / name} is there already" in capsys.readouterr().err
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]
        (tmp_path / name).unlink()


def test_every_token_allowed_changes_nothing_and_seeds_decide(tmp_path):
    unlimited = ["--candidates", 512, "--alpha", 0, "--tau", "inf", "--force"]
    tokens = []
    for seed in (1, 1, 2):
        assert run(*TINY, *unlimited, "--seed", seed, out=tmp_path) == 0
        found = record(tmp_path)
        assert found["counts"]["kept"] == [64]
        assert found["tokens"] == found["anchors"]
        assert not differ(tmp_path / "original.png", tmp_path / "edit-0.png")
        tokens.append(found["tokens"])
    assert tokens[0] == tokens[1] != tokens[2]


def test_a_picture_takes_the_place_of_the_prompt(tmp_path, picture):
    out = tmp_path / "out"
    assert run("--model", "tiny", "--image", picture, *EDIT, out=out) == 0
    fitted = ar_hosts.to_pixels(open_picture("x", picture), 16, 16) * 2 - 1
    anchors = Codebook(lab.load("author").codebook).encode(fitted)
    assert record(out)["anchors"] == anchors.tolist()
    assert record(out)["prompt"] is None


def test_pictures_are_cut_in_the_middle():
    left, right = Image.new("RGB", (20, 40), (255, 0, 0)), Image.new("RGB", (20, 40), (0, 0, 255))
    whole = Image.new("RGB", (80, 40), (0, 255, 0))
    whole.paste(left, (20, 0))
    whole.paste(right, (40, 0))
    found = ar_hosts.to_pixels(whole, 8, 8)
    assert found.shape == (1, 3, 8, 8)
    assert found[0, :, 4, 0].tolist() == pytest.approx([1, 0, 0], abs=0.1)
    assert found[0, :, 4, 7].tolist() == pytest.approx([0, 0, 1], abs=0.1)


def test_tokens_are_mapped_by_class(tmp_path):
    accepted = torch.tensor([[True, True, False, False]])
    tokens, anchors = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 9, 3, 4]])
    made = Record(tokens, anchors, torch.tensor([[0, 2, torch.inf, torch.inf]]), torch.full((1, 4), 3), accepted)
    ar_edit.token_map(made, 0, (2, 2)).save(tmp_path / "map.png")
    colours = ["#{:02X}{:02X}{:02X}".format(*colour) for colour in pixels(tmp_path / "map.png").reshape(4, 3)]
    assert colours == [ar_edit.CLASSES[name] for name in ("kept", "moved", "fallback", "fallback")]
    assert ar_edit._counts(made, 0) == "kept 1, moved 1, fallback 2\nmedian distance 0"


def test_the_sheet_has_every_picture_and_prompts_as_text(monkeypatch):
    written = []
    monkeypatch.setattr(ar_edit, "sheet", lambda rows, caption, side: written.append((rows, caption)))
    made = SimpleNamespace(record=Record(*torch.zeros(4, 2, 4, dtype=torch.long), torch.ones(2, 4) > 0))
    pictures = {name: [f"{name} {row}" for row in range(2)] for name in ("original", "edit", "plain")}
    options = SimpleNamespace(image=None, prompt="$x$", edit_prompt=["a", "b" * 99], plain=True, seed=3)
    ar_edit.draw(options, ar_edit.ISLock(), SimpleNamespace(grid=(2, 2), name="some"), made, pictures)
    ((rows, caption),) = written
    assert [(cell.picture, cell.title) for cell in rows[0]] == [
        ("original 0", "$x$"), ("edit 0", "a"), ("edit 1", "b" * 31 + "..."),
    ]  # fmt: skip
    assert [cell and cell.picture for cell in rows[1]] == [None, "plain 0", "plain 1"]
    assert [cell and cell.below[:6] for cell in rows[2]] == [None, "kept 4", "kept 4"]
    assert "seed 3" in caption


# ---- what can go wrong ----------------------------------------------------------------------------------------------


def test_wrong_usage_is_explained(tmp_path, capsys):
    for arguments, message in [
        ([], "--model"), (["--model", "janus", "--prompt", "x"], "--edit-prompt is needed"),
        (["--model", "janus", *EDIT], "--prompt (the original is generated) or --image"),
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
        (["--model", "tiny", "--size", 6], "--size: expected nothing else than 8 with tiny, received 6"),
        (["--model", "tiny", "--edit-prompt", "a boat"], "--edit-prompt: expected words that the tiny model knows"),
        (["--model", "llamagen"], "--weights is needed; LlamaGen takes t2i_XL_stage2_512.pt"),
        (["--model", "llamagen", "--weights", "absent.pt"], "--weights names no file: absent.pt; LlamaGen takes"),
        (["--model", "janus", "--weights", "absent/of/folders"], "cannot load absent/of/folders"),
        (["--model", "emu3", "--weights", "absent/of/folders"], "cannot load absent/of/folders"),
        (["--model", "janus", "--size", "3"], "--size: expected nothing else than 24 with janus"),
    ],
)
def test_what_is_missing_is_named(tmp_path, capsys, arguments, message):
    assert run(*arguments, "--prompt", "a 3", *EDIT, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fastrope ar-edit: ")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_named_before_anything_runs(tmp_path, capsys):
    (tmp_path / "out").write_text("x")
    assert run("--model", "tiny", "--prompt", "a 3", *EDIT, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--out: expected a folder" in error
    assert "token/s" not in error


def test_logits_that_are_no_numbers_are_an_error_and_no_picture(tmp_path, capsys, monkeypatch):
    load = lab.load

    def overflowing(name):
        author = load(name)
        torch.nn.init.constant_(author.transformer.output.weight, torch.inf)
        return author

    monkeypatch.setattr(lab, "load", overflowing)
    assert run(*TINY, out=tmp_path / "out") == 2
    assert "--dtype: expected one in which the model's logits are numbers, received float32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "absent", "said"),
    [
        ("janus", ["transformers"], 'transformers is not installed: pip install "fastrope[transformers]"'),
        ("llamagen", ["transformers"], 'transformers is not installed: pip install "fastrope[transformers]"'),
        ("tiny", ["diffusers"], 'diffusers is not installed: pip install "fastrope[diffusers]"'),
        ("tiny", ["matplotlib"], 'matplotlib is not installed: pip install "fastrope[demo]"'),
        ("emu3", ["transformers", "PIL"], 'transformers, PIL are not installed: pip install "fastrope[demo]"'),
    ],
)
def test_missing_packages_are_named_and_how_to_get_all_of_them(model, absent, said, tmp_path, capsys, monkeypatch):
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    assert run("--model", model, "--prompt", "a 3", *EDIT, out=tmp_path) == 2
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
