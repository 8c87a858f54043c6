"""``fastrope style`` from end to end, on the tiny pipeline and on one from disk."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_flux
import torch
from command_files import draw, photo, pixels, record

import fastrope as fr
from fastrope.cli import main
from fastrope.commands import style, styling
from fastrope.methods.untwisting import PRESETS

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_picture_and_its_record(capsys):
    words = "--prompt", "a heron", "--reference", photo("ref.png"), "--plain", "--out", "made/heron.png"
    assert draw(*words, "--s-hf", "0.9", "1", "--s-lf", "1.2", "--beta", "3", "--adain", "0.25", "--seed", "5") == 0
    assert capsys.readouterr().out.split() == ["made/heron.png", "made/heron.json", "made/heron-plain.png"]
    assert pixels("made/heron.png").shape == (32, 32, 3)
    assert (pixels("made/heron.png") != pixels("made/heron-plain.png")).any()
    kept = record("made/heron.json")
    assert kept["dials"] == {
        "s_hf": [0.9, 1.0], "s_lf": 1.2, "beta": 3.0, "adain": 0.25, "axis0": "low", "blocks": None, "layers": None,
    }  # fmt: skip
    assert (kept["seed"], kept["reference_seed"], kept["steps"], kept["trajectory"]) == (5, 6, 3, "linear")
    assert (kept["reference"], kept["prompt"], kept["gamma"]) == (["ref.png"], "a heron", None)


def test_the_picture_is_that_of_the_library():
    """Options reach the method, the trajectory and the pipeline."""
    assert draw("--prompt", "x", "--preset", "bigstationw-2026-06", "--trajectory", "rf_inversion", "--gamma", "0.8",
                "--axis0", "0.7", "--layers", "0-1", "--seed", "3") == 0  # fmt: skip
    options = style._parser().parse_args(["--model", "tiny", "--prompt", "x", "--steps", "3"])
    torch.set_num_threads(1)
    ready = styling.prepare(options)
    pipe = ready.pipe
    source = fr.prepare_reference(
        pipe, ready.pictures, "rf_inversion", gamma=0.8, height=32, width=32, num_inference_steps=3,
        generator=torch.Generator().manual_seed(4), **styling._text(options, pipe, ""),
    )  # fmt: skip
    source.arguments["img_ids"][:, 0] = 1
    method = fr.UntwistingRoPE.from_preset("bigstationw-2026-06", axis0=0.7, layers=range(2))
    with fr.apply(pipe, method, reference=fr.ReferenceCache(source)):
        expected = ready.run(3)
    assert np.abs(pixels("style.png") - np.asarray(expected).astype(int)).max() <= 1


def test_dials_change_the_picture():
    seen = []
    for n, words in enumerate([(), ("--s-hf", "1"), ("--s-lf", "0.6"), ("--s-hf", "1", "--adain", "0"),
                               ("--s-hf", "1", "--blocks", "single"), ("--s-hf", "1", "--trajectory", "rf_inversion"),
                               ("--s-hf", "1", "--seed", "7"),
                               ("--s-hf", "1", "--reference-seed", "9")]):  # fmt: skip
        assert draw("--prompt", "x", *words, "--out", f"{n}.png") == 0
        seen.append(pixels(f"{n}.png").tobytes())
    assert len(set(seen)) == len(seen)


def test_seeds_repeat():
    for name in ("a.png", "b.png"):
        assert draw("--s-hf", "1", "--seed", "3", "--out", name) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_the_reference_shows_where_high_frequencies_stay():
    """The tiny model copies what it attends to: nearer to the reference at s_hf 1 than at 0."""
    for name, high in (("copy", "1"), ("free", "0")):
        assert draw("--s-hf", high, "--s-lf", "1.5", "--adain", "0", "--steps", "6", "--out", f"{name}.png") == 0
    from fastrope.demo import scene
    from fastrope.pictures import to_picture

    reference = np.asarray(to_picture("x", scene.draw_scene().composite).resize((32, 32))).astype(int)
    gap = {name: np.abs(pixels(f"{name}.png") - reference).mean() for name in ("copy", "free")}
    assert gap["copy"] < 0.8 * gap["free"]


def test_a_native_reference():
    assert draw("--native", "--prompt", "x", "--reference", photo("ref.png"), "--plain") == 0
    assert record("style.json")["pipeline"] == "FluxKontextPipeline"
    assert record("style.json")["native"]
    assert (pixels("style.png") != pixels("style-plain.png")).any()


def test_several_references_and_a_cache():
    words = "--reference", photo("a.png"), "--reference", photo("b.png", seed=1), "--s-hf", "1"
    assert draw(*words, "--cache", "host", "--out", "two.png") == 0
    assert draw("--reference", "a.png", "--s-hf", "1", "--out", "one.png") == 0
    assert (pixels("two.png") != pixels("one.png")).any()


def test_progress_is_shown(capsys):
    assert draw("--trajectory", "rf_inversion") == 0
    said = capsys.readouterr().err
    assert "rf_inversion: 100%" in said
    assert "style: 100%" in said
    assert record("style.json")["gamma"] == 0.5  # the default, written down where it was used


def test_presets_and_the_old_name_of_one():
    for preset in ("bigstationw-2026-06", "xmarre-0.2"):
        assert draw("--preset", preset, "--s-lf", "1", "1.5", "--force") == 0
        assert record("style.json")["preset"] == preset
        assert record("style.json")["dials"]["axis0"] == {
            str(count): list(weights) for count, weights in PRESETS[preset]["axis0"].items()
        }
    with pytest.warns(DeprecationWarning, match="bigstationw-workflows-2026-06"):
        assert draw("--preset", "community", "--force") == 0
    assert draw("--preset", "xmarre-0.2", "--s-hf", "1", "--s-lf", "1", command="sweep") == 0


def test_a_whole_pipeline_from_disk(tmp_path):
    """Prompts and pictures go through encoders and VAE; the reference is a row of the batch or kept."""
    folder = str(tmp_path / "flux")
    diffusers.FluxPipeline(**tiny_flux.parts()).save_pretrained(folder)
    words = ["style", "--model", folder, "--reference", photo("ref.png", (20, 12)), "--steps", "3", "--adain", "0.9",
             "--prompt", "make night", "--reference-prompt", "every"]  # fmt: skip
    assert main([*words, "--plain"]) == 0
    assert pixels("style.png").shape == (12, 20, 3)
    assert (pixels("style.png") != pixels("style-plain.png")).any()
    assert main([*words, "--cache", "host", "--out", "kept.png"]) == 0
    assert np.abs(pixels("kept.png") - pixels("style.png")).max() <= 1
    for n, other in enumerate((["--reference-prompt", "night"], ["--trajectory", "rf_inversion"], ["--s-hf", "1"],
                               ["--guidance", "1"])):  # fmt: skip
        assert main([*words, *other, "--out", f"{n}.png"]) == 0
        assert (pixels(f"{n}.png") != pixels("style.png")).any(), other
