"""``fastrope edit`` from end to end on the tiny pipeline, and what it would call the real ones with."""

from __future__ import annotations

import errno
import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_flux
import torch
from PIL import Image

import fastrope as fr
from fastrope.cli import main
from fastrope.commands import editors

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def edit(*words: str) -> int:
    return main(["edit", "--model", "tiny", "--steps", "4", *words])


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name)).astype(int)


def record(name: str = "edit.json") -> dict:
    with open(name) as file:
        return json.load(file)


def photo(name: str, size: tuple[int, int] = (40, 40), seed: int = 0) -> str:
    noise = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(name)
    return name


def mask(name: str, size: tuple[int, int] = (40, 40)) -> str:
    inside = np.zeros(size[::-1], dtype=np.uint8)
    inside[10:30, 10:20] = 255
    Image.fromarray(inside).save(name)
    return name


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
    assert (record()["front_end"], record()["dials"]["timing"]) == (front_end, timing)
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
    tries = record()["tries"]
    assert 1 <= len(tries) <= 2
    assert tries[0]["boost"] == 0.83
    assert set(tries[0]["verdict"]) == {"class", "reasoning", "readable", "measures"}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("boost 0.830: ")]
    assert len(said) == 1
    assert tries[0]["verdict"]["class"] in said[0]


def test_progress_is_shown(capsys):
    assert edit("--method", "looserope") == 0
    assert "looserope: 100%" in capsys.readouterr().err


# ---- what does not work, and says so --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/hosts.md"])
def test_commands_in_prose_run(page):
    text = (Path(__file__).resolve().parents[2] / page).read_text(encoding="utf-8")
    found = re.findall(r"`fastrope (edit [^`]*--model tiny[^`]*)`", text)
    assert found
    for words in found:
        assert main([*words.split(), "--steps", "2"]) == 0


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "grag", "--image", "none.png"], "fastrope edit: --image: no file none.png"),
    (["--method", "looserope", "--image", "photo.png"], "fastrope edit: looserope wants --mask or --original"),
    (["--method", "looserope", "--image", "photo.png", "--mask", "small.png"], "fastrope edit: mask: expected the si"),
    (["--method", "looserope", "--image", "text.png", "--mask", "mask.png"], "fastrope edit: --image: text.png is no"),
    (["--method", "looserope", "--image", "photo.png", "--original", "photo.png"], "fastrope edit: original: expected"),
    (["--method", "grag", "--image", "photo.png", "--image", "photo.png"], "fastrope edit: --image: expected one"),
    (["--method", "grag", "--delta", "1", "2"], "fastrope edit: GRAG.delta: expected 1 values, one per reference"),
    (["--method", "looserope", "--levels", "1"], "fastrope edit: LooseRoPE.levels: expected an integer of at least 2"),
    (["--method", "grag", "--out", "text.png/picture.png"], "fastrope edit: --out: "),
    (["--method", "grag", "--device", "nowhere"], "fastrope edit: --device: "),
    (["--method", "grag", "--layers", "7-9"], "fastrope edit: layers: expected some of the model's 3 layers"),
    (["--method", "grag", "--steps", "0"], "fastrope edit: --steps: expected at least 1, received 0"),
    (["--method", "grag", "--seed", str(2**64)], "fastrope edit: --seed: expected a number of 64 bits"),
    (["--method", "grag", "--guidance", "nan"], "fastrope edit: --guidance: expected a finite number, received nan"),
    (["--method", "grag", "--offload"], "fastrope edit: --offload: expected a GPU to keep parts on, received cpu"),
    (["--method", "grag", "--negative-prompt", "x"], "fastrope edit: --negative-prompt: FluxKontextPipeline takes"),
    (["--method", "looserope", "--out", "picture.what"], "fastrope edit: --out: unknown file extension: .what; pict"),
    (["--method", "looserope", "--out", "edited"], "fastrope edit: --out: unknown file extension: none; edited.png"),
])  # fmt: skip
def test_problems_are_named_in_one_line(words, message, capsys):
    photo("photo.png")
    mask("mask.png")
    mask("small.png", (10, 10))
    with open("text.png", "w") as file:
        file.write("text")
    assert edit(*words) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastrope edit: ")]
    assert len(said) == 1
    assert said[0].startswith(message)


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "grag", "--model", "tiny", "--boost", "1"], "--boost belongs to --method looserope"),
    (["--method", "looserope", "--model", "tiny", "--delta", "1"], "--delta belongs to --method grag"),
    (["--method", "grag", "--model", "tiny", "--max-tries", "1"], "--max-tries belongs to --method looserope"),
    (["--method", "looserope", "--model", "tiny", "--max-tries", "1"], "--max-tries wants a --judge"),
    (["--method", "grag", "--model", "x/y"], "--image is needed"),
    (["--method", "grag", "--model", "x/y", "--image", "a.png"], "grag wants a --prompt"),
    (["--method", "looserope", "--model", "x/y", "--image", "a.png"], "looserope wants --mask or --original"),
    (["--method", "looserope", "--model", "tiny", "--layers", "5-2"], "expected FIRST-LAST, received '5-2'"),
    (["--method", "looserope", "--model", "tiny", "--levels", "few"], 'expected a number or "continuous"'),
])  # fmt: skip
def test_usage(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["edit", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_absent_weights(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert (
        main(["edit", "--method", "grag", "--model", "nobody/nothing", "--image", photo("a.png"), "--prompt", "x"]) == 2
    )
    said = capsys.readouterr().err
    assert "fastrope edit: cannot load nobody/nothing: " in said
    assert "hf download nobody/nothing" in said


def test_an_absent_detector(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    assert edit("--method", "looserope", "--saliency", "mask_rcnn") == 2
    assert 'fastrope edit: saliency="mask_rcnn" needs torchvision' in capsys.readouterr().err


def test_nothing_is_loaded_for_a_result_that_cannot_be_written(capsys, monkeypatch):
    monkeypatch.setattr("fastrope.commands.edit.load", None)
    assert edit("--method", "grag", "--out", "picture.what") == 2


def test_absent_judge(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert edit("--method", "looserope", "--judge", "nobody/nothing") == 2
    assert "fastrope edit: --judge: cannot load nobody/nothing: " in capsys.readouterr().err


@pytest.mark.parametrize(("package", "extra"), [("diffusers",) * 2, ("transformers",) * 2, ("PIL", "demo")])
def test_absent_packages(capsys, monkeypatch, package, extra):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert edit("--method", "looserope") == 2
    said = capsys.readouterr().err
    assert f'fastrope edit: {package} is not installed: pip install "fastrope[{extra}]"' in said


# ---- pictures and results --------------------------------------------------------------------------------------------


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


def only_line(capsys, start: str) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "fastrope edit: " in line]
    assert line.startswith(f"fastrope edit: {start}")
    return line


@pytest.mark.parametrize(("taken", "words"), [
    ("photo.json", ["--out", "photo.png"]), ("photo-plain.png", ["--out", "photo.png", "--plain"]), ("edit.png", []),
    ("edit.json", []),
])  # fmt: skip
def test_files_that_nobody_named_are_kept(taken, words, capsys, monkeypatch):
    Path(taken).write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("fastrope.commands.edit.load", None)  # nothing is loaded before it is said
        assert edit("--method", "grag", *words) == 2
    only_line(capsys, f"--out: {taken} is there already; --force replaces it")
    assert Path(taken).read_text() == "mine"
    assert edit("--method", "grag", *words, "--force") == 0
    assert Path(taken).read_bytes() != b"mine"


def test_a_result_that_was_named_is_replaced():
    Path("photo.png").write_text("mine")
    assert edit("--method", "grag", "--out", "photo.png") == 0
    assert pixels("photo.png").shape == (32, 32, 3)


@pytest.mark.parametrize(("out", "message"), [
    ("folder.png", "--out: expected a file, received folder.png"), ("a.psd", "--out: pictures in PSD can be read but "),
    ("text/a.png", "--out: expected a folder, received text"),
])  # fmt: skip
def test_a_result_that_cannot_be_written_is_refused_before_the_work(out, message, capsys, monkeypatch):
    monkeypatch.setattr("fastrope.commands.edit.load", None)
    Path("folder.png").mkdir()
    Path("text").touch()
    assert edit("--method", "grag", "--out", out) == 2
    only_line(capsys, message)


def test_a_result_that_is_not_finite_is_no_picture(capsys, monkeypatch):
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert edit("--method", "grag", "--delta", "1e300") == 2
    only_line(capsys, "the result: expected finite pixels (smaller dials, or the --dtype that")
    step = FlowMatchEulerDiscreteScheduler.step  # no dial of LooseRoPE goes so far
    broken = lambda self, *given, **more: (step(self, *given, **more)[0] * torch.nan,)  # noqa: E731
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", broken)
    assert edit("--method", "looserope", "--judge", "region", "--max-tries", "1") == 2
    assert "fastrope edit: the result: expected finite pixels" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(capsys, monkeypatch):
    Path("photo.png").write_text("mine")

    def save(self, path, format=None):
        if isinstance(path, Path):  # the trial of the format goes to memory
            path.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert edit("--method", "grag", "--out", "photo.png") == 2
    only_line(capsys, "photo.png: No space left on device")
    assert [path.name for path in Path().iterdir()] == ["photo.png"]
    assert Path("photo.png").read_text() == "mine"


@pytest.mark.parametrize(("error", "code", "message"), [
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory; --offload, --dtype bfloat16 or a small"),
    (KeyboardInterrupt(), 130, "interrupted"),
])  # fmt: skip
def test_a_run_that_is_broken_off_is_told_in_one_line(error, code, message, capsys, monkeypatch):
    def fail(*given, **more):
        raise error

    monkeypatch.setattr("diffusers.FlowMatchEulerDiscreteScheduler.step", fail)
    assert edit("--method", "grag") == code
    only_line(capsys, message)
    assert list(Path().iterdir()) == []


# ---- real pipelines -------------------------------------------------------------------------------------------------


def arguments_for(pipeline: str, method: str, *sizes: tuple[int, int], **given) -> dict:
    pipe = type(pipeline, (), {})()
    settings = editors.settings_for(pipe, editors.SETTINGS[method])
    images = [Image.new("RGB", size) for size in sizes]
    call = editors.arguments(pipe, "some/model", settings, images, "words", 5)
    assert call.pop("generator").initial_seed() == 5
    assert call.pop("prompt") == "words"
    image = call.pop("image")
    assert image == (images if len(images) > 1 else images[0])
    return call


@pytest.mark.parametrize("method", ["looserope", "grag"])
def test_kontext_keeps_the_proportions(method):
    assert arguments_for("FluxKontextPipeline", method, (1200, 800)) == {
        "num_inference_steps": 28, "guidance_scale": 2.5, "width": 1200, "height": 800,
    }  # fmt: skip


@pytest.mark.parametrize(("method", "steps"), [("grag", 24), ("looserope", 28)])
def test_qwen_guides_in_two_passes(method, steps):
    assert arguments_for("QwenImageEditPlusPipeline", method, (64, 64), (32, 32)) == {
        "num_inference_steps": steps, "true_cfg_scale": 4.0, "negative_prompt": " ",
    }  # fmt: skip


def test_other_pipelines_keep_their_guidance():
    assert arguments_for("Flux2Pipeline", "grag", (64, 64)) == {"num_inference_steps": 28}


def test_names_of_arguments_are_those_of_the_pipelines():
    import inspect

    import diffusers

    for name in ("FluxKontextPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"):
        known = set(inspect.signature(getattr(diffusers, name).__call__).parameters)
        assert set(arguments_for(name, "grag", (64, 64))) <= known


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


def test_a_model_that_reads_no_picture_is_named(tmp_path, capsys):
    from diffusers import FluxPipeline

    FluxPipeline(**tiny_flux.parts()).save_pretrained(tmp_path / "flux")
    words = "--model", str(tmp_path / "flux"), "--image", photo("a.png"), "--prompt", "x"
    assert main(["edit", "--method", "grag", *words]) == 2
    said = capsys.readouterr().err
    assert "fastrope edit: --model: expected a model that reads pictures (FLUX.1 Kontext, FLUX.2, Qwen-Image" in said


def test_a_folder_without_is_named(tmp_path):
    with pytest.raises(editors.Missing, match=r"^cannot load .*: .*model_index.json"):
        editors.load(str(tmp_path), torch.device("cpu"), torch.float32, False)


def test_a_whole_pipeline_from_disk(folder, monkeypatch):
    """Prompt and picture go through encoders and VAE, and the judge sees what the VAE decodes."""
    from fastrope.commands import edit as command

    small = {"max_area": 1600, "_auto_resize": False}  # else a picture of a megapixel
    monkeypatch.setattr(command, "arguments", lambda *words: {**editors.arguments(*words), **small})
    words = "edit", "--model", folder, "--image", photo("photo.png"), "--steps", "3", "--plain"
    assert main([*words, "--method", "looserope", "--mask", mask("mask.png"), "--judge", "region"]) == 0
    assert record()["tries"][0]["verdict"]["readable"]
    assert pixels("edit.png").shape == (40, 40, 3)
    assert main([*words, "--method", "grag", "--delta", "1.7", "--prompt", "make every night", "--out", "b.png"]) == 0
    for name in ("edit", "b"):
        assert (pixels(f"{name}.png") != pixels(f"{name}-plain.png")).any()
    assert (pixels("edit-plain.png") != pixels("b-plain.png")).any()  # the prompt is read
