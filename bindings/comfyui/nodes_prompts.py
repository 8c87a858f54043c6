"""Nodes for several prompts in one run of the model: Regions."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .inputs import CATEGORY, layers_input, layers_of, model_input, steps_of, window_inputs
from .models import family_of
from .patching import steer
from .texts import join_regions, new_number


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
