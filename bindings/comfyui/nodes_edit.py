"""Nodes for editing with a reference picture: GRAG, reference strength and LooseRoPE."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

import fastrope as fr
from fastrope.checks import require

from .inputs import (
    CATEGORY,
    as_image,
    layers_input,
    layers_of,
    model_input,
    one_mask,
    one_picture,
    reference_input,
    steps_of,
    window_inputs,
)
from .patching import steer

DIAL = dict(min=0.0, max=4.0, step=0.01)
WHICH = "Which reference picture, from 0, in the order of the ReferenceLatent nodes; -1: all."


class GRAG(io.ComfyNode):
    """How much an edit keeps of its reference pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FastRoPE_GRAG",
            display_name="GRAG (edit strength)",
            category=CATEGORY,
            description="A dial for how much an edit keeps of its reference pictures (GRAG, arXiv 2510.24657), on "
            "Qwen-Image-Edit, FLUX.1 Kontext, Flux.2, Krea 2 with reference latents.",
            search_aliases=[
                "group relative attention guidance",
                "edit strength",
                "reference strength",
                "preserve",
                "DCAG",
            ],
            inputs=[
                model_input(),
                io.Float.Input(
                    "delta",
                    default=1.1,
                    **DIAL,
                    tooltip="Above 1 keeps more of the reference, below 1 edits more, 1 is neutral. Try 0.8 to 1.7.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    **DIAL,
                    tooltip="How much the reference counts against the prompt and the new picture (lambda). 1 changes "
                    "nothing. delta alone is the smoother dial.",
                ),
                reference_input(WHICH, advanced=True),
                io.Float.Input(
                    "text_strength",
                    default=1.0,
                    **DIAL,
                    advanced=True,
                    tooltip="The same as strength, for the prompt. 1 changes nothing.",
                ),
                io.Float.Input(
                    "text_delta",
                    default=1.0,
                    **DIAL,
                    advanced=True,
                    tooltip="The same as delta, for the prompt. 1 changes nothing.",
                ),
                io.Float.Input(
                    "value_delta",
                    default=1.0,
                    **DIAL,
                    advanced=True,
                    tooltip="The same as delta, for the reference's values (DCAG: 1.15 beside delta 1.1). Neutral: 1.",
                ),
                *window_inputs(),
                layers_input(),
            ],
            outputs=[io.Model.Output(tooltip="The steered model, for a sampler or a further node.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        delta: float,
        strength: float,
        reference: int = -1,
        text_strength: float = 1.0,
        text_delta: float = 1.0,
        value_delta: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        layers: str = "",
    ) -> io.NodeOutput:
        """A steered clone."""
        method = fr.GRAG(
            bias=strength,
            delta=delta,
            text_bias=text_strength,
            text_delta=text_delta,
            value_delta=value_delta,
            references=None if reference < 0 else [reference],
            layers=layers_of(layers),
            steps=steps_of(start_percent, end_percent),
        )
        return io.NodeOutput(steer(model, method, refers={strength, delta, value_delta} != {1.0}))


class ReferenceStrength(io.ComfyNode):
    """How much attention references get."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FastRoPE_ReferenceStrength",
            display_name="Reference strength",
            category=CATEGORY,
            description="How much attention goes to a reference picture as a whole: with weight 2 every token of it "
            "counts as two. GRAG, in contrast, changes how attention is spread inside the picture.",
            search_aliases=["guide strength", "reference weight", "image weight", "attention bias", "conditioning"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "weight",
                    default=1.5,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="1 is neutral, 2 counts the picture twice, 0.5 half, 0 hides it.",
                ),
                reference_input(WHICH),
                *window_inputs(),
                layers_input(),
            ],
            outputs=[io.Model.Output(tooltip="The steered model, for a sampler or a further node.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        weight: float,
        reference: int = -1,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        layers: str = "",
    ) -> io.NodeOutput:
        """A steered clone."""
        chosen = None if reference < 0 else [reference]
        window = steps_of(start_percent, end_percent)
        method = fr.ReferenceStrength(weight, references=chosen, layers=layers_of(layers), steps=window)
        return io.NodeOutput(steer(model, method, refers=True))


class LooseRoPE(io.ComfyNode):
    """Blends a pasted object in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FastRoPE_LooseRoPE",
            display_name="LooseRoPE (blend a paste in)",
            category=CATEGORY,
            description="Blends an object that was pasted roughly into a picture (LooseRoPE, arXiv 2601.05127): where "
            "the paste is not salient, positions are loosened. Give the same composite to ReferenceLatent.",
            search_aliases=["harmonize", "composite", "paste", "blend", "crop", "collage", "relight"],
            inputs=[
                model_input("An editor, FLUX.1 Kontext say. The one you hand in stays as it is."),
                io.Image.Input(
                    "composite", tooltip="The picture with the object pasted in; also the reference latent."
                ),
                io.Mask.Input("mask", optional=True, tooltip="White where the paste is. Or give the original instead."),
                io.Image.Input(
                    "original",
                    optional=True,
                    tooltip="The picture without the paste, of the same size: the mask is where both differ.",
                ),
                io.Float.Input(
                    "boost",
                    default=0.83,
                    min=0.0,
                    max=2.0,
                    step=0.005,
                    tooltip="Lower loosens more: where the paste stays raw. Higher keeps more: where it vanishes. "
                    "Published: 0.83, moved by 0.045.",
                ),
                io.Int.Input(
                    "levels",
                    default=5,
                    min=0,
                    max=16,
                    advanced=True,
                    tooltip="Levels of loosening (published: 5). 0: without levels, the formula of the paper.",
                ),
                io.Int.Input(
                    "dilation",
                    default=2,
                    min=0,
                    max=16,
                    advanced=True,
                    tooltip="Tokens (16 pixels) by which the mask grows.",
                ),
                io.Combo.Input(
                    "timing",
                    ["scaled", "absolute"],
                    default="scaled",
                    advanced=True,
                    tooltip="scaled: phases are fractions of the run. absolute: they end after step 10, 18 and 22.",
                ),
                reference_input("Which reference latent holds the composite, from 0.", 0, 0, advanced=True),
                layers_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The steered model."),
                io.Image.Output(
                    "saliency",
                    display_name="saliency",
                    tooltip="The paste as the method sees it: bright is salient and stays in place.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        composite: Tensor,
        boost: float,
        mask: Tensor | None = None,
        original: Tensor | None = None,
        levels: int = 5,
        dilation: int = 2,
        timing: str = "scaled",
        reference: int = 0,
        layers: str = "",
    ) -> io.NodeOutput:
        """A steered clone, and the picture of the saliency."""
        require(
            (mask is None) != (original is None),
            "mask",
            "either a mask or an original",
            "neither" if mask is None else "both",
        )
        require(levels != 1, "levels", "0, or at least 2", levels)
        picture = one_picture("composite", composite)
        method = fr.LooseRoPE.from_images(
            picture,
            None if original is None else one_picture("original", original),
            None if mask is None else _as_large_as(one_mask("mask", mask), picture),
            boost=boost,
            levels=levels or None,
            dilation=dilation,
            timing=timing,
            reference=reference,
            layers=layers_of(layers),
        )
        return io.NodeOutput(steer(model, method, refers=True), as_image(_seen(picture, method)))


def _as_large_as(mask: Tensor, picture: Tensor) -> Tensor:
    """A mask in the proportions of the picture, at its size.

    Raises:
        ValueError: other proportions, which would put it somewhere else.
    """
    (height, width), (rows, columns) = picture.shape[1:], mask.shape
    alike = abs(rows * width - columns * height) <= 0.02 * rows * width
    require(alike, "mask", f"the proportions of the composite, {width} x {height}", f"{columns} x {rows}")
    return torch.nn.functional.interpolate(mask[None, None].float(), size=(height, width), mode="nearest")[0, 0] > 0.5


def _seen(picture: Tensor, method: fr.LooseRoPE) -> Tensor:
    """The picture, darkened, with the saliency of the masked tokens in its place."""
    height, width = picture.shape[1:]
    saliency, inside = method.on_grid((max(height // 16, 1), max(width // 16, 1)))

    def enlarged(x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(x[:1, None].float(), size=(height, width), mode="nearest")[0]

    return torch.where(enlarged(inside) > 0.5, enlarged(saliency).expand(3, -1, -1), 0.35 * picture)
