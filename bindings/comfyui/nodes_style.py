"""The node for drawing in the style of a reference picture: Untwisting RoPE."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

import fastrope as fr
from fastrope.methods.untwisting import PRESETS

from .inputs import CATEGORY, layers_of, place_inputs, steps_of
from .steering import steer

OWN = "own numbers"
WEIGHT = dict(min=0.0, max=4.0, step=0.01, advanced=True)


class UntwistingRoPE(io.ComfyNode):
    """Takes the style of a reference, not its layout."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FastRoPE_UntwistingRoPE",
            display_name="Untwisting RoPE (style reference)",
            category=CATEGORY,
            description="Takes the style of a reference picture without copying where things are in it (Untwisting "
            "RoPE, arXiv 2602.05013), by weights on the frequency bands of the reference's keys.",
            search_aliases=[
                "style transfer",
                "style reference",
                "style aligned",
                "frequency bands",
                "AdaIN",
                "IPAdapter style",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to steer. The one you hand in stays as it is."),
                io.Combo.Input(
                    "preset",
                    [*PRESETS, OWN],
                    default="paper",
                    tooltip=f'Whose numbers: the paper\'s, or those of a node and its date. "{OWN}": those below.',
                ),
                io.Int.Input(
                    "reference",
                    default=0,
                    min=0,
                    max=63,
                    tooltip="Which reference latent of the conditioning holds the style, from 0.",
                ),
                io.Float.Input(
                    "s_hf_start",
                    default=0.25,
                    **WEIGHT,
                    tooltip="Weight of the highest frequencies at the first step. Lower copies less.",
                ),
                io.Float.Input("s_hf_end", default=0.75, **WEIGHT, tooltip="The same at the last step."),
                io.Float.Input(
                    "s_lf_start",
                    default=1.0,
                    **WEIGHT,
                    tooltip="Weight of the lowest frequencies at the first step. Higher takes more style.",
                ),
                io.Float.Input("s_lf_end", default=1.4, **WEIGHT, tooltip="The same at the last step."),
                io.Float.Input(
                    "beta",
                    default=2.0,
                    min=0.05,
                    max=100.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Curve from high to low frequencies: higher leaves only the lowest ones lifted.",
                ),
                io.Float.Input(
                    "adain",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="How far the picture takes on mean and contrast of the reference's features.",
                ),
                io.Combo.Input(
                    "other_axes",
                    ["low", "match"],
                    default="low",
                    advanced=True,
                    tooltip="Weights on axes that hold no place: flat as the lowest, or the curve (Z-Image).",
                ),
                io.Combo.Input(
                    "blocks",
                    ["all", "double", "single", "joint"],
                    default="all",
                    advanced=True,
                    tooltip="Kinds of blocks: double and single are Flux's two; Z-Image and Krea 2 have joint.",
                ),
                *place_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The steered model.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: str,
        reference: int = 0,
        s_hf_start: float = 0.25,
        s_hf_end: float = 0.75,
        s_lf_start: float = 1.0,
        s_lf_end: float = 1.4,
        beta: float = 2.0,
        adain: float = 0.5,
        other_axes: str = "low",
        blocks: str = "all",
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        layers: str = "",
    ) -> io.NodeOutput:
        """A steered clone."""
        dials: dict[str, Any] = dict(
            reference=reference, layers=layers_of(layers), steps=steps_of(start_percent, end_percent)
        )
        if preset == OWN:
            kinds = None if blocks == "all" else blocks
            method = fr.UntwistingRoPE(
                (s_hf_start, s_hf_end), (s_lf_start, s_lf_end), beta, other_axes, kinds, adain=adain, **dials
            )
        else:
            method = fr.UntwistingRoPE.from_preset(preset, **dials)
        return io.NodeOutput(steer(model, method, refers=True))
