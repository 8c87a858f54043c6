"""The evidence: the page says what the stored numbers give, they are of the shipped weights, the effects are there.

Effects are tested as directions with margins, on few samples with fixed noise; docs/evidence.md has the intervals.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from source_tree import ROOT

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import fastrope as fr
from fastrope.commands.evidence import main
from fastrope.lab import digits, judge, scenes
from fastrope.lab.evidence import looserope, page, untwisting
from fastrope.lab.evidence.findings import Findings, Row, digest, outcomes, strip
from fastrope.lab.evidence.report import share
from fastrope.lab.evidence.studio import TOKENS, Studio, as_task, only

DOCS = ROOT / "docs"
STORED = DOCS / page.FOLDER


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio()


def edits(task: str, count: int) -> scenes.Examples:
    index = torch.full((count,), scenes.TASKS.index(task))
    return scenes.to_edit(index, torch.Generator().manual_seed(11), held_out=True)


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_stored_numbers_give():
    assert (DOCS / page.PAGE).read_text(encoding="utf-8") == page.text(STORED)


def test_the_readme_tells_what_is_stored():
    found = Findings.load(STORED / "grag.json")
    one, more = (share(found.row("digit, delta", x), "source") for x in (1.0, 1.5))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"without GRAG it keeps the old one in {one} of its pictures, with `delta=1.5` in {more}." in readme


@pytest.mark.parametrize("part", page.PARTS)
def test_numbers_are_of_the_weights_that_ship(part):
    found, sums = Findings.load(STORED / f"{part}.json"), (digits.WEIGHTS / "SHA256SUMS").read_text().splitlines()
    assert len(found.made["weights"]) == len(page.module(part).USES)
    assert set(found.made["weights"]) <= set(sums)


@pytest.mark.parametrize("part", page.PARTS)
def test_pictures_are_of_the_stored_numbers(part):
    image = pytest.importorskip("PIL.Image")
    numbers, picture = STORED / f"{part}.json", STORED / f"{part}.png"
    if not hasattr(page.module(part), "draw"):
        assert not picture.exists()
        return
    assert image.open(picture).text["Source"] == digest(numbers)


def test_findings_come_back_as_they_were_stored(tmp_path):
    values = outcomes(digit=torch.tensor([True, False, True]), distance=torch.tensor([0.12345, 0.0, 1.0]))
    shown = strip(scenes.draw(3, torch.Generator().manual_seed(0)).render())
    found = Findings("any", [Row("dial", 0.5, values), Row("dial", "off", values)], {"some": shown}, {"n": 3}, {"a": 1})
    again = Findings.load(found.save(tmp_path))
    assert again.rows == found.rows
    assert again.row("dial", 0.5).outcomes == {"digit": [1, 0, 1], "distance": [0.123, 0, 1]}
    assert np.array_equal(again.pictures["some"], shown)
    assert (again.facts, again.made) == (found.facts, found.made)


def test_intervals_are_those_of_the_mean():
    """Against the normal approximation, which is good at this size."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    row = Row("any", 0, {"x": values})
    low, high = row.interval("x")
    error = 1.96 * np.std(values) / 20
    assert (low, high) == pytest.approx((row.mean("x") - error, row.mean("x") + error), abs=0.015)
    assert row.interval("x") == (low, high)


def test_the_command_measures_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "PARTS", ("attention",))
    monkeypatch.setattr("fastrope.lab.evidence.studio.STEPS", 1)
    main(["--out", str(tmp_path), "--samples", "1", "--only", "attention"])
    assert {path.name for path in (tmp_path / page.FOLDER).iterdir()} == {"attention.json", "attention.png"}
    assert "## Attention under the dials" in (tmp_path / page.PAGE).read_text()
    assert capsys.readouterr().out.split() == [str(tmp_path / page.PAGE), str(tmp_path / page.FOLDER / "attention.png")]


# ---- the effects ----------------------------------------------------------------------------------------------------


def test_grag_keeps_more_of_the_source_as_delta_rises(studio):
    asked = edits("digit", 8)
    prompt = only(asked.prompt, "digit")
    made = [studio.edit(prompt, asked.reference, [fr.GRAG(delta=x)]) for x in (0.5, 1.0, 1.5)]
    far = [judge.distances(m, asked.reference).mean().item() for m in made]
    assert far[0] > 1.2 * far[1] > 1.2 * 1.2 * far[2], far
    kept = (judge.digits(studio.see, made[2]) == asked.source.digit).float().mean()
    assert kept > 0.6


def test_untwisting_copies_less_and_keeps_style_as_s_hf_falls(studio):
    shown = scenes.draw(2, torch.Generator().manual_seed(12), held_out=True)
    pictures = shown.render()
    dials = {"s_lf": 1.0, "beta": 2.0, "adain": 0.0}
    methods = {"plain": fr.UntwistingRoPE(s_hf=1.0, **dials), "low": fr.UntwistingRoPE(s_hf=0.25, **dials)}
    copied, style = dict.fromkeys([*methods, "alone"], 0.0), dict.fromkeys([*methods, "alone"], 0.0)
    for n, picture in enumerate(pictures):
        prompt = torch.full((6, 5), scenes.ANY)
        prompt[:, 0], prompt[:, 1] = 0, (shown.digit[n] + torch.arange(1, 7)) % 10
        reference = untwisting.reference(studio, picture, n)
        beside = picture.expand(6, -1, -1, -1)
        for name in copied:
            made = studio.draw(prompt, *([], None) if name == "alone" else ([methods[name]], reference), seed=n)
            copied[name] += judge.layouts(made, beside).mean().item() / 2
            ours, theirs = (judge.palette(p)[1] for p in (made, beside))
            style[name] += (ours - theirs).abs().mean().item() / 4
    assert copied["plain"] > copied["low"] + 0.1, copied
    assert style["plain"] < style["low"] < 0.85 * style["alone"], style


def test_looserope_blends_the_ring_as_its_factors_fall(studio):
    pasted = edits("blend", 8)
    clean, box = pasted.target.render(), scenes.box(pasted.source.strokes)[:, 0]
    ring = box & (pasted.source.strokes[:, 0] < 0.05)
    prompt, composite = only(as_task(pasted.prompt, "keep")), (pasted.reference + 1) / 2

    def left(**dials) -> float:
        method = fr.LooseRoPE.from_images(composite, mask=box, **{"dilation": 0} | dials)
        made = studio.edit(prompt, pasted.reference, [method], backend="eager")
        return looserope.remaining(made, pasted.reference, clean, ring).mean().item()

    one, zero = (left(range_curve=(r, r, 0.0), crop_curve=None, range_growth=1.0) for r in (1.0, 0.0))
    published, lower = left(), left(boost=0.4)
    assert one > zero + 0.08, (one, zero)
    assert one > published + 0.08 > lower + 0.08 + 0.04, (one, published, lower)


def test_islock_keeps_more_of_the_structure_as_tau_rises(studio):
    prompt = torch.tensor([[0, n % 10, n % 4, 4 + n % 4, 0] for n in range(8)])
    other = prompt.clone()
    other[:, 1] = (prompt[:, 1] + 3) % 10
    anchors = studio.write(prompt).tokens
    near = []
    for tau in (0.0, 1.0, 16.0):
        matcher = fr.ISLock(candidates=8, tau=tau).matcher(studio.author.codebook, num_tokens=TOKENS)
        made = studio.write(other, seed=1000, matcher=matcher, anchors=anchors).tokens
        near.append(judge.distances(*(studio.codebook.decode(t) for t in (made, anchors))).mean().item())
    assert near[0] > 1.1 * near[1] > 1.1 * 1.1 * near[2], near


# ---- the same pictures ----------------------------------------------------------------------------------------------


def test_neutral_methods_draw_the_stock_picture_to_the_bit(studio):
    asked = edits("digit", 2)
    prompt = only(asked.prompt, "digit")
    stock = studio.call(prompt, asked.reference)
    assert torch.equal(studio.edit(prompt, asked.reference, [fr.GRAG(1.0, 1.0)]), stock)
    neutral = fr.UntwistingRoPE(s_hf=1.0, s_lf=1.0, adain=0.0, reference=0)
    assert torch.equal(studio.edit(prompt, asked.reference, [neutral]), stock)


def test_every_modulation_alone_reaches_the_picture(studio, monkeypatch):
    monkeypatch.setattr("fastrope.lab.evidence.studio.STEPS", 1)
    asked = edits("digit", 1)
    prompt = only(asked.prompt, "digit")
    stock, tokens = studio.call(prompt, asked.reference), len(scenes.SLOTS) + 2 * TOKENS
    keys = slice(tokens - TOKENS, tokens)
    half = torch.full((tokens,), 0.5)
    hidden = torch.where(torch.arange(tokens) < keys.start, 0.0, -torch.inf)
    for modulation in (
        fr.QueryScale(half, keys=keys), fr.BandWeight(half[:16], keys=keys), fr.BiasDelta(delta=0.5, keys=keys),
        fr.BiasDelta(delta=0.5, keys=keys, on="values"), fr.LogitGain(half, keys=keys), fr.LogitBias(-1.0, keys=keys),
        fr.KeyBias(torch.linspace(-1, 1, tokens)), fr.KeyBias(hidden), fr.ValueGain(0.5, keys=keys),
    ):  # fmt: skip
        made = studio.edit(prompt, asked.reference, [modulation])
        assert judge.distances(made, stock) > 1e-3, modulation


def test_backends_draw_the_same_picture(studio, monkeypatch):
    """Above 60 dB: no pixel of 8 bits differs by more than rounding."""
    monkeypatch.setattr("fastrope.lab.evidence.studio.STEPS", 2)
    asked = edits("digit", 1)
    prompt = only(asked.prompt, "digit")
    made = {}
    for backend in ("eager", "sdpa", "triton"):
        with fr.apply(studio.editing, fr.GRAG(delta=1.2, layers=[0, 3], steps=[0]), backend=backend):
            made[backend] = studio.call(prompt, asked.reference)
    for backend in ("sdpa", "triton"):
        error = ((made[backend] - made["eager"]) / 2).square().mean()
        assert -10 * error.clamp(min=1e-12).log10() > 60, f"{backend}: mean square {error}"
    assert judge.distances(made["eager"], studio.call(prompt, asked.reference)) > 1e-3, "the method did nothing"
