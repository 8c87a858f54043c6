"""The node for pictures larger than a model's training: High resolution."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

import fastrope as fr
from fastrope.methods.positions import KINDS

from .inputs import CATEGORY, model_input, steps_of, window_inputs
from .patching import steer

TOKEN = 16  # pixels


class HighResolution(io.ComfyNode):
    """Positions for pictures beyond training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        size = dict(min=256, max=8192, step=TOKEN)
        return io.Schema(
            node_id="FastRoPE_HighResolution",
            display_name="High resolution (positions)",
            category=CATEGORY,
            description="Other RoPE frequencies for pictures larger than the model was trained on: NTK, YaRN, DyPE "
            "(arXiv 2510.20766). A picture within the trained size stays as it is.",
            search_aliases=["NTK", "YaRN", "DyPE", "RoPE scaling", "4k", "large", "extrapolation"],
            inputs=[
                model_input(),
                io.Combo.Input(
                    "kind",
                    list(KINDS),
                    default="dype",
                    tooltip="dype and dype-ntk rescale less towards the end of the run; yarn and ntk do not fade.",
                ),
                io.Int.Input(
                    "trained_width", default=1024, **size, tooltip="Pixels. Most models were trained at 1024 x 1024."
                ),
                io.Int.Input("trained_height", default=1024, **size, tooltip="Pixels."),
                io.Float.Input(
                    "exponent",
                    default=2.0,
                    min=0.0,
                    max=8.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Of DyPE: how fast rescaling fades as the noise goes.",
                ),
                *window_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The steered model.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        kind: str,
        trained_width: int,
        trained_height: int,
        exponent: float = 2.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> io.NodeOutput:
        """A steered clone."""
        trained = trained_height // TOKEN, trained_width // TOKEN
        window = steps_of(start_percent, end_percent)
        return io.NodeOutput(steer(model, fr.HighResolution(kind, trained, exponent=exponent, steps=window)))
