"""``fastrope edit`` from end to end on the trained tiny model, and what it calls published ones with."""

from __future__ import annotations

import errno
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_flux
import torch
from PIL import Image
from shots import differ, mask, photo, pixels, record

import fastrope as fr
from fastrope import lab
from fastrope.cli import main
from fastrope.commands import pipelines
from fastrope.commands.edit import HARMONISE, _parser

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def edit(*words: str) -> int:
    return main(["edit", "--model", "tiny", "--steps", "3", *words])


def library(method, prompt: dict, steps: int = 3, seed: int = 0) -> np.ndarray:
    """What ``fr.apply`` on the lab's pipeline makes of photo.png, enlarged."""
    pipe = lab.pipeline()
    call = {**lab.CALL, "num_inference_steps": steps, "image": Image.open("photo.png").resize((16, 16)), **prompt}
    with fr.apply(pipe, method):
        made = pipe(**call, generator=torch.Generator().manual_seed(seed)).images[0]
    return np.asarray(made.resize((256, 256), Image.Resampling.NEAREST)).astype(int)


def test_grag_is_that_of_the_library(capsys):
    words = "--delta", "1.4", "--bias", "0.9", "--layers", "1-3", "--seed", "5", "--prompt", "make it a 7"
    assert edit("--method", "grag", *words, "--image", photo("photo.png"), "--plain", "--out", "made/a.png") == 0
    said = capsys.readouterr()
    assert said.out.split() == ["made/a.png", "made/a.json", "made/a-plain.png"]
    assert "grag: 100%" in said.err
    expected = library(fr.GRAG(0.9, 1.4, layers=range(1, 4)), lab.prompt("digit", digit=7), seed=5)
    assert np.abs(pixels("made/a.png") - expected).max() <= 1
    assert differ("made/a.png", "made/a-plain.png")
    kept = record("made/a.json")
    assert kept["dials"] == {"bias": 0.9, "delta": 1.4, "value_bias": 1.0, "value_delta": 1.0}
    assert (kept["method"], kept["model"], kept["steps"], kept["seed"]) == ("grag", "tiny", 3, 5)
    assert (kept["image"], kept["layers"], kept["prompt"]) == (["photo.png"], [1, 3], "make it a 7")
    assert (kept["pipeline"], kept["device"], kept["dtype"]) == ("FluxKontextPipeline", "cpu", "float32")
    assert {"torch", "fastrope"} <= set(kept)


@pytest.mark.parametrize(("more", "dials"), [
    ((), {}), (("--front-end", "published", "--levels", "3"), {"front_end": "published", "levels": 3}),
    (("--timing", "absolute", "--levels", "continuous"), {"timing": "absolute", "levels": "continuous"}),
])  # fmt: skip
def test_looserope_is_that_of_the_library(more, dials):
    words = "--image", photo("photo.png"), "--mask", mask("mask.png"), "--boost", "0.4", "--steps", "8"
    assert edit("--method", "looserope", *words, *more) == 0
    pictures = Image.open("photo.png"), Image.open("mask.png")
    method = fr.LooseRoPE.from_images(pictures[0], mask=pictures[1], boost=0.4, **dials)
    assert np.abs(pixels("edit.png") - library(method, lab.prompt("blend"), steps=8)).max() <= 1
    kept = record("edit.json")
    told = {"front_end": "fastrope", "timing": "scaled", "levels": 5} | dials
    levels = None if told["levels"] == "continuous" else told["levels"]
    assert kept["dials"] == {"boost": 0.4, "levels": levels, "timing": told["timing"]}
    assert (kept["front_end"], kept["mask"], kept["original"]) == (told["front_end"], "mask.png", None)
    assert kept["saliency"] == inspect.signature(fr.LooseRoPE.from_images).parameters["saliency"].default


def test_a_newcomer_gets_a_picture_without_any_file():
    for method, prompt in (("grag", "make it a 3"), ("looserope", "blend")):
        assert edit("--method", method, "--out", f"{method}.png") == 0
        assert pixels(f"{method}.png").shape == (256, 256, 3)
        assert record(f"{method}.json")["prompt"] == prompt


def test_an_original_says_where_the_paste_is_as_a_mask_does():
    """A photo that EXIF turns is edited upright, in both."""
    photo("original.png", (40, 30))
    composite = pixels("original.png").astype(np.uint8)
    composite[5:25, 10:20] = 255 - composite[5:25, 10:20]
    composite[5:25, 10:20, 0] = np.where(pixels("original.png")[5:25, 10:20, 0] < 128, 250, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(composite).transpose(Image.Transpose.ROTATE_90).save("photo.png", exif=exif)
    Image.fromarray(np.pad(np.full((20, 10), 255, dtype=np.uint8), ((5, 5), (10, 20)))).save("mask.png")
    words = "--method", "looserope", "--image", "photo.png"
    assert edit(*words, "--mask", "mask.png", "--out", "a.png") == 0
    assert edit(*words, "--original", "original.png", "--out", "b.png") == 0
    assert not differ("a.png", "b.png")


def test_seeds_and_neutral_dials():
    """Neutral GRAG equals the run without it; the same seed repeats; another differs."""
    words = "--method", "grag", "--delta", "1"
    assert edit(*words, "--plain", "--seed", "3") == 0
    assert not differ("edit.png", "edit-plain.png")
    for seed in ("3", "4"):
        assert edit(*words, "--seed", seed, "--out", f"{seed}.png") == 0
    assert not differ("edit.png", "3.png")
    assert differ("edit.png", "4.png")


def test_steered_by_the_built_in_judge(capsys):
    assert edit("--method", "looserope", "--judge", "region", "--max-tries", "1") == 0
    tries = record("edit.json")["tries"]
    assert 1 <= len(tries) <= 2
    assert tries[0]["boost"] == 0.83
    assert set(tries[0]["verdict"]) == {"class", "reasoning", "readable", "measures"}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("boost 0.830: ")]
    assert len(said) == 1
    assert tries[0]["verdict"]["class"] in said[0]


@pytest.mark.parametrize("page", ["README.md", "docs/hosts.md"])
def test_commands_in_prose_run(page):
    text = (Path(__file__).resolve().parents[2] / page).read_text(encoding="utf-8")
    found = re.findall(r"`fastrope (edit [^`]*--model tiny[^`]*)`", text)
    assert found
    for words in found:
        assert main([*words.split(), "--steps", "2"]) == 0


# ---- what does not work, and says so --------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "grag", "--image", "none.png"], "--image: no file none.png"),
    (["--method", "grag", "--prompt", "at dusk"], "--prompt: expected words that the tiny model knows"),
    (["--method", "looserope", "--image", "photo.png", "--mask", "small.png"], "mask: expected the si"),
    (["--method", "looserope", "--image", "text.png", "--mask", "mask.png"], "--image: text.png is no"),
    (["--method", "looserope", "--image", "photo.png", "--original", "photo.png"], "original: expected"),
    (["--method", "grag", "--image", "photo.png", "--image", "photo.png"], "--image: expected one"),
    (["--method", "grag", "--delta", "1", "2"], "GRAG.delta: expected 1 values, one per reference"),
    (["--method", "looserope", "--levels", "1"], "LooseRoPE.levels: expected an integer of at least 2"),
    (["--method", "grag", "--device", "nowhere"], "--device: "),
    (["--method", "grag", "--layers", "7-9"], "layers: expected some of the model's 6 layers"),
    (["--method", "grag", "--steps", "0"], "--steps: expected at least 1, received 0"),
    (["--method", "grag", "--seed", str(2**64)], "--seed: expected a number of 64 bits"),
    (["--method", "grag", "--guidance", "nan"], "--guidance: expected a finite number, received nan"),
    (["--method", "grag", "--guidance", "2"], "--guidance: expected none with --model tiny, received 2.0"),
    (["--method", "grag", "--offload"], "--offload: expected a GPU to keep parts on, received cpu"),
    (["--method", "grag", "--negative-prompt", "x"], "--negative-prompt: expected none, received one; the guidance of"),
])  # fmt: skip
def test_problems_are_named_in_one_line(words, message, only_line):
    photo("photo.png")
    mask("mask.png")
    mask("small.png", (10, 10))
    Path("text.png").write_text("text")
    assert edit(*words) == 2
    only_line("edit", message)
    assert not Path("edit.png").exists()


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "grag", "--model", "tiny", "--boost", "1"], "--boost belongs to --method looserope"),
    (["--method", "looserope", "--model", "tiny", "--delta", "1"], "--delta belongs to --method grag"),
    (["--method", "grag", "--model", "tiny", "--max-tries", "1"], "--max-tries belongs to --method looserope"),
    (["--method", "looserope", "--model", "tiny", "--max-tries", "1"], "--max-tries wants a --judge"),
    (["--method", "grag", "--model", "x/y"], "--image is needed"),
    (["--method", "grag", "--model", "x/y", "--image", "a.png"], "grag wants a --prompt"),
    (["--method", "looserope", "--model", "tiny", "--image", "a.png"], "looserope wants --mask or --original"),
    (["--method", "looserope", "--model", "x/y", "--image", "a.png", "--mask", "b.png", "--original", "c.png"],
     "looserope wants --mask or --original, and not both"),
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
    words = "--model", "nobody/nothing", "--image", photo("a.png"), "--prompt", "x"
    assert main(["edit", "--method", "grag", *words]) == 2
    said = capsys.readouterr().err
    assert "fastrope edit: cannot load nobody/nothing: " in said
    assert "hf download nobody/nothing" in said
    assert edit("--method", "looserope", "--judge", "nobody/nothing") == 2
    assert "fastrope edit: --judge: cannot load nobody/nothing: " in capsys.readouterr().err


def test_an_absent_detector(only_line, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    assert edit("--method", "looserope", "--saliency", "mask_rcnn") == 2
    only_line("edit", 'saliency="mask_rcnn" needs torchvision')


@pytest.mark.parametrize(("package", "extra"), [("diffusers",) * 2, ("transformers",) * 2, ("PIL", "demo")])
def test_absent_packages(only_line, monkeypatch, package, extra):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert edit("--method", "looserope") == 2
    only_line("edit", f'{package} is not installed: pip install "fastrope[{extra}]"')


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taken", "words"), [
    ("photo.json", ["--out", "photo.png"]), ("photo-plain.png", ["--out", "photo.png", "--plain"]), ("edit.png", []),
    ("edit.json", []),
])  # fmt: skip
def test_files_that_nobody_named_are_kept(taken, words, only_line, monkeypatch):
    Path(taken).write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("fastrope.commands.edit.load", None)  # nothing is loaded before it is said
        assert edit("--method", "grag", *words) == 2
    only_line("edit", f"--out: {taken} is there already; --force replaces it")
    assert Path(taken).read_text() == "mine"
    assert edit("--method", "grag", *words, "--force") == 0
    assert Path(taken).read_bytes() != b"mine"


def test_a_result_that_was_named_is_replaced():
    Path("photo.png").write_text("mine")
    assert edit("--method", "grag", "--out", "photo.png") == 0
    assert pixels("photo.png").shape == (256, 256, 3)


@pytest.mark.parametrize(("out", "message"), [
    ("folder.png", "--out: expected a file, received folder.png"), ("a.psd", "--out: pictures in PSD can be read but "),
    ("text/a.png", "--out: expected a folder, received text"), ("edited", "--out: unknown file extension: none; edite"),
    ("picture.what", "--out: unknown file extension: .what; picture.png would do"),
])  # fmt: skip
def test_a_result_that_cannot_be_written_is_refused_before_the_work(out, message, only_line, monkeypatch):
    monkeypatch.setattr("fastrope.commands.edit.load", None)
    Path("folder.png").mkdir()
    Path("text").touch()
    assert edit("--method", "grag", "--out", out) == 2
    only_line("edit", message)


def test_a_result_that_is_not_finite_is_no_picture(only_line, monkeypatch):
    assert edit("--method", "grag", "--delta", "1e300") == 2
    only_line("edit", "the result: expected finite pixels (smaller dials, or the --dtype that")
    step = diffusers.FlowMatchEulerDiscreteScheduler.step  # no dial of LooseRoPE goes so far
    broken = lambda self, *given, **more: (step(self, *given, **more)[0] * torch.nan,)  # noqa: E731
    monkeypatch.setattr(diffusers.FlowMatchEulerDiscreteScheduler, "step", broken)
    assert edit("--method", "looserope", "--judge", "region", "--max-tries", "0") == 2
    assert list(Path().iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(only_line, monkeypatch):
    Path("photo.png").write_text("mine")

    def save(self, path, format=None):
        if isinstance(path, Path):  # the trial of the format goes to memory
            path.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert edit("--method", "grag", "--out", "photo.png") == 2
    only_line("edit", "photo.png: No space left on device")
    assert [path.name for path in Path().iterdir()] == ["photo.png"]
    assert Path("photo.png").read_text() == "mine"


@pytest.mark.parametrize(("error", "code", "message"), [
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory; "),
    (KeyboardInterrupt(), 130, "interrupted"),
])  # fmt: skip
def test_a_run_that_is_broken_off_is_told_in_one_line(error, code, message, only_line, monkeypatch):
    def fail(*given, **more):
        raise error

    monkeypatch.setattr("diffusers.FlowMatchEulerDiscreteScheduler.step", fail)
    assert edit("--method", "grag") == code
    only_line("edit", message)
    assert list(Path().iterdir()) == []


# ---- published pipelines ---------------------------------------------------------------------------------------------


def call_of(pipeline: str, method: str, *sizes: tuple[int, int]) -> dict:
    """Arguments of a pipeline's call but for the pictures; the names are the pipeline's own."""
    kind = getattr(diffusers, pipeline)
    pipe = object.__new__(type(pipeline, (), {"__call__": kind.__call__}))
    model = pipelines.Model(pipe, {}, qwen_steps=24 if method == "grag" else 28)
    images = [Image.new("RGB", size) for size in sizes]
    call = model.call("words") | model.editing(images)
    assert set(call) <= set(inspect.signature(kind.__call__).parameters)
    assert call.pop("image") == (images if len(images) > 1 else images[0])
    assert call.pop("prompt") == "words"
    return call


@pytest.mark.parametrize(("pipeline", "method", "expected"), [
    ("FluxKontextPipeline", "grag", {"num_inference_steps": 28, "guidance_scale": 2.5, "width": 60, "height": 40}),
    ("QwenImageEditPlusPipeline", "grag",
     {"num_inference_steps": 24, "true_cfg_scale": 4.0, "negative_prompt": " "}),
    ("QwenImageEditPipeline", "looserope", {"num_inference_steps": 28, "true_cfg_scale": 4.0, "negative_prompt": " "}),
    ("Flux2Pipeline", "grag", {"num_inference_steps": 28, "guidance_scale": 4.0}),
    ("LongCatImageEditPipeline", "grag", {"num_inference_steps": 28}),
])  # fmt: skip
def test_settings_of_the_pipelines(pipeline, method, expected):
    if not hasattr(diffusers, pipeline):
        pytest.skip(f"this diffusers has no {pipeline}")
    assert call_of(pipeline, method, (60, 40)) == expected


def test_several_pictures_go_into_one_call():
    assert "width" not in call_of("QwenImageEditPlusPipeline", "grag", (64, 64), (32, 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole Kontext pipeline on disk."""
    where = tmp_path_factory.mktemp("models") / "kontext"
    diffusers.FluxKontextPipeline(**tiny_flux.parts()).save_pretrained(where)
    return str(where)


def load(model: str, *words: str):
    return pipelines.load(_parser().parse_args(["--method", "grag", "--model", model, *words]), "--model")


def test_a_folder_with_weights_is_loaded(folder, tmp_path):
    model = load(folder, "--dtype", "bfloat16", "--guidance", "3", "--steps", "7")
    assert model.kind == "FluxKontextPipeline"
    assert model.pipe.transformer.dtype == torch.bfloat16
    assert (model.settings.guidance, model.settings.steps) == (3.0, 7)
    with pytest.raises(pipelines.Missing, match=r"^cannot load .*: .*model_index.json"):
        load(str(tmp_path))


def test_a_model_that_reads_no_picture_is_named(tmp_path, capsys):
    diffusers.FluxPipeline(**tiny_flux.parts()).save_pretrained(tmp_path / "flux")
    words = "--model", str(tmp_path / "flux"), "--image", photo("a.png"), "--prompt", "x"
    assert main(["edit", "--method", "grag", *words]) == 2
    said = capsys.readouterr().err
    assert "fastrope edit: --model: expected a model that reads pictures (FLUX.1 Kontext, FLUX.2, Qwen-Image" in said


def test_a_whole_pipeline_from_disk(folder, monkeypatch):
    """Prompt and picture go through encoders and VAE, and the judge sees what the VAE decodes."""
    editing = pipelines.Model.editing
    small = {"max_area": 1600, "_auto_resize": False}  # else a picture of a megapixel
    monkeypatch.setattr(pipelines.Model, "editing", lambda self, images: editing(self, images) | small)
    words = "edit", "--model", folder, "--image", photo("photo.png"), "--steps", "3", "--plain"
    assert main([*words, "--method", "looserope", "--mask", mask("mask.png"), "--judge", "region"]) == 0
    assert record("edit.json")["tries"][0]["verdict"]["readable"]
    assert record("edit.json")["prompt"] == HARMONISE
    assert pixels("edit.png").shape == (40, 40, 3)
    assert main([*words, "--method", "grag", "--delta", "1.7", "--prompt", "make every night", "--out", "b.png"]) == 0
    assert differ("edit.png", "edit-plain.png")
    assert differ("b.png", "b-plain.png")
    assert differ("edit-plain.png", "b-plain.png")  # the prompt is read


def test_offloading_is_left_to_diffusers(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(pipelines, "machine", lambda options: (torch.device("cpu"), torch.float32))
    monkeypatch.setattr(diffusers.FluxKontextPipeline, "enable_model_cpu_offload", lambda self, device: seen.append(1))
    load(folder, "--offload")
    assert seen == [1]
