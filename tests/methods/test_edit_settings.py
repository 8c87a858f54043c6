"""What ``fastrope edit`` calls real pipelines with."""

from __future__ import annotations

import inspect

import pytest
from PIL import Image

from fastrope.commands import editors

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


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

    import diffusers

    for name in ("FluxKontextPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"):
        known = set(inspect.signature(getattr(diffusers, name).__call__).parameters)
        assert set(arguments_for(name, "grag", (64, 64))) <= known
