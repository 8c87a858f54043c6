"""``fastrope demo``: what its pictures claim, and that the whole of it runs."""

from __future__ import annotations

import json
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from PIL import Image

import fastrope
from fastrope import cli, demo, figures, lab
from fastrope.commands.pipelines import Settings, Trained
from fastrope.demo import build, idea, methods
from fastrope.modulations import MODULATIONS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_weights_read_through_the_op_are_the_softmax():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 16, generator=generator), torch.randn(37, 16, generator=generator)
    torch.testing.assert_close(idea.attention_weights(q, k), (q @ k.mT / 4).softmax(-1))


def test_idea_shows_what_it_says():
    weights, crop = idea.compute(CPU)
    plain = "attention with RoPE"
    rows, columns = torch.meshgrid(torch.arange(idea.GRID), torch.arange(idea.GRID), indexing="ij")
    distance = ((rows - idea.QUERY[0]) ** 2 + (columns - idea.QUERY[1]) ** 2).double().sqrt()
    reach = {name: float((w * distance).sum()) for name, w in weights.items()}
    entropy = {name: float(torch.special.entr(w).sum()) for name, w in weights.items()}
    assert reach[plain] < reach["QueryScale"] < reach["BandWeight"]
    assert entropy["BiasDelta"] < entropy[plain]
    assert weights["LogitGain"][crop].sum() < weights[plain][crop].sum()
    assert not weights["LogitBias"][crop].any()
    left = columns < idea.QUERY[1]
    assert weights["KeyBias"][left].sum() < weights[plain][left].sum()
    torch.testing.assert_close(weights["ValueGain"], torch.where(crop, -weights[plain], weights[plain]))
    assert list(weights) == [plain, *(m.__name__ for m in MODULATIONS)]


def test_the_classifier_names_pictures_of_any_size():
    """The lab's own, which it was not trained on, and enlarged ones alike."""
    pictures = lab.pictures(20)
    found = [methods.seen(picture) for picture in pictures]
    assert found == [methods.seen(picture.resize((256, 256), Image.Resampling.NEAREST)) for picture in pictures]
    assert len(set(found)) >= 6
    assert methods.named("title", pictures[0]).below == f"seen as {found[0]}"


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["demo", "--quick"]) == 2
    assert 'fastrope demo: matplotlib is not installed: pip install "fastrope[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["--device", "nowhere"], "--device: "), (["--device", "meta"], "--device: expected cpu or cuda, received meta"),
    (["--out", "a.png"], "--out: expected a folder, received a.png"),
    (["--out", "b.png"], "--out: expected a folder, received b.png"),
])  # fmt: skip
def test_problems_are_named_before_the_work(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    assert cli.main(["demo", "--quick", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastrope demo: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_earlier_page_is_kept(capsys, tmp_path):
    for name in build.FILES:
        (tmp_path / name).write_text("mine")
        assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fastrope demo: --out: {tmp_path / name} is there already")
        (tmp_path / name).unlink()


class Doctor:
    """A finished process that found what it is given."""

    def __init__(self, found: object) -> None:
        self.found = found

    def communicate(self):
        return (json.dumps(self.found) if self.found else "", None)

    def kill(self):
        pass


CHECK = {"backend": "triton", "dtype": "float32", "passed": True, "problem": None, "error": 1e-7, "allowed": 1e-6}


@pytest.mark.parametrize(("found", "code"), [
    ({"self_check": [CHECK]}, 0), ({"self_check": [CHECK, CHECK | {"passed": False, "problem": "<wrong>"}]}, 1),
    (None, 1),
])  # fmt: skip
def test_the_exit_code_is_that_of_the_backends(found, code, tmp_path, monkeypatch):
    picture = figures.Cell(Image.new("RGB", (16, 16)), "title", "below")
    monkeypatch.setattr(build, "_ask_doctor", lambda device: Doctor(found))
    monkeypatch.setattr(methods, "rows", lambda name, device, count: [[picture]] * count)
    monkeypatch.setattr(idea, "draw", lambda device: picture.picture)
    assert build.build(tmp_path, CPU, quick=False) == code
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert page.count("passed") == bool(found)
    assert ("&lt;wrong&gt;" in page) == (code == 1 and bool(found))


def test_the_doctor_is_that_of_this_process(tmp_path, monkeypatch):
    """In a clone, too, whose folder of that name lacks parts of the package."""
    (tmp_path / "fastrope").mkdir()
    (tmp_path / "fastrope" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    doctor = build._ask_doctor(CPU)
    assert json.loads(doctor.communicate()[0])["fastrope"] == fastrope.__version__


@pytest.mark.slow
def test_demo_quick(tmp_path, capsys, monkeypatch):
    """Short runs: what the pictures look like does not count."""
    monkeypatch.setattr(Trained, "_defaults", lambda self: Settings(2))
    monkeypatch.setattr(methods, "TAUS", (1.0,))
    out = tmp_path / "demo"
    assert demo.main(["--quick", "--out", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.split() == [str(out / name) for name in ("demo.html", *_pictures())]
    assert {path.name for path in out.iterdir()} == set(build.FILES)
    page = (out / "demo.html").read_text(encoding="utf-8")
    for name in _pictures():
        with Image.open(out / name) as picture:
            assert picture.width > 600
    assert page.count("data:image/png;base64,") == len(_pictures())
    assert "src=" not in page.replace('src="data:image/png', "")  # self-contained
    assert all(show.title in page for show in methods.SHOWS.values())
    assert "<td>triton</td><td>float32</td><td>passed</td>" in page  # interpreted


def _pictures() -> list[str]:
    return [*(f"{name}.png" for name in methods.SHOWS), "idea.png"]
