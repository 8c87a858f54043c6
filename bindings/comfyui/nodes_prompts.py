"""Nodes for several prompts in one run of the model: Regions and NAG."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

import fastrope as fr

from .inputs import CATEGORY, layers_input, layers_of, model_input, steps_of, window_inputs
from .marks import new_number
from .models import family_of
from .patching import steer
from .texts import join_negative, join_regions


class Regions(io.ComfyNode):
    """Prompts and reference pictures for parts of the picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FastRoPE_Regions",
            display_name="Regions (prompts by mask)",
            category=CATEGORY,
            description="Prompts, with their reference latents, for parts of the picture, in one run of the model. "
            "Give each prompt its mask with Conditioning (Set Mask), and combine all with Conditioning (Combine).",
            search_aliases=[
                "regional prompt",
                "regional prompting",
                "attention couple",
                "mask conditioning",
                "area",
                "latent couple",
            ],
            inputs=[
                model_input(),
                io.Conditioning.Input(
                    "regions",
                    tooltip="All prompts, combined: those with a mask draw their region, those without the whole "
                    "picture. A reference latent belongs to its prompt.",
                ),
                io.Boolean.Input(
                    "local",
                    default=False,
                    tooltip="Regions do not look at each other. Keeps things apart, but edges may show.",
                ),
                *window_inputs(),
                layers_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The steered model. Connect both outputs."),
                io.Conditioning.Output(tooltip="All prompts in one, for the sampler's positive input."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        regions: list,
        local: bool = False,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        layers: str = "",
    ) -> io.NodeOutput:
        """A steered clone, and the conditioning of all prompts."""
        family_of(model.model)
        number, window = new_number(), steps_of(start_percent, end_percent)
        method, joined = join_regions(model.model, regions, number, local=local, layers=layers_of(layers), steps=window)
        return io.NodeOutput(steer(model, method, number=number), joined)


class NAG(io.ComfyNode):
    """A negative prompt without guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FastRoPE_NAG",
            display_name="NAG (negative prompt)",
            category=CATEGORY,
            description="A negative prompt for models that run at CFG 1, FLUX.1, Klein and Qwen-Image-Lightning (NAG, "
            "arXiv 2505.21179). It adds the tokens of the negative prompt, and no second run of the model.",
            search_aliases=["normalized attention guidance", "negative prompt", "distilled", "schnell", "CFG"],
            inputs=[
                model_input("Flux.1, Flux.2, Klein or Qwen-Image. The one you hand in stays as it is."),
                io.Conditioning.Input("positive", tooltip="The prompt, with references and guidance if any."),
                io.Conditioning.Input("negative", tooltip="What the picture should not show. Its text alone counts."),
                io.Float.Input(
                    "scale",
                    default=5.0,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How far to move away from the negative prompt. 1: it does not count. NAG's own: 5.",
                ),
                io.Float.Input(
                    "tau",
                    default=2.5,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Limit of the change: attention grows to this many times its size at most.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.25,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="How much of the moved attention is mixed in. Lower is gentler.",
                ),
                *window_inputs(),
                layers_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The steered model. Connect both outputs."),
                io.Conditioning.Output(tooltip="Both prompts in one, for the sampler's positive input."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        negative: list,
        scale: float,
        tau: float = 2.5,
        alpha: float = 0.25,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        layers: str = "",
    ) -> io.NodeOutput:
        """A steered clone, and the conditioning of both prompts."""
        family, _ = family_of(model.model)
        name = ", ".join(family.models.values())
        if family.mixes_text:
            raise NotImplementedError(
                f"model: expected Flux.1, Flux.2 or Qwen-Image, received {name}, which mixes the "
                "words of both prompts before its attention begins"
            )
        number, window = new_number(), steps_of(start_percent, end_percent)
        count, joined = join_negative(model.model, positive, negative, number)
        method = fr.NAG(scale, tau, alpha, count, layers_of(layers), window)
        return io.NodeOutput(steer(model, method, number=number), joined)
