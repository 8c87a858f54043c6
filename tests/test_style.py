"""``fastrope style`` and ``fastrope sweep`` from end to end on the tiny pipeline, and what they call real ones with."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_flux
import torch
from PIL import Image

import fastrope as fr
from fastrope.cli import main
from fastrope.commands import style, styling, sweep
from fastrope.methods.untwisting import PRESETS

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def draw(*words: str, command: str = "style") -> int:
    return main([command, "--model", "tiny", "--steps", "3", *words])


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name)).astype(int)


def record(name: str = "style.json") -> dict:
    return json.loads(Path(name).read_text())


def photo(name: str, size: tuple[int, int] = (40, 40), seed: int = 0) -> str:
    noise = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(name)
    return name


# ---- style -----------------------------------------------------------------------------------------------------------


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
    assert record()["pipeline"] == "FluxKontextPipeline"
    assert record()["native"]
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
    assert record()["gamma"] == 0.5  # the default, written down where it was used


# ---- sweep -----------------------------------------------------------------------------------------------------------


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


# ---- what does not work, and says so ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["style", "sweep"])
@pytest.mark.parametrize(("words", "message"), [
    (["--reference", "none.png"], "--reference: no file none.png"),
    (["--reference", "text.png"], "--reference: text.png is no picture"),
    (["--beta", "0"], "UntwistingRoPE.beta: expected a number above 0, received 0.0"),
    (["--adain", "2"], "UntwistingRoPE.adain: expected a strength in 0..1, received 2.0"),
    (["--trajectory", "rf_inversion", "--gamma", "2"], "gamma: expected a number in 0..1, received 2.0"),
    (["--out", "picture.what"], "--out: unknown file extension"),
    (["--out", "text.png/picture.png"], "--out: "),
    (["--steps", "0"], "--steps: expected at least 1, received 0"),
    (["--width", "0"], "--width: expected at least 1, received 0"),
    (["--native", "--height", "-8"], "--height: expected at least 1, received -8"),
    (["--seed", str(-(2**64))], "--seed: expected a number of 64 bits"),
    (["--reference-seed", str(2**70)], "--reference-seed: expected a number of 64 bits"),
    (["--guidance", "inf"], "--guidance: expected a finite number, received inf"),
    (["--negative-prompt", "x"], "--negative-prompt: FluxPipeline takes none, its guidance is distilled"),
    (["--device", "nowhere"], "--device: "),
    (["--offload", "--device", "cpu"], "--offload: expected a GPU to keep parts on, received cpu"),
    (["--blocks", "joint"], "kinds: expected some of the model's kinds of block, ('double', 'single'), received"),
    (["--layers", "7-9"], "layers: expected some of the model's 3 layers"),
    (["--native", "--reference", "ref.png", "--reference", "ref.png"], "--image: expected one picture"),
])  # fmt: skip
def test_problems_are_named_in_one_line(words, message, command, capsys):
    photo("ref.png")
    Path("text.png").write_text("text")
    assert draw(*words, command=command) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"fastrope {command}: ")]
    assert len(said) == 1
    assert said[0].startswith(f"fastrope {command}: {message}")


def test_a_folder_in_the_way_is_named_before_anything_is_drawn(capsys):
    Path("taken").write_text("text")
    assert draw("--cells", "taken", command="sweep") == 2
    said = capsys.readouterr().err
    assert said.startswith("fastrope sweep: --cells: ")
    assert "sweep:   0%" not in said


def test_three_numbers_are_too_many(capsys):
    assert draw("--s-hf", "0", "1", "2") == 2
    assert "fastrope style: --s-hf: expected one number, or those of the first and the last step" in (
        capsys.readouterr().err
    )


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


@pytest.mark.parametrize("text", ["1:2:3", "", "1:", "x"])
def test_values_of_a_sweep(text):
    with pytest.raises(argparse.ArgumentTypeError, match="^expected a number or FIRST:LAST, received"):
        sweep._value(text)


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
def test_absent_packages(command, package, extra, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert draw(command=command) == 2
    said = capsys.readouterr().err
    assert f'fastrope {command}: {package} is not installed: pip install "fastrope[{extra}]"' in said


def test_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    assert "style" in listed
    assert "sweep" in listed


# ---- real pipelines --------------------------------------------------------------------------------------------------


def prepared(
    pipeline: str, monkeypatch, *words: str, size=(1200, 800), guidance_embeds=False
) -> tuple[dict, styling.Styling, argparse.Namespace]:
    """The arguments of the reference's call, what is ready, and the options, for a pipeline that is not loaded."""
    kind = getattr(diffusers, pipeline)
    transformer = torch.nn.Linear(1, 1)
    transformer.config = argparse.Namespace(guidance_embeds=guidance_embeds)
    known = {"set_progress_bar_config": lambda *a, **k: None, "vae_scale_factor": 8, "__call__": kind.__call__}
    pipe = object.__new__(type(pipeline, (), known))
    pipe.transformer = transformer
    asked = {}

    def prepare(pipe, pictures, trajectory, **call):
        asked.update(call)
        return fr.Reference(lambda step, sigma: None, {})

    monkeypatch.setattr(styling.editors, "load", lambda *given: pipe)
    monkeypatch.setattr(styling, "prepare_reference", prepare)
    Image.new("RGB", size).save("ref.png")
    options = style._parser().parse_args(["--model", "some/model", "--reference", "ref.png", "--prompt", "p", *words])
    ready = styling.prepare(options)
    known = set(inspect.signature(kind.__call__).parameters)
    assert set(ready.call) <= known
    assert set(asked) - {"gamma"} <= known
    return asked, ready, options


def calls_of(pipeline: str, monkeypatch, *words: str, **more) -> tuple[dict, dict, object]:
    """The arguments of the reference's call and of the target's, and the method."""
    asked, ready, options = prepared(pipeline, monkeypatch, *words, **more)
    return asked, ready.call, styling.method_of(options, ready.axis0)


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
    reference, target, method = calls_of(pipeline, monkeypatch, "--seed", "8")
    size = {"height": 800, "width": 1200}
    assert target == expected | size | {"prompt": "p"}
    assert [g.initial_seed() for g in reference.pop("generator")] == [9]
    assert reference == size | {"num_inference_steps": expected["num_inference_steps"], "prompt": ""}
    assert method.axis0 == ("match" if pipeline == "ZImagePipeline" else "low")


def test_distilled_guidance_is_the_references_too(monkeypatch):
    reference, _, _ = calls_of("FluxPipeline", monkeypatch, "--guidance", "2.5", guidance_embeds=True)
    assert reference["guidance_scale"] == 2.5


def test_the_references_own_prompt(monkeypatch):
    reference, target, _ = calls_of("FluxPipeline", monkeypatch, "--reference-prompt", "ink on paper")
    assert (reference["prompt"], target["prompt"]) == ("ink on paper", "p")


def test_axis0_can_be_told(monkeypatch):
    assert calls_of("ZImagePipeline", monkeypatch, "--axis0", "low")[2].axis0 == "low"
    words = "--axis0", "low,match,0.5,match"
    assert calls_of("Flux2Pipeline", monkeypatch, *words)[2].axis0 == ("low", "match", 0.5, "match")


def test_presets_and_the_old_name_of_one():
    for preset in ("bigstationw-2026-06", "xmarre-0.2"):
        assert draw("--preset", preset, "--s-lf", "1", "1.5", "--force") == 0
        assert record()["preset"] == preset
        assert record()["dials"]["axis0"] == {
            str(count): list(weights) for count, weights in PRESETS[preset]["axis0"].items()
        }
    with pytest.warns(DeprecationWarning, match="bigstationw-workflows-2026-06"):
        assert draw("--preset", "community", "--force") == 0
    assert draw("--preset", "xmarre-0.2", "--s-hf", "1", "--s-lf", "1", command="sweep") == 0


@pytest.mark.parametrize(("words", "size"), [
    ([], (832, 1248)), (["--height", "512"], (512, 768)), (["--width", "600"], (400, 592)),
    (["--height", "640", "--width", "640"], (640, 640)),
])  # fmt: skip
def test_sizes(words, size, monkeypatch):
    """A megapixel at most, whole tokens."""
    reference, target, _ = calls_of("FluxPipeline", monkeypatch, *words, size=(3000, 2000))
    assert (target["height"], target["width"]) == (reference["height"], reference["width"]) == size


def test_native_references_go_into_the_call(monkeypatch):
    _, call, method = calls_of("FluxKontextPipeline", monkeypatch, "--native")
    picture = call.pop("image")
    assert picture.size == (1200, 800)
    assert call == {"prompt": "p", "num_inference_steps": 28, "guidance_scale": 2.5, "width": 1200, "height": 800}
    assert method.reference == 0


def test_models_that_do_not_fit(monkeypatch):
    """A text-to-image model has no reference of its own."""
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
    assert (pixels("style.png") != pixels("style-plain.png")).any()
    assert main([*words, "--cache", "host", "--out", "kept.png"]) == 0
    assert np.abs(pixels("kept.png") - pixels("style.png")).max() <= 1
    for n, other in enumerate((["--reference-prompt", "night"], ["--trajectory", "rf_inversion"], ["--s-hf", "1"],
                               ["--guidance", "1"])):  # fmt: skip
        assert main([*words, *other, "--out", f"{n}.png"]) == 0
        assert (pixels(f"{n}.png") != pixels("style.png")).any(), other
