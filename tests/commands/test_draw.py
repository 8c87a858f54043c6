"""``fastrope draw`` from end to end on the trained tiny model, the methods of words in ``edit``, and how published
pipelines encode them."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
import tiny_flux
import torch
from PIL import Image
from shots import differ, pixels, record

import fastrope as fr
from fastrope import lab
from fastrope.cli import main
from fastrope.commands import pipelines
from fastrope.commands.draw import DRAWING
from fastrope.commands.edit import EDITING
from fastrope.commands.methods import METHODS

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
RED, GREEN = lab.prompt(digit=3, ink="red"), lab.prompt(digit=3, ink="green")
LEFT = np.array([[1, 0], [1, 0]], dtype=bool)


def draw(*words: str, command: str = "draw") -> int:
    return main([command, "--model", "tiny", "--steps", "3", *words])


def joined(first: dict, *others: dict) -> dict:
    return first | {"prompt_embeds": torch.cat([text["prompt_embeds"] for text in (first, *others)], dim=1)}


LARGE = "--height", "20", "--width", "24"
CASES = {
    ("draw", "prompt-weights"): (
        ["--prompt", "a red 3", "--word", "red=2", "3=0.5"], fr.PromptWeights({2: 2.0, 1: 0.5}), RED),
    ("edit", "prompt-weights"): (
        ["--prompt", "make it a red 3", "--word", "red=-1", "--on", "values", "--layers", "1-4"],
        fr.PromptWeights({2: -1.0}, "values", layers=range(1, 5)), lab.prompt("digit", digit=3, ink="red")),
    ("edit", "reference-strength"): (
        ["--prompt", "make it a 3", "--weight", "4"], fr.ReferenceStrength(4.0), lab.prompt("digit", digit=3)),
    ("draw", "regions"): (
        ["--region", "left", "a red 3", "--region", "mask.png", "a green 3"],
        fr.Regions([fr.Region(LEFT, slice(5, 10)), fr.Region(np.ones((2, 2)), slice(10, 15))]),
        joined(lab.prompt(digit=3), RED, GREEN)),
    ("edit", "regions"): (
        ["--region", "top", "make it red", "--local"],
        fr.Regions([fr.Region(LEFT.T, slice(5, 10))], local=True),
        joined(lab.prompt("digit", digit=3), lab.prompt("recolour", ink="red"))),
    ("draw", "nag"): (
        ["--negative-prompt", "a red 3", "--scale", "4", "--tau", "3", "--alpha", "0.5"],
        fr.NAG(4.0, 3.0, 0.5), joined(lab.prompt(digit=3), RED)),
    ("edit", "nag"): (
        ["--negative-prompt", "keep"], fr.NAG(), joined(lab.prompt("digit", digit=3), lab.prompt("keep"))),
    ("draw", "temperature"): ([*LARGE], fr.Temperature((8, 8)), lab.prompt(digit=3)),
    ("draw", "high-resolution"): (
        ["--kind", "yarn", "--trained", "8", "10", *LARGE], fr.HighResolution("yarn", (8, 10)), lab.prompt(digit=3)),
}  # fmt: skip


@pytest.mark.parametrize(("command", "method"), CASES)
def test_each_method_is_that_of_the_library(command, method):
    words, expected, text = CASES[command, method]
    Image.new("L", (4, 4), "white").save("mask.png")
    assert draw("--method", method, *words, "--seed", "5", "--plain", "--out", "a.png", command=command) == 0
    pipe = lab.pipeline(edit=command == "edit")
    call = lab.CALL | {"image": lab.pictures(1)[0]} if command == "edit" else {"height": 16, "width": 16}
    call |= {"num_inference_steps": 3, **(dict(height=20, width=24) if LARGE[0] in words else {}), **text}
    with fr.apply(pipe, expected):
        made = pipe(**call, generator=torch.Generator().manual_seed(5)).images[0]
    shown = made.resize((16 * made.width, 16 * made.height), Image.Resampling.NEAREST)
    assert np.abs(pixels("a.png") - np.asarray(shown).astype(int)).max() <= 1
    assert differ("a.png", "a-plain.png")
    kept = record("a.json")
    assert (kept["method"], kept["pipeline"]) == (method, type(pipe).__name__)
    assert set(kept["dials"]) >= set(METHODS[method].options)


def test_every_method_of_a_command_is_run():
    looserope_and_grag = {("edit", "looserope"), ("edit", "grag")}  # test_edit.py
    assert {("draw", name) for name in DRAWING} | {("edit", name) for name in EDITING} == looserope_and_grag | set(
        CASES
    )
    assert set(METHODS) == {*DRAWING, *EDITING}


def share(name: str, colour: int, columns: slice = slice(None)) -> float:
    """Of the pixels whose ``colour`` (0 red, 1 green, 2 blue) is far above both others."""
    found = pixels(name)[:, columns]
    others = np.delete(found, colour, axis=2).max(axis=2)
    return float((found[..., colour] > others + 60).mean())


def test_the_pictures_show_what_was_asked_for():
    """On the trained model: each half its colour; less of what is not wanted."""
    words = "--steps", "16", "--plain"
    regions = "--region", "left", "a red 3 on white", "--region", "right", "a green 3 on white"
    assert draw("--method", "regions", "--prompt", "a 3 on white", *regions, *words, "--out", "regions.png") == 0
    left, right = slice(128), slice(128, None)
    assert share("regions.png", 0, left) > 0.1 > 0.02 > share("regions.png", 0, right)
    assert share("regions.png", 1, right) > 0.1 > 0.02 > share("regions.png", 1, left)
    negative = "--negative-prompt", "blue", "--prompt", "a 3"
    assert draw("--method", "nag", *negative, *words, "--seed", "3", "--out", "nag.png") == 0
    assert share("nag-plain.png", 2) > 0.1 > 0.02 > share("nag.png", 2)
    weights = "--word", "red=0", "--prompt", "a red 3"
    assert draw("--method", "prompt-weights", *weights, *words, "--seed", "1", "--out", "word.png") == 0
    assert share("word-plain.png", 0) > 0.1 > 0.02 > share("word.png", 0)


# ---- what does not work, and says so --------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "message"), [
    (["prompt-weights", "--word", "red=2"], "words: expected words of the prompt 'a 3', received 'red'"),
    (["prompt-weights", "--word", "3=2", "3=1"], "--word: expected each word once, received 3 3"),
    (["prompt-weights", "--word", "3=-1"], "PromptWeights.weights[0]: expected a weight of at least 0 on logits"),
    (["prompt-weights", "--prompt", "draw a 3", "--word", "draw=2"], "words: expected words that the tokenizer keeps"),
    (["prompt-weights", "--prompt", "red 3", "--word", "red 3=2", "3=2"], "--word: expected words that share no token"),
    (["regions", "--region", "lefty", "red"], "--region: no file lefty"),
    (["regions", "--region", "left", "winter"], "--region: expected words that the tiny model knows"),
    (["nag", "--negative-prompt", "winter"], "--negative-prompt: expected words that the tiny model knows"),
    (["nag", "--negative-prompt", "red", "--alpha", "2"], "NAG.alpha: expected a number in 0..1, received 2.0"),
    (["nag", "--negative-prompt", "red", "--layers", "7-9"], "layers: expected some of the model's 6 layers"),
    (["temperature", "--height", "17"], "--height: expected an even number with --model tiny, received 17"),
    (["temperature", "--trained", "1", "1"], "Temperature.trained: expected (rows, columns)"),
    (["high-resolution", "--trained", "0", "3"], "HighResolution.trained: expected (rows, columns) in tokens"),
])  # fmt: skip
def test_problems_are_named_in_one_line(words, message, only_line):
    assert draw("--method", *words) == 2
    only_line("draw", message)


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "nag", "--scale", "2"], "nag wants --negative-prompt"),
    (["--method", "regions"], "regions wants --region"),
    (["--method", "prompt-weights"], "prompt-weights wants --word"),
    (["--method", "prompt-weights", "--word", "red"], "expected WORD=WEIGHT, received 'red'"),
    (["--method", "nag", "--negative-prompt", "x", "--kind", "ntk"], "--kind belongs to --method high-resolution"),
    (["--method", "nag", "--negative-prompt", "x", "--trained", "8", "8"],
     "--trained belongs to --method temperature or high-resolution"),
    (["--method", "high-resolution", "--layers", "1-2"], "--layers is for attention; high-resolution"),
    (["--method", "temperature", "--model", "x/y"], "--prompt is needed, for every model but tiny"),
])  # fmt: skip
def test_usage(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        draw(*words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ---- published pipelines --------------------------------------------------------------------------------------------


def test_prompts_of_a_whole_pipeline():
    """FLUX.1 with text encoders and tokenizers: a text of two prompts, and the tokens of a word."""
    pipe = diffusers.FluxPipeline(**tiny_flux.parts())
    pipe.text_encoder_2.eval()
    model = pipelines.Model(pipe, {})
    call, spans = model.joined(("--prompt", "make every night"), ("--region", "night"))
    assert spans == [slice(0, 512), slice(512, 1024)]
    for text, span in zip(("make every night", "night"), spans, strict=True):
        alone, pooled, _ = pipe.encode_prompt(text)
        torch.testing.assert_close(call["prompt_embeds"][:, span], alone)
        assert torch.allclose(call["pooled_prompt_embeds"], pooled) == (text == "make every night")
    assert not call["prompt_embeds"].requires_grad
    assert model.places("make every night", "night") == [2]
    assert pipe(**call, height=16, width=16, num_inference_steps=1).images[0].size == (16, 16)


@pytest.mark.parametrize(("name", "carried"), [
    ("Flux2Pipeline", {"prompt_embeds"}), ("QwenImagePipeline", {"prompt_embeds", "prompt_embeds_mask"}),
])  # fmt: skip
def test_what_other_pipelines_encode(name, carried):
    kind = getattr(diffusers, name)
    parameters = inspect.signature(kind.encode_prompt)

    def encode_prompt(self, **arguments):
        parameters.bind(self, **arguments)
        n = len(arguments["prompt"])
        return torch.full((1, n, 4), float(n)), torch.ones(1, n)

    pipe = object.__new__(type(name, (), {"__call__": kind.__call__, "encode_prompt": encode_prompt}))
    call, spans = pipelines.Model(pipe, {}).joined(("--prompt", "abc"), ("--region", "ab"))
    assert spans == [slice(0, 3), slice(3, 5)]
    assert call.pop("prompt") is None
    assert {len(x[0]) for x in call.values()} == {5}
    assert set(call) == carried <= set(inspect.signature(kind.__call__).parameters)


def test_what_pipelines_cannot_do_is_named():
    cases = {
        "ZImagePipeline": "--model: prompts of ZImagePipeline cannot be encoded apart here",
        "Flux2Pipeline": "--word: the text of Flux2Pipeline does not begin with the prompt",
    }
    for name, message in cases.items():
        pipe = object.__new__(type(name, (), {"__call__": getattr(diffusers, name).__call__}))
        with pytest.raises(NotImplementedError, match=message):
            pipelines.Model(pipe, {}).places("a boat", "boat")


def test_nag_is_the_guidance_of_the_run(only_line, monkeypatch):
    """A model with true guidance would run its negative prompt in a pass of its own."""
    loading = pipelines.load

    def load(options, **more):
        model = loading(options, **more)
        model.settings = replace(model.settings, guidance=4.0, guidance_name="true_cfg_scale")
        return model

    monkeypatch.setattr("fastrope.commands.draw.load", load)
    assert draw("--method", "nag", "--negative-prompt", "red") == 2
    only_line("draw", "--guidance: expected 1 with nag, which is guidance in one pass, received 4.0")
