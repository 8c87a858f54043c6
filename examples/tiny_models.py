"""Models for ``--tiny`` in place of published ones: random weights, no download, seconds on a CPU.

The pictures show that everything is connected; they say nothing about quality.
"""

import torch
from PIL.Image import Image

from fastrope.commands import ar_tiny
from fastrope.commands.editors import Settings, arguments, tiny_words
from fastrope.demo import tiny
from fastrope.demo.scene import draw_scene
from fastrope.pictures import to_picture

CPU, STEPS = torch.device("cpu"), 4


def editor(prompt: str):
    """A FLUX Kontext pipeline, and the arguments of its call except the generator: a picture and a prompt."""
    pipe = tiny.pipeline(0, CPU, torch.float32)
    call = arguments(pipe, "tiny", Settings(STEPS), [composite()[0]], prompt, seed=0)
    return pipe, {name: value for name, value in call.items() if name != "generator"}


def text_to_image(prompt: str):
    """A FLUX pipeline, and the arguments of its call except the generator."""
    pipe = tiny.text_to_image(0, CPU, torch.float32)
    return pipe, dict(height=32, width=32, num_inference_steps=STEPS, guidance_scale=3.5, **tiny_words(pipe, prompt))


def composite() -> tuple[Image, Image]:
    """A landscape with a balloon pasted in, and the landscape."""
    scene = draw_scene()
    return to_picture("composite", scene.composite), to_picture("background", scene.background)


def autoregressive(prompts: list[str], size: int = 8):
    """A LlamaGen, its tokenizer, and the features and mask of prompts."""
    return ar_tiny.tiny_model(size, CPU, torch.float32), ar_tiny.Mosaic(size, CPU), *ar_tiny.describe(prompts)
