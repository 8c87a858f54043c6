"""What ``fastrope style`` calls real pipelines with."""

from __future__ import annotations

import argparse
import inspect

import pytest
import torch
from PIL import Image

import fastrope as fr
from fastrope.commands import style, styling

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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
