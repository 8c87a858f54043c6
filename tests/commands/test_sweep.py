"""``fastrope sweep``: cells that outlive a run, the contact sheet, names and values."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shots import differ, photo, pixels, record

from fastrope.cli import main
from fastrope.commands import sweep
from fastrope.commands.style import Styling

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


def run(*words: str, command: str = "sweep") -> int:
    return main([command, "--model", "tiny", "--steps", "2", *words])


@pytest.fixture
def drawn(monkeypatch) -> list:
    """A list that grows with every picture that is drawn, which are flat."""
    seen = []

    def draw(self, label=None):
        seen.append(self.options.seed)
        return Image.new("RGB", (8, 8), (len(seen), 0, 0))

    monkeypatch.setattr(Styling, "draw", draw)
    return seen


def test_a_contact_sheet(capsys):
    """Cells are what ``style`` draws; prompts are text, and names of files say the values."""
    words = "--prompt", "a 5", "--s-hf", "0", "0.5:1", "--s-lf", "1", "1.5", "--cells", "cells", "--out", "a/s.png"
    assert run(*words, "--beta", "3") == 0
    said = capsys.readouterr()
    cells = [f"cells/s_hf_{high}_s_lf_{low}.png" for high in ("0", "0.5-1") for low in ("1", "1.5")]
    assert said.out.split() == ["a/s.png", "a/s.json", "cells/cells.json", "cells/plain.png", *cells]
    assert "sweep: 100%" in said.err
    kept = record("a/s.json")
    assert (kept["s_hf"], kept["s_lf"], kept["prompt"]) == ([0.0, [0.5, 1.0]], [1.0, 1.5], "a 5")
    assert kept["dials"]["beta"] == 3.0
    assert not {"s_hf", "s_lf"} & set(kept["dials"])
    assert len({pixels(name).tobytes() for name in cells}) == 4
    assert run("--prompt", "a 5", "--s-hf", "0.5", "1", "--s-lf", "1.5", "--beta", "3", command="style") == 0
    assert not differ("style.png", cells[3])


def test_cells_outlive_a_run_that_breaks_off(drawn, monkeypatch, capsys):
    """They are kept as they are drawn, and not drawn again by the same options, also with further values."""
    words = "--s-hf", "0.5", "--s-lf", "1", "1.5"
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "draw", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*words)
    kept = {path.name: path.read_bytes() for path in Path("sweep-cells").iterdir()}
    assert sorted(kept) == ["cells.json", "plain.png", "s_hf_0.5_s_lf_1.5.png", "s_hf_0.5_s_lf_1.png"]
    assert len(drawn) == 3
    assert run(*words, "2") == 0
    assert len(drawn) == 4
    assert all((Path("sweep-cells") / name).read_bytes() == data for name, data in kept.items())
    for changed in (["--seed", "1"], ["--reference", photo("ref.png")]):
        assert run(*words, *changed, "--out", "b.png", "--cells", "sweep-cells") == 2
        said = capsys.readouterr().err
        assert "fastrope sweep: --cells: sweep-cells/cells.json is there already; --force replaces it" in said
    photo("ref.png", seed=1)  # another picture of the same name
    assert run(*words, "--seed", "1", "--reference", "ref.png", "--force") == 0
    photo("ref.png", seed=2)
    words = *words, "--seed", "1", "--reference", "ref.png", "--out", "c.png", "--cells", "sweep-cells"
    assert run(*words) == 2
    assert len(drawn) == 7


def test_cells_of_values_that_look_alike(drawn):
    assert run("--s-hf", "0.5", "--s-lf", "1", "1.0000001", "1.0000002") == 0
    cells = sorted(path.name for path in Path("sweep-cells").glob("s_*"))
    assert cells == [f"s_hf_0.5_s_lf_{low}.png" for low in ("1.0000001", "1.0000002", "1")]


@pytest.mark.parametrize("values", [("1", "1.0"), ("0.5:1", "1", "0.50:1")])
def test_a_value_is_given_once(values, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--s-lf", *values)
    assert stopped.value.code == 2
    assert "--s-lf: expected values that differ, received " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1:2:3", "", "1:", "x"])
def test_values_are_numbers(text):
    with pytest.raises(argparse.ArgumentTypeError, match="^expected a number or FIRST:LAST, received"):
        sweep._value(text)


def test_files_in_the_way_are_named_before_anything_is_drawn(drawn, only_line):
    Path("taken").write_text("text")
    assert run("--cells", "taken") == 2
    only_line("sweep", "--cells: expected a folder, received taken")
    assert run("--cells", ".", "--out", "plain.png") == 2
    only_line("sweep", "--out: expected a name that no cell has, received plain.png")
    assert drawn == []


COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (200, 30, 200), (30, 200, 200)]


def test_every_picture_has_its_place_and_its_label(monkeypatch):
    """Rows go down by s_hf, columns across by s_lf, below the reference and the plain picture."""
    from matplotlib import text

    written, real = set(), text.Text.draw
    monkeypatch.setattr(text.Text, "draw", lambda self, *given: written.add(self.get_text()) or real(self, *given))
    monkeypatch.setattr("fastrope.figures.DPI", 60)
    cells = [Image.new("RGB", (20, 30), colour) for colour in COLOURS]
    reference, plain = Image.new("RGB", (8, 8), (90, 90, 90)), Image.new("RGB", (20, 30), (10, 10, 10))
    caption = r"costs $5, \frac{ or $x_"
    data = np.asarray(sweep.draw(reference, plain, cells, (0.25, (0.25, 0.75)), (1.0, 1.4, 2.0), caption))
    titles = {f"s_hf {high}, s_lf {low}" for high in ("0.25", "0.25:0.75") for low in ("1", "1.4", "2")}
    assert titles | {caption, "reference", "without it"} <= written

    def centre(colour) -> np.ndarray:
        found = np.argwhere((data == np.array(colour, dtype=np.uint8)).all(axis=-1))
        assert len(found) > 1000
        return found.mean(axis=0)

    places = np.array([centre(colour) for colour in COLOURS]).reshape(2, 3, 2)
    assert (np.diff(places[..., 0], axis=0) > 50).all()
    assert (np.diff(places[..., 1], axis=1) > 50).all()
    assert np.ptp(places[..., 0], axis=1).max() < 3
    assert np.ptp(places[..., 1], axis=0).max() < 3
    above = np.array([centre((90, 90, 90)), centre((10, 10, 10))])
    assert (above[:, 0] < places[0, 0, 0] - 50).all()
