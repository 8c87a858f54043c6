"""``fastrope style`` from end to end on the trained tiny model, what it shares with ``sweep``, and what both call
published pipelines with."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_flux
import torch
from PIL import Image
from shots import differ, photo, pixels, record

import fastrope as fr
from fastrope import lab
from fastrope.cli import main
from fastrope.commands import pipelines, style
from fastrope.methods.untwisting import PRESETS

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def draw(*words: str, command: str = "style") -> int:
    return main([command, "--model", "tiny", "--steps", "3", *words])


def test_a_picture_and_its_record(capsys):
    words = "--prompt", "a red 5", "--reference", photo("ref.png"), "--plain", "--out", "made/five.png"
    assert draw(*words, "--s-hf", "0.9", "1", "--s-lf", "1.2", "--beta", "3", "--adain", "0.25", "--seed", "5") == 0
    said = capsys.readouterr()
    assert said.out.split() == ["made/five.png", "made/five.json", "made/five-plain.png"]
    assert "style: 100%" in said.err
    assert pixels("made/five.png").shape == (256, 256, 3)
    assert differ("made/five.png", "made/five-plain.png")
    kept = record("made/five.json")
    assert kept["dials"] == {
        "s_hf": [0.9, 1.0], "s_lf": 1.2, "beta": 3.0, "adain": 0.25, "axis0": "low", "blocks": None, "layers": None,
    }  # fmt: skip
    assert (kept["seed"], kept["reference_seed"], kept["steps"], kept["trajectory"]) == (5, 6, 3, "linear")
    assert (kept["reference"], kept["prompt"], kept["gamma"]) == (["ref.png"], "a red 5", None)
    assert (kept["pipeline"], kept["height"], kept["width"]) == ("FluxPipeline", 16, 16)


def test_the_picture_is_that_of_the_library(capsys):
    """Options reach the method, the trajectory and the pipeline; without a file there is a reference, too."""
    assert draw("--preset", "bigstationw-2026-06", "--trajectory", "rf_inversion", "--gamma", "0.8", "--axis0", "0.7",
                "--layers", "0-1", "--seed", "3", "--reference-prompt", "a 4", "--cache", "host") == 0  # fmt: skip
    assert "rf_inversion: 100%" in capsys.readouterr().err
    pipe, size = lab.pipeline(edit=False), dict(height=16, width=16, num_inference_steps=3)
    source = fr.prepare_reference(
        pipe, lab.pictures(1), "rf_inversion", gamma=0.8, generator=torch.Generator().manual_seed(4), **size,
        **lab.prompt(digit=4),
    )  # fmt: skip
    method = fr.UntwistingRoPE.from_preset("bigstationw-2026-06", axis0=0.7, layers=range(2))
    with fr.apply(pipe, method, reference=fr.ReferenceCache(source)):
        made = pipe(**size, **lab.prompt(digit=3), generator=torch.Generator().manual_seed(3)).images[0]
    expected = np.asarray(made.resize((256, 256), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(pixels("style.png") - expected).max() <= 1


def test_dials_change_the_picture_and_seeds_repeat():
    seen = []
    for n, words in enumerate([(), ("--s-hf", "1"), ("--s-lf", "0.6"), ("--s-hf", "1", "--adain", "0"),
                               ("--s-hf", "1", "--blocks", "single"), ("--s-hf", "1", "--trajectory", "rf_inversion"),
                               ("--s-hf", "1", "--seed", "7"), ("--s-hf", "1", "--reference-seed", "9"),
                               ()]):  # fmt: skip
        assert draw(*words, "--out", f"{n}.png") == 0
        seen.append(pixels(f"{n}.png").tobytes())
    assert seen.pop() == seen[0]
    assert len(set(seen)) == len(seen)
    assert record("5.json")["gamma"] == 0.5  # the default, written down where it was used


def test_a_native_reference():
    assert draw("--native", "--prompt", "make it a 7", "--reference", photo("ref.png"), "--plain") == 0
    kept = record("style.json")
    assert (kept["pipeline"], kept["native"], kept["trajectory"]) == ("FluxKontextPipeline", True, None)
    assert differ("style.png", "style-plain.png")
    assert draw("--native", "--out", "b.png") == 0


def test_several_references():
    words = "--reference", photo("a.png"), "--s-hf", "1"
    assert draw(*words, "--reference", photo("b.png", seed=1), "--cache", "host", "--out", "two.png") == 0
    assert draw(*words, "--out", "one.png") == 0
    assert differ("two.png", "one.png")


def test_presets_and_the_old_name_of_one():
    for preset in ("bigstationw-2026-06", "xmarre-0.2"):
        assert draw("--preset", preset, "--s-lf", "1", "1.5", "--force") == 0
        assert record("style.json")["preset"] == preset
        weights = {str(count): list(weights) for count, weights in PRESETS[preset]["axis0"].items()}
        assert record("style.json")["dials"]["axis0"] == weights
    with pytest.warns(DeprecationWarning, match="bigstationw-workflows-2026-06"):
        assert draw("--preset", "community", "--force") == 0


# ---- what does not work, and says so ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["style", "sweep"])
@pytest.mark.parametrize(("words", "message"), [
    (["--reference", "none.png"], "--reference: no file none.png"),
    (["--reference", "text.png"], "--reference: text.png is no picture"),
    (["--prompt", "a heron"], "--prompt: expected words that the tiny model knows"),
    (["--reference-prompt", "a heron"], "--reference-prompt: expected words that the tiny model knows"),
    (["--beta", "0"], "UntwistingRoPE.beta: expected a number above 0, received 0.0"),
    (["--adain", "2"], "UntwistingRoPE.adain: expected a strength in 0..1, received 2.0"),
    (["--trajectory", "rf_inversion", "--gamma", "2"], "gamma: expected a number in 0..1, received 2.0"),
    (["--out", "picture.what"], "--out: unknown file extension"),
    (["--out", "text.png/picture.png"], "--out: "),
    (["--steps", "0"], "--steps: expected at least 1, received 0"),
    (["--width", "0"], "--width: expected at least 1, received 0"),
    (["--width", "32"], "--width: expected 16 with --model tiny, received 32"),
    (["--native", "--height", "-8"], "--height: expected at least 1, received -8"),
    (["--seed", str(-(2**64))], "--seed: expected a number of 64 bits"),
    (["--reference-seed", str(2**70)], "--reference-seed: expected a number of 64 bits"),
    (["--guidance", "inf"], "--guidance: expected a finite number, received inf"),
    (["--negative-prompt", "x"], "--negative-prompt: expected none, received one; the guidance of FluxPipeline is"),
    (["--device", "nowhere"], "--device: "),
    (["--offload", "--device", "cpu"], "--offload: expected a GPU to keep parts on, received cpu"),
    (["--blocks", "joint"], "kinds: expected some of the model's kinds of block, ('double', 'single'), received"),
    (["--layers", "7-9"], "layers: expected some of the model's 6 layers"),
    (["--native", "--reference", "ref.png", "--reference", "ref.png"], "--image: expected one picture"),
])  # fmt: skip
def test_problems_are_named_in_one_line(words, message, command, only_line):
    photo("ref.png")
    Path("text.png").write_text("text")
    assert draw(*words, command=command) == 2
    only_line(command, message)


def test_three_numbers_are_too_many(only_line):
    assert draw("--s-hf", "0", "1", "2") == 2
    only_line("style", "--s-hf: expected one number, or those of the first and the last step")


@pytest.mark.parametrize("command", ["style", "sweep"])
@pytest.mark.parametrize(("words", "message"), [
    (["--model", "x/y", "--prompt", "x"], "--reference is needed, for every model but tiny"),
    (["--model", "x/y", "--reference", "a.png"], "--prompt is needed, for every model but tiny"),
    (["--model", "tiny", "--gamma", "0.5"], "--gamma belongs to --trajectory rf_inversion"),
    (["--model", "tiny", "--native", "--cache", "host"], "--cache is for a shared reference"),
    (["--model", "tiny", "--native", "--trajectory", "rf_inversion"], "--trajectory is for a shared reference"),
    (["--model", "tiny", "--native", "--reference-prompt", "x"], "--reference-prompt is for a shared reference"),
    (["--model", "tiny", "--native", "--reference-seed", "3"], "--reference-seed is for a shared reference"),
    (["--model", "tiny", "--trajectory", "ddim"], "invalid choice: 'ddim'"),
    (["--model", "tiny", "--preset", "mine"], "invalid choice: 'mine'"),
    (["--model", "tiny", "--axis0", "high"], "expected low, match or a number, received 'high'"),
    (["--model", "tiny", "--layers", "5-2"], "expected FIRST-LAST, received '5-2'"),
    (["--model", "tiny", "--s-hf", "few"], "few"),
])  # fmt: skip
def test_usage(words, message, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["style", "sweep"])
def test_absent_weights(command, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([command, "--model", "nobody/nothing", "--reference", photo("a.png"), "--prompt", "x"]) == 2
    said = capsys.readouterr().err
    assert f"fastrope {command}: cannot load nobody/nothing: " in said
    assert "hf download nobody/nothing" in said


@pytest.mark.parametrize(("command", "package", "extra"), [
    ("style", "diffusers", "diffusers"), ("style", "transformers", "transformers"), ("style", "PIL", "demo"),
    ("sweep", "diffusers", "diffusers"), ("sweep", "matplotlib", "demo"), ("sweep", "tqdm", "demo"),
])  # fmt: skip
def test_absent_packages(command, package, extra, only_line, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert draw(command=command) == 2
    only_line(command, f'{package} is not installed: pip install "fastrope[{extra}]"')


# ---- published pipelines ---------------------------------------------------------------------------------------------


def prepared(pipeline: str, monkeypatch, *words: str, size=(1200, 800), guidance_embeds=False):
    """The arguments of the reference's call, and what is ready, for a pipeline that is not loaded."""
    kind = getattr(diffusers, pipeline)
    transformer = torch.nn.Linear(1, 1)
    transformer.config = argparse.Namespace(guidance_embeds=guidance_embeds)
    known = {"set_progress_bar_config": lambda *a, **k: None, "vae_scale_factor": 8, "__call__": kind.__call__,
             "to": lambda self, device: self}  # fmt: skip
    pipe = object.__new__(type(pipeline, (), known))
    pipe.transformer = transformer
    asked = {}

    def prepare(pipe, pictures, trajectory, **call):
        asked.update(call)
        return fr.Reference(lambda step, sigma: None, {})

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *given, **named: pipe)
    monkeypatch.setattr(style, "prepare_reference", prepare)
    Image.new("RGB", size).save("ref.png")
    parser = style._parser()
    options = parser.parse_args(["--model", "some/model", "--reference", "ref.png", "--prompt", "p", *words])
    style.check_options(parser, options)
    ready = style.Styling(options)
    known = set(inspect.signature(kind.__call__).parameters)
    assert set(ready.call) <= known
    assert set(asked) - {"gamma"} <= known
    return asked, ready


def test_where_keys_are_kept(monkeypatch):
    kept = {}
    for place in ("none", "device", "host"):
        kept[place] = prepared("FluxPipeline", monkeypatch, "--cache", place)[1].reference
    assert type(kept["none"]) is fr.Reference
    assert type(kept["device"]) is type(kept["host"]) is fr.ReferenceCache
    assert (kept["device"].device, kept["host"].device) == (None, torch.device("cpu"))


@pytest.mark.parametrize(("pipeline", "expected"), [
    ("FluxPipeline", {"num_inference_steps": 28, "guidance_scale": 3.5}),
    ("Flux2Pipeline", {"num_inference_steps": 28, "guidance_scale": 4.0}),
    ("Flux2KleinPipeline", {"num_inference_steps": 4, "guidance_scale": 1.0}),
    ("QwenImagePipeline", {"num_inference_steps": 28, "true_cfg_scale": 4.0, "negative_prompt": " "}),
    ("ZImagePipeline", {"num_inference_steps": 9, "guidance_scale": 0.0}),
    ("ChromaPipeline", {"num_inference_steps": 28}),
])  # fmt: skip
def test_settings_of_the_pipelines(pipeline, expected, monkeypatch):
    reference, ready = prepared(pipeline, monkeypatch, "--seed", "8")
    size = {"height": 800, "width": 1200}
    assert ready.call == expected | size | {"prompt": "p"}
    assert [g.initial_seed() for g in reference.pop("generator")] == [9]
    assert reference == size | {"num_inference_steps": expected["num_inference_steps"], "prompt": ""}
    assert ready.method().axis0 == ("match" if pipeline == "ZImagePipeline" else "low")


def test_the_reference_has_a_prompt_and_distilled_guidance_of_its_own(monkeypatch):
    words = "--guidance", "2.5", "--reference-prompt", "ink on paper"
    reference, ready = prepared("FluxPipeline", monkeypatch, *words, guidance_embeds=True)
    assert (reference["guidance_scale"], ready.call["guidance_scale"]) == (2.5, 2.5)
    assert (reference["prompt"], ready.call["prompt"]) == ("ink on paper", "p")


def test_axis0_can_be_told(monkeypatch):
    assert prepared("ZImagePipeline", monkeypatch, "--axis0", "low")[1].method().axis0 == "low"
    words = "--axis0", "low,match,0.5,match"
    assert prepared("Flux2Pipeline", monkeypatch, *words)[1].method().axis0 == ("low", "match", 0.5, "match")


@pytest.mark.parametrize(("words", "size"), [
    ([], (832, 1248)), (["--height", "512"], (512, 768)), (["--width", "600"], (400, 592)),
    (["--height", "640", "--width", "640"], (640, 640)),
])  # fmt: skip
def test_sizes(words, size, monkeypatch):
    """A megapixel at most, whole tokens."""
    reference, ready = prepared("FluxPipeline", monkeypatch, *words, size=(3000, 2000))
    assert (ready.call["height"], ready.call["width"]) == (reference["height"], reference["width"]) == size


def test_native_references_go_into_the_call(monkeypatch):
    _, ready = prepared("FluxKontextPipeline", monkeypatch, "--native")
    assert ready.call.pop("image").size == (1200, 800)
    call = {"prompt": "p", "num_inference_steps": 28, "guidance_scale": 2.5, "width": 1200, "height": 800}
    assert ready.call == call
    assert ready.method().reference == 0
    with pytest.raises(ValueError, match=r"^--native: expected a model that reads pictures .*, received FluxPipeline$"):
        prepared("FluxPipeline", monkeypatch, "--native")


def test_a_whole_pipeline_from_disk(tmp_path):
    """Prompts and pictures go through encoders and VAE; the reference is a row of the batch or kept."""
    folder = str(tmp_path / "flux")
    diffusers.FluxPipeline(**tiny_flux.parts()).save_pretrained(folder)
    words = ["style", "--model", folder, "--reference", photo("ref.png", (20, 12)), "--steps", "3", "--adain", "0.9",
             "--prompt", "make night", "--reference-prompt", "every"]  # fmt: skip
    assert main([*words, "--plain"]) == 0
    assert pixels("style.png").shape == (12, 20, 3)
    assert differ("style.png", "style-plain.png")
    assert main([*words, "--cache", "host", "--out", "kept.png"]) == 0
    assert np.abs(pixels("kept.png") - pixels("style.png")).max() <= 1
    for n, other in enumerate((["--reference-prompt", "night"], ["--trajectory", "rf_inversion"], ["--s-hf", "1"],
                               ["--guidance", "1"])):  # fmt: skip
        assert main([*words, *other, "--out", f"{n}.png"]) == 0
        assert differ(f"{n}.png", "style.png"), other


def test_pictures_of_the_pipeline_are_not_enlarged():
    assert pipelines.Model.finished(None, np.zeros((12, 20, 3))).size == (20, 12)
