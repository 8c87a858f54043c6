"""Nodes that show where attention goes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from fastrope.activity import Where

from ..image.inspection import Inspector, Record
from .charts import chart
from .inputs import CATEGORY, as_image, layers_of
from .patching import watch

RecordType = io.Custom("FASTROPE_RECORD")


class Inspect(io.ComfyNode):
    """Looks at attention while a sampler runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FastRoPE_Inspect",
            display_name="Inspect attention",
            category=CATEGORY,
            description="Measures how much attention of the new picture goes to the prompt, to itself and to each "
            "reference, and how far it looks. The picture does not change. Attention runs once more per layer.",
            search_aliases=["attention map", "attention mass", "debug", "analyse"],
            inputs=[
                io.Model.Input("model", tooltip="A model, steered or not."),
                io.String.Input(
                    "layers", default="", tooltip='Which attention layers, from 0: "0, 10, 20-22". Empty: all.'
                ),
                io.Int.Input(
                    "every", default=1, min=1, max=100, advanced=True, tooltip="Look at every n-th step only."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, for the sampler."),
                RecordType.Output("record", display_name="record", tooltip="For the node Attention chart."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, layers: str = "", every: int = 1) -> io.NodeOutput:
        """A clone that is looked at, and the record to be."""
        record = Record(lambda: None)
        where = Where(layers_of(layers), None if every == 1 else slice(0, None, every))
        return io.NodeOutput(watch(model, Inspector(record, where, None), record), record)


class AttentionChart(io.ComfyNode):
    """Draws what was seen."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="FastRoPE_AttentionChart",
            display_name="Attention chart",
            category=CATEGORY,
            description="Draws what Inspect attention saw, once the sampler is done.",
            search_aliases=["attention map", "plot"],
            inputs=[
                RecordType.Input("record", tooltip="Of the node Inspect attention."),
                io.Latent.Input("latent", tooltip="The sampler's result: it makes this node wait for the run."),
            ],
            outputs=[
                io.Image.Output("chart", display_name="chart"),
                io.Latent.Output("latent", display_name="latent", tooltip="The same latent."),
            ],
        )

    @classmethod
    def execute(cls, record: Record, latent: dict) -> io.NodeOutput:
        """The chart, and the latent as it came."""
        return io.NodeOutput(as_image(chart(record)), latent)
