"""``fastrope edit`` from end to end, on the tiny pipeline and on one from disk."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_flux
import torch
from command_files import edit, mask, photo, pixels, record
from PIL import Image

import fastrope as fr
from fastrope.cli import main
from fastrope.commands import editors

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_picture_is_that_of_the_library(capsys):
    assert edit("--method", "grag", "--delta", "1.4", "--prompt", "at dusk", "--image", photo("photo.png")) == 0
    assert capsys.readouterr().out.split() == ["edit.png", "edit.json"]
    pipe = editors.load("tiny", torch.device("cpu"), torch.float32, False)
    settings = editors.Settings(4, 2.5)
    call = editors.arguments(pipe, "tiny", settings, [Image.open("photo.png")], "at dusk", seed=0)
    with fr.apply(pipe, fr.GRAG(1.0, 1.4)):
        expected = pipe(**call).images[0]
    # the command runs on one thread, which rounds otherwise
    assert np.abs(pixels("edit.png") - np.asarray(expected).astype(int)).max() <= 1
    assert pixels("edit.png").shape == (32, 32, 3)


def test_looserope_with_files(capsys):
    words = ["--image", photo("photo.png"), "--mask", mask("mask.png"), "--boost", "0.4", "--layers", "0-1"]
    assert edit("--method", "looserope", *words, "--plain", "--out", "made/loose.png") == 0
    assert capsys.readouterr().out.split() == ["made/loose.png", "made/loose.json", "made/loose-plain.png"]
    assert (pixels("made/loose.png") != pixels("made/loose-plain.png")).any()
    kept = record("made/loose.json")
    assert kept["dials"] == {"boost": 0.4, "levels": 5, "timing": "scaled"}
    assert (kept["method"], kept["model"], kept["steps"], kept["guidance"]) == ("looserope", "tiny", 4, 2.5)
    assert (kept["image"], kept["mask"], kept["original"]) == (["photo.png"], "mask.png", None)
    assert kept["saliency"] == inspect.signature(fr.LooseRoPE.from_images).parameters["saliency"].default


@pytest.mark.parametrize(("more", "front_end", "timing"), [
    ((), "fastrope", "scaled"), (("--front-end", "published"), "published", "scaled"),
    (("--timing", "absolute"), "fastrope", "absolute"),
])  # fmt: skip
def test_the_published_front_end_and_timing(more, front_end, timing):
    words = ["--image", photo("photo.png"), "--mask", mask("mask.png"), "--boost", "0.4", "--steps", "8"]
    assert edit("--method", "looserope", *words, *more) == 0
    assert (record("edit.json")["front_end"], record("edit.json")["dials"]["timing"]) == (front_end, timing)
    method = fr.LooseRoPE.from_images(
        Image.open("photo.png"), mask=Image.open("mask.png"), boost=0.4, front_end=front_end, timing=timing
    )
    pipe = editors.load("tiny", torch.device("cpu"), torch.float32, False)
    images = [Image.open("photo.png")]
    call = editors.arguments(pipe, "tiny", editors.Settings(8, 2.5), images, editors.HARMONISE, seed=0)
    with fr.apply(pipe, method):
        expected = pipe(**call).images[0]
    assert np.abs(pixels("edit.png") - np.asarray(expected).astype(int)).max() <= 1
    other = fr.LooseRoPE.from_images(Image.open("photo.png"), mask=Image.open("mask.png"), boost=0.4)
    call["generator"] = torch.Generator().manual_seed(0)
    with fr.apply(pipe, other):
        plain = np.asarray(pipe(**call).images[0]).astype(int)
    assert (np.abs(pixels("edit.png") - plain).max() > 1) == bool(more)


def test_an_original_says_where_the_paste_is_as_a_mask_does():
    photo("original.png")
    composite = pixels("original.png").astype(np.uint8)
    composite[10:30, 10:20] = 255 - composite[10:30, 10:20]
    composite[10:30, 10:20, 0] = np.where(pixels("original.png")[10:30, 10:20, 0] < 128, 250, 0)
    Image.fromarray(composite).save("photo.png")
    words = "--method", "looserope", "--image", "photo.png"
    assert edit(*words, "--mask", mask("mask.png"), "--out", "a.png") == 0
    assert edit(*words, "--original", "original.png", "--out", "b.png") == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_seeds_and_neutral_dials():
    """Neutral GRAG equals the run without it; the same seed repeats; another differs."""
    words = "--method", "grag", "--prompt", "x"
    assert edit(*words, "--delta", "1", "--plain", "--seed", "3") == 0
    assert np.array_equal(pixels("edit.png"), pixels("edit-plain.png"))
    assert edit(*words, "--delta", "1", "--seed", "3", "--out", "again.png") == 0
    assert np.array_equal(pixels("edit.png"), pixels("again.png"))
    assert edit(*words, "--delta", "1", "--seed", "4", "--out", "other.png") == 0
    assert (pixels("edit.png") != pixels("other.png")).any()


def test_steered_by_the_built_in_judge(capsys):
    assert edit("--method", "looserope", "--judge", "region", "--max-tries", "1") == 0
    tries = record("edit.json")["tries"]
    assert 1 <= len(tries) <= 2
    assert tries[0]["boost"] == 0.83
    assert set(tries[0]["verdict"]) == {"class", "reasoning", "readable", "measures"}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("boost 0.830: ")]
    assert len(said) == 1
    assert tries[0]["verdict"]["class"] in said[0]


def test_progress_is_shown(capsys):
    assert edit("--method", "looserope") == 0
    assert "looserope: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["README.md", "docs/hosts.md"])
def test_commands_in_prose_run(page):
    text = (Path(__file__).resolve().parents[2] / page).read_text(encoding="utf-8")
    found = re.findall(r"`fastrope (edit [^`]*--model tiny[^`]*)`", text)
    assert found
    for words in found:
        assert main([*words.split(), "--steps", "2"]) == 0


def test_a_photo_of_a_phone_is_edited_upright():
    """What EXIF turns is what is edited, and a mask painted on it stays where it was painted."""
    upright = Image.open(photo("upright.png", (40, 20)))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save("phone.png", exif=exif)
    Image.fromarray(np.pad(np.full((10, 10), 255, dtype=np.uint8), ((5, 5), (10, 20)))).save("mask.png")
    for name in ("upright", "phone"):
        words = "--image", f"{name}.png", "--mask", "mask.png", "--boost", "0.3", "--out", f"{name}-edited.png"
        assert edit("--method", "looserope", *words) == 0
    assert np.array_equal(pixels("upright-edited.png"), pixels("phone-edited.png"))


def test_a_mask_is_the_same_in_every_form():
    white = np.asarray(Image.open(mask("grey.png")))
    Image.fromarray(white.astype(np.uint16) * 257).save("deep.png")
    clear = Image.new("RGB", (40, 40))
    clear.putalpha(Image.fromarray(white))
    clear.save("clear.png")
    words = "--method", "looserope", "--image", photo("photo.png"), "--boost", "0.3"
    for name in ("grey", "deep", "clear"):
        assert edit(*words, "--mask", f"{name}.png", "--out", f"out-{name}.png") == 0
    assert np.array_equal(pixels("out-grey.png"), pixels("out-deep.png"))
    assert np.array_equal(pixels("out-grey.png"), pixels("out-clear.png"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole Kontext pipeline on disk."""
    from diffusers import FluxKontextPipeline

    where = tmp_path_factory.mktemp("models") / "kontext"
    FluxKontextPipeline(**tiny_flux.parts()).save_pretrained(where)
    return str(where)


def test_a_folder_with_weights_is_loaded(folder):
    pipe = editors.load(folder, torch.device("cpu"), torch.bfloat16, False)
    assert type(pipe).__name__ == "FluxKontextPipeline"
    assert pipe.transformer.dtype == torch.bfloat16


def test_a_whole_pipeline_from_disk(folder, monkeypatch):
    """Prompt and picture go through encoders and VAE, and the judge sees what the VAE decodes."""
    from fastrope.commands import edit as command

    small = {"max_area": 1600, "_auto_resize": False}  # else a picture of a megapixel
    monkeypatch.setattr(command, "arguments", lambda *words: {**editors.arguments(*words), **small})
    words = "edit", "--model", folder, "--image", photo("photo.png"), "--steps", "3", "--plain"
    assert main([*words, "--method", "looserope", "--mask", mask("mask.png"), "--judge", "region"]) == 0
    assert record("edit.json")["tries"][0]["verdict"]["readable"]
    assert pixels("edit.png").shape == (40, 40, 3)
    assert main([*words, "--method", "grag", "--delta", "1.7", "--prompt", "make every night", "--out", "b.png"]) == 0
    for name in ("edit", "b"):
        assert (pixels(f"{name}.png") != pixels(f"{name}-plain.png")).any()
    assert (pixels("edit-plain.png") != pixels("b-plain.png")).any()  # the prompt is read
