"""What ``--tiny`` runs in the place of published models: small models trained on handwritten digits, no download.

They take words of their own in the place of a prompt: which digit, in which colours.
"""

import torch

from fastrope import lab
from fastrope.lab.codes import Codebook

STEPS = 8


def editor():
    """A FLUX Kontext pipeline, and what it is called with beside a generator: a picture, and words that ask for a 3."""
    pipe, picture = lab.pipeline(), lab.pictures(1)[0]
    return pipe, lab.CALL | {"num_inference_steps": STEPS, "image": picture, **lab.prompt("digit", digit=3)}


def pasted():
    """A FLUX Kontext pipeline, its call for a pasted digit, and the picture with and without that digit."""
    pipe, (composite, original) = lab.pipeline(), lab.pasted()
    call = lab.CALL | {"num_inference_steps": STEPS, "image": composite, **lab.prompt("blend")}
    return pipe, call, composite, original


def text_to_image():
    """A FLUX pipeline, its call, and a picture whose style is wanted with the call that goes with it."""
    pipe, size = lab.pipeline(edit=False), dict(height=16, width=16, num_inference_steps=STEPS)
    return pipe, size | lab.prompt(digit=3), lab.pictures(1)[0], size | lab.prompt()


def autoregressive():
    """A LlamaGen, its tokenizer, and features and mask of two prompts: a red 3 on white, and on yellow."""
    author = lab.load("author")
    features = [lab.prompt(digit=3, ink="red", ground=ground)["prompt_embeds"] for ground in ("white", "yellow")]
    return author.transformer, Codebook(author.codebook), torch.cat(features), torch.ones(2, features[0].shape[1])
