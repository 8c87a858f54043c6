"""``fastrope demo``: what its pictures claim, and that the whole of it runs."""

from __future__ import annotations

import html
import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastrope as fr

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from fastrope import cli, demo
from fastrope.demo import bands, build, groups, idea, kontext, maps, report
from fastrope.demo.probe import attention_weights, smooth_noise
from fastrope.demo.untwisting import band_weights

CPU = torch.device("cpu")
PICTURES = ("bands", "maps", "groups", "scene", "runs", "backends")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_weights_read_through_the_op_are_the_softmax():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 16, generator=generator), torch.randn(2, 37, 16, generator=generator)
    expected = (q @ k.mT / 4).softmax(-1)
    torch.testing.assert_close(attention_weights(q, k, chunk=2), expected)


def test_bands_match_the_closed_form():
    data = bands.compute(CPU, vectors=8)
    expected = torch.cos(data.shifts[:, None] * data.frequencies)
    torch.testing.assert_close(data.similarity, expected, atol=1e-6, rtol=0)
    per_band = expected.unflatten(1, (bands.BANDS, -1)).mean(-1).T
    torch.testing.assert_close(data.bands, per_band, atol=1e-6, rtol=0)
    for r, curve in data.scaled.items():
        stretched = torch.cos(r * data.shifts[:, None] * data.frequencies).mean(1)
        torch.testing.assert_close(curve, stretched, atol=1e-6, rtol=0)


def test_faster_bands_forget_sooner():
    near = bands.compute(CPU, vectors=4).bands[:, 5]
    assert (near.diff() > 0).all()


def test_a_query_looks_further_as_r_falls():
    data = maps.compute(CPU, grid=32)
    assert tuple(sorted(maps.SCALES, reverse=True)) == maps.SCALES
    assert (data.distance.diff() > 0.3).all(), data.distance
    torch.testing.assert_close(data.weights.sum((1, 2)), torch.ones(len(maps.SCALES), dtype=torch.float64))


def test_delta_is_a_temperature_and_lambda_a_share():
    data = groups.compute(CPU, grid=12, steps=7)
    assert data.mean_logit > 0
    assert (data.entropy.diff(dim=1) < 0).all()  # falls with delta
    assert (data.mass.diff(dim=0) > 0).all()  # rises with lambda
    torch.testing.assert_close(data.entropy, data.entropy[:1].expand_as(data.entropy), atol=1e-4, rtol=0)


def test_group_mean_logit():
    """Read off the log-sum-exp in the demo; here from the keys themselves."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(5, 16, generator=generator), torch.randn(9, 16, generator=generator)
    rope, key_rope = fr.RoPE(torch.zeros(5, 8)), fr.RoPE(torch.zeros(9, 8))
    expected = float((q @ k.T).mean() / 4)
    assert groups._mean_logit(q, k, rope, key_rope) == pytest.approx(expected, abs=1e-5)


def test_idea_shows_what_it_says():
    panels, crop = idea.compute(CPU)
    weights = {p.name: p.weights for p in panels}
    rows, columns = torch.meshgrid(torch.arange(idea.GRID), torch.arange(idea.GRID), indexing="ij")
    distance = ((rows - idea.QUERY[0]) ** 2 + (columns - idea.QUERY[1]) ** 2).double().sqrt()
    reach = {name: float((w * distance).sum()) for name, w in weights.items()}
    entropy = {name: float(torch.special.entr(w).sum()) for name, w in weights.items()}
    assert reach["plain"] < reach["QueryScale"] < reach["BandWeight"]
    assert entropy["BiasDelta"] < entropy["plain"]
    assert weights["LogitGain"][crop].sum() < weights["plain"][crop].sum()


def test_band_weights_run_from_high_to_low():
    weight = band_weights(56, 0.25, 1.0, beta=2.0)
    assert weight.shape == (28,)
    assert weight[0] == 0.25
    assert weight[-1] == 1.0
    assert weight[9] == pytest.approx(0.25 + 0.75 * (9 / 27) ** 2)


def test_smooth_noise_has_unit_variance():
    x = smooth_noise((64, 32, 32), 1.5, torch.Generator().manual_seed(0))
    assert x.shape == (64, 32, 32)
    assert float(x.var()) == pytest.approx(1, abs=0.1)


def test_recipes_cover_what_the_report_says():
    settings = kontext.Settings(pixels=32)
    recipes = kontext.recipes(settings, CPU)
    assert tuple(recipes) == kontext.NAMES
    (scale,), (gain,) = recipes["QueryScale"], recipes["LogitGain"]
    mask, level = kontext.crop_levels(kontext.scenes.draw_scene(), settings.grid)
    outside = torch.ones(len(settings.layout), dtype=torch.bool)
    outside[settings.layout.target] = ~mask
    assert (scale.scale[outside] == 1).all()
    assert (gain.gain[outside] == 1).all()
    assert set(level[mask].tolist()) >= {0, 1, 2, 3}
    assert len(recipes["all four"]) == 4


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["demo", "--quick"]) == 2
    assert 'fastrope demo: matplotlib is not installed: pip install "fastrope[demo]"' in capsys.readouterr().err


def test_device_that_is_not_there(capsys, tmp_path):
    assert cli.main(["demo", "--quick", "--device", "nowhere", "--out", str(tmp_path / "demo")]) == 2
    assert "fastrope demo: --device: " in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_file_is_no_folder(there, capsys, tmp_path):
    if there:
        (tmp_path / "a.png").touch()
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "a.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastrope demo: --out: expected a folder, received ")


def test_an_earlier_report_is_kept(capsys, tmp_path):
    for name in build.FILES:
        (tmp_path / name).write_text("mine")
        assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fastrope demo: --out: {tmp_path / name} is there already")
        (tmp_path / name).unlink()


@settings(max_examples=200)
@given(st.text(st.characters(codec="utf-8")))
def test_text_of_users_is_shown_as_it_is(text):
    """Only spaces are lost."""
    shown = html.unescape(report._inline(report.literal(text)))
    assert shown == " ".join(text.split())
    assert "<" not in report._inline(report.literal(text))


def test_cells_of_a_table_are_text(tmp_path):
    cell = "<b>a</b> | `c` $x$"
    table = report.Table(("h",), ((cell,),), "caption", "none")
    pages = report.write("title", "a `code`", [report.Section("s", (table,))], tmp_path)
    text, page = (path.read_text() for path in pages)
    assert r"| \<b\>a\</b\> \| \`c\` \$x\$ |" in text
    assert "<td>&lt;b&gt;a&lt;/b&gt; | `c` $x$</td>" in page
    assert "a <code>code</code>" in page


def test_absent_and_broken_backends_are_told_apart():
    def absent():
        raise NotImplementedError("no kernel for this device")

    def broken():
        raise RuntimeError("wrong shape")

    row = build._row(build._judge("triton", absent, {}, {}))
    assert row[1] == "not available: no kernel for this device"
    agreement = build._judge("triton", broken, {}, {})
    assert not agreement.good
    assert "RuntimeError: wrong shape" in build._row(agreement)[1]


@pytest.mark.slow
def test_demo_quick(tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "demo"
    code = demo.main(["--quick", "--out", str(out), "--device", "cpu"])
    numbers = json.loads((out / "numbers.json").read_text())
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert {path.name for path in out.iterdir()} == set(build.FILES)
    for name in PICTURES:
        assert (out / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert "src=" not in page.replace('src="data:image/png', "")  # self-contained
    for heading in ("1. Bands", "2. QueryScale", "3. BiasDelta", "4. A tiny FLUX Kontext"):
        assert f"## {heading}" in text
        assert heading in page
    assert text.count("*Conditions: device cpu") == len(PICTURES) + 1
    backends = numbers["kontext"]["backends"]
    assert set(backends) == {"eager", "sdpa", "triton"}
    for name, found in backends.items():
        assert found["failure"] is None, f"{name}: {found['failure']}"
        assert found["absent"] is None or name == "triton"
        assert found["worst"] <= build.TOLERANCE
        assert found["absent"] is not None or tuple(found["errors"]) == kontext.NAMES
    change = numbers["kontext"]["change"]
    assert change["none"] == 0
    assert all(change[name] > 100 * build.TOLERANCE / 10 for name in kontext.NAMES if name != "none"), change
    assert numbers["bands"]["error"] < 1e-6
    assert code == 0
