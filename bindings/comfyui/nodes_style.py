"""The node for drawing in the style of a reference picture: Untwisting RoPE."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

import fastrope as fr
from fastrope.methods.untwisting import PRESETS
from fastrope.sharing import SHARED

from .inputs import CATEGORY, layers_input, layers_of, model_input, reference_input, steps_of, window_inputs
from .patching import steer
from .references import LatentReference

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
                model_input(),
                io.Combo.Input(
                    "preset",
                    [*PRESETS, OWN],
                    default="paper",
                    tooltip=f'Whose numbers: the paper\'s, or those of a node and its date. "{OWN}": those below.',
                ),
                reference_input("Which reference latent of the conditioning holds the style, from 0.", 0, 0),
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
                *window_inputs(),
                layers_input(),
                io.Latent.Input(
                    "reference_latent",
                    optional=True,
                    tooltip="A style picture, encoded, for models without reference latents, or beside them: the model "
                    "runs it once per step by itself. Then the input reference does not count.",
                ),
                io.Conditioning.Input(
                    "reference_conditioning",
                    optional=True,
                    tooltip="A prompt for the style picture: what it shows, or an empty one. Needs reference_latent.",
                ),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=False,  # by its name, the editor would draw another number for every run
                    advanced=True,
                    tooltip="Of the noise on the style picture. Give the sampler's seed, and both start alike.",
                ),
                io.Boolean.Input(
                    "keep",
                    default=False,
                    advanced=True,
                    tooltip="Keep what the style picture shares in main memory, so that further seeds and prompts do "
                    "not run it again. Takes gigabytes: some 2.7 GB per step for Flux.1 at 1024 pixels.",
                ),
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
        reference_latent: dict | None = None,
        reference_conditioning: list | None = None,
        noise_seed: int = 0,
        keep: bool = False,
    ) -> io.NodeOutput:
        """A steered clone."""
        alone = None
        if reference_latent is not None or reference_conditioning is not None:
            latent = (reference_latent or {}).get("samples")
            alone = LatentReference(latent, reference_conditioning, noise_seed, keep)
        dials: dict[str, Any] = dict(
            reference=reference if alone is None else SHARED,
            layers=layers_of(layers),
            steps=steps_of(start_percent, end_percent),
        )
        if preset == OWN:
            kinds = None if blocks == "all" else blocks
            method = fr.UntwistingRoPE(
                (s_hf_start, s_hf_end), (s_lf_start, s_lf_end), beta, other_axes, kinds, adain=adain, **dials
            )
        else:
            method = fr.UntwistingRoPE.from_preset(preset, **dials)
        return io.NodeOutput(steer(model, method, alone is None, alone))
