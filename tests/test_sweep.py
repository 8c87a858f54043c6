"""``fastrope sweep`` from end to end on the tiny pipeline: its cells and its sheet."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from command_files import draw, photo, pixels, record
from PIL import Image

from fastrope.cli import main
from fastrope.commands import styling, sweep

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_contact_sheet(capsys):
    words = "--prompt", "a heron", "--s-hf", "0", "0.5:1", "--s-lf", "1", "1.5", "--cells", "cells", "--out", "a/s.png"
    assert draw(*words, command="sweep") == 0
    captured = capsys.readouterr()
    cells = [f"cells/s_hf_{high}_s_lf_{low}.png" for high in ("0", "0.5-1") for low in ("1", "1.5")]
    assert captured.out.split() == ["a/s.png", "a/s.json", "cells/cells.json", "cells/plain.png", *cells]
    assert "sweep: 100%" in captured.err
    kept = record("a/s.json")
    assert (kept["s_hf"], kept["s_lf"]) == ([0.0, [0.5, 1.0]], [1.0, 1.5])
    assert kept["dials"]["beta"] == 2.0
    assert len({pixels(name).tobytes() for name in cells}) == 4


def test_cells_are_what_style_draws():
    assert draw("--s-hf", "0.9", "--s-lf", "1", "1.4", "--cells", "cells", command="sweep") == 0
    assert draw("--s-hf", "0.9", "--s-lf", "1.4") == 0
    assert np.array_equal(pixels("style.png"), pixels("cells/s_hf_0.9_s_lf_1.4.png"))


def test_prompts_are_text():
    """Neither mathematics nor mark-up, in the sheet and in names."""
    prompt = r"costs $5, \frac{ or $x_"
    assert draw("--prompt", prompt, "--s-hf", "0.5", "--s-lf", "1", command="sweep") == 0
    assert record("sweep.json")["prompt"] == prompt


@pytest.fixture
def drawn(monkeypatch) -> list:
    """A list that grows with every picture that is drawn, which are flat."""
    seen = []

    def run(self, seed):
        seen.append(seed)
        return Image.new("RGB", (8, 8), (len(seen), 0, 0))

    monkeypatch.setattr(styling.Styling, "run", run)
    return seen


def test_cells_outlive_a_run_that_breaks_off(drawn, monkeypatch, capsys):
    """They are kept as they are drawn, and not drawn again by the same options, also with further values."""
    words = "--s-hf", "0.5", "--s-lf", "1", "1.5"
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "draw", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw(*words, command="sweep")
    kept = {path.name: path.read_bytes() for path in Path("sweep-cells").iterdir()}
    assert sorted(kept) == ["cells.json", "plain.png", "s_hf_0.5_s_lf_1.5.png", "s_hf_0.5_s_lf_1.png"]
    assert len(drawn) == 3
    assert draw(*words, "2", command="sweep") == 0
    assert len(drawn) == 4
    assert all((Path("sweep-cells") / name).read_bytes() == data for name, data in kept.items())
    for changed in (["--seed", "1"], ["--reference", photo("ref.png")]):
        assert draw(*words, *changed, "--out", "b.png", "--cells", "sweep-cells", command="sweep") == 2
        said = capsys.readouterr().err
        assert "fastrope sweep: --cells: sweep-cells/cells.json is there already; --force replaces it" in said
    photo("ref.png", seed=1)  # another picture of the same name
    assert draw(*words, "--seed", "1", "--reference", "ref.png", "--force", command="sweep") == 0
    photo("ref.png", seed=2)
    assert draw(*words, "--seed", "1", "--reference", "ref.png", "--out", "c.png", "--cells", "sweep-cells",
                command="sweep") == 2  # fmt: skip
    assert len(drawn) == 7


def test_cells_of_values_that_look_alike(drawn):
    assert draw("--s-hf", "0.5", "--s-lf", "1", "1.0000001", "1.0000002", command="sweep") == 0
    cells = sorted(path.name for path in Path("sweep-cells").glob("s_*"))
    assert cells == [f"s_hf_0.5_s_lf_{low}.png" for low in ("1.0000001", "1.0000002", "1")]


@pytest.mark.parametrize("values", [("1", "1.0"), ("0.5:1", "1", "0.50:1")])
def test_a_value_is_given_once(values, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", "--model", "tiny", "--s-lf", *values])
    assert stopped.value.code == 2
    assert "--s-lf: expected values that differ, received " in capsys.readouterr().err


def test_a_result_has_no_name_of_a_cell(drawn, capsys):
    assert draw("--cells", ".", "--out", "plain.png", command="sweep") == 2
    assert "fastrope sweep: --out: expected a name that no cell has, received plain.png" in capsys.readouterr().err
    assert drawn == []


COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (200, 30, 200), (30, 200, 200)]


@pytest.mark.parametrize(("rows", "columns"), [(3, 2), (2, 3), (1, 4), (4, 1)])
def test_every_picture_has_its_place(rows, columns, monkeypatch):
    """Rows go down by s_hf, columns across by s_lf; the reference and the plain picture stand to the left."""
    monkeypatch.setattr("fastrope.demo.style.DPI", 60)

    def flat(n: int):
        return Image.new("RGB", (20, 30), COLOURS[n])

    cells = [[flat(row * columns + column) for column in range(columns)] for row in range(rows)]
    reference, plain = Image.new("RGB", (8, 8), (90, 90, 90)), Image.new("RGB", (20, 30), (10, 10, 10))
    high, low = [n / 4 for n in range(rows)], [1 + n / 4 for n in range(columns)]
    sheet = sweep.draw([reference], plain, cells, high, low, "caption")
    data = np.asarray(sheet)

    def centre(colour) -> np.ndarray:
        found = np.argwhere((data == np.array(colour, dtype=np.uint8)).all(axis=-1))
        assert len(found) > 1000
        return found.mean(axis=0)

    places = np.array([[centre(COLOURS[row * columns + column]) for column in range(columns)] for row in range(rows)])
    assert (np.diff(places[..., 0], axis=0) > 50).all()
    assert (np.diff(places[..., 1], axis=1) > 50).all()
    assert np.allclose(places[:, :1, 1], places[..., 1][:, :1])
    assert np.ptp(places[..., 0], axis=1).max() < 3
    assert np.ptp(places[..., 1], axis=0).max() < 3
    for colour in ((90, 90, 90), (10, 10, 10)):
        assert (centre(colour)[1] < places[..., 1] - 50).all()


def test_labels_name_the_values(monkeypatch):
    """The texts that matplotlib was asked to write."""
    from matplotlib import text

    written = set()
    real = text.Text.draw
    monkeypatch.setattr(text.Text, "draw", lambda self, *given: written.add(self.get_text()) or real(self, *given))
    flat = Image.new("RGB", (8, 8))
    sweep.draw([flat], flat, [[flat, flat]] * 2, (0.25, (0.25, 0.75)), (1.0, 1.4), "the caption")
    assert {"s_hf 0.25", "s_hf 0.25:0.75", "s_lf 1", "s_lf 1.4", "the caption", "reference", "without it"} <= written


def test_a_folder_in_the_way_is_named_before_anything_is_drawn(capsys):
    Path("taken").write_text("text")
    assert draw("--cells", "taken", command="sweep") == 2
    said = capsys.readouterr().err
    assert said.startswith("fastrope sweep: --cells: ")
    assert "sweep:   0%" not in said


@pytest.mark.parametrize("text", ["1:2:3", "", "1:", "x"])
def test_values_of_a_sweep(text):
    with pytest.raises(argparse.ArgumentTypeError, match="^expected a number or FIRST:LAST, received"):
        sweep._value(text)
