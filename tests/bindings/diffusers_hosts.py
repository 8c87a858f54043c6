"""The table of tiny hosts: the model, a call, a real pipeline around it, what the formulas say comes out.

Everything differs between the rows of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import diffusers_formulas as formulas
import torch
from tiny_pipelines import (
    chroma_generate,
    chroma_pipeline,
    flux2_generate,
    flux2_pipeline,
    flux_generate,
    flux_pipeline,
    kontext_generate,
    kontext_pipeline,
    ovis_generate,
    ovis_pipeline,
    qwen_generate,
    qwen_pipeline,
    z_image_generate,
    z_image_pipeline,
)
from tiny_transformers import (
    DIM,
    REFERENCES,
    TARGET,
    TEXT,
    build_chroma,
    build_flux,
    build_flux2,
    build_longcat,
    build_ovis,
    build_qwen,
    build_z_image,
    ids_call,
    positions_of,
    qwen_call,
    run,
    z_image_call,
)

import fastrope as fr


@dataclass(frozen=True)
class TinyHost:
    """A host: how to build it, call it, and say by the formulas what comes out.

    ``processors`` maps lists of blocks to the reference's class; ``call(layout, batch, dtype)`` gives the transformer's
    arguments; ``pipeline()`` a real pipeline and ``generate(pipe, ...)`` an image of it. ``lengths`` are those of its
    prompt and negative prompt; FLUX.1's pipelines want them equal, FLUX.2 has no negative one.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    call: Callable[..., dict]
    convention: str
    layout: fr.TokenLayout
    processors: dict[str, type]
    axes: tuple[int, ...] = (4, 4, 8)
    theta: float = 10_000.0
    pipeline: Callable | None = None
    generate: Callable | None = None
    lengths: tuple[int, int | None] = (TEXT, TEXT + 3)

    def attentions(self, model) -> list[tuple[str, torch.nn.Module]]:
        """Block list and attention module of every joint layer, in order."""
        return [
            (blocks, getattr(block, "attn", None) or block.attention)
            for blocks in self.processors
            for block in getattr(model, blocks)
        ]

    def attend(self, mods: list, layout: fr.TokenLayout | None = None, **arguments) -> formulas.Attention:
        """The reference's attention over a layout."""
        positions = positions_of(layout or self.layout, self.convention)
        return formulas.Attention(**{"positions": positions, "axes": self.axes, "theta": self.theta, "mods": mods}
                                  | arguments)  # fmt: skip

    @contextlib.contextmanager
    def by_formulas(self, model, attend: Callable, layers=None):
        """The model with the reference in some layers (all by default) and the stock processor in the others."""
        found = self.attentions(model)
        before = [attn.processor for _, attn in found]
        for n, (blocks, attn) in enumerate(found):
            if layers is None or n in layers:
                attn.set_processor(self.processors[blocks](attend))
        try:
            yield
        finally:
            for (_, attn), processor in zip(found, before, strict=True):
                attn.set_processor(processor)


# ---- the table -------------------------------------------------------------------------------------------------------

TWO_STREAMS = {"transformer_blocks": formulas.Flux, "single_transformer_blocks": formulas.Flux}
ONE_STREAM = {"transformer_blocks": formulas.Qwen}
WITH_TWO = fr.TokenLayout(TEXT, TARGET, REFERENCES)
WITH_ONE = fr.TokenLayout(TEXT, TARGET, REFERENCES[:1])
WITHOUT = fr.TokenLayout(TEXT, TARGET)
Z_IMAGE = fr.TokenLayout(32, TARGET, order="text-last", padding=17)

TINY_HOSTS = {
    host.name: host
    for host in (
        TinyHost("flux", build_flux, ids_call("flux", pooled=True), "flux", WITHOUT, TWO_STREAMS,
                 pipeline=flux_pipeline, generate=flux_generate, lengths=(TEXT, TEXT)),
        TinyHost("kontext", build_flux, ids_call("flux", pooled=True), "flux", WITH_ONE, TWO_STREAMS,
                 pipeline=kontext_pipeline, generate=kontext_generate, lengths=(TEXT, TEXT)),
        TinyHost("chroma", build_chroma, ids_call("flux"), "flux", WITHOUT, TWO_STREAMS,
                 pipeline=chroma_pipeline, generate=chroma_generate),
        TinyHost("longcat", build_longcat, ids_call("longcat"), "longcat", WITH_ONE, TWO_STREAMS),
        TinyHost("ovis", build_ovis, ids_call("ovis"), "ovis", WITHOUT, TWO_STREAMS,
                 pipeline=ovis_pipeline, generate=ovis_generate),
        TinyHost("flux2", build_flux2, ids_call("flux2", guidance=True), "flux2", WITH_TWO,
                 {"transformer_blocks": formulas.Flux, "single_transformer_blocks": formulas.Flux2Single},
                 axes=(4, 4, 4, 4), theta=2000.0, lengths=(TEXT, None),
                 pipeline=flux2_pipeline, generate=flux2_generate),
        TinyHost("qwen", build_qwen, qwen_call, "qwen", WITHOUT, ONE_STREAM,
                 pipeline=lambda: qwen_pipeline(diffusers.QwenImagePipeline), generate=qwen_generate),
        TinyHost("qwen-edit", build_qwen, qwen_call, "qwen", WITH_ONE, ONE_STREAM,
                 pipeline=lambda: qwen_pipeline(diffusers.QwenImageEditPipeline), generate=qwen_generate),
        TinyHost("qwen-edit-plus", build_qwen, qwen_call, "qwen", WITH_TWO, ONE_STREAM,
                 pipeline=qwen_pipeline, generate=qwen_generate),
        TinyHost("z-image", build_z_image, z_image_call, "z-image", Z_IMAGE, {"layers": formulas.ZImage},
                 theta=256.0, pipeline=z_image_pipeline, generate=z_image_generate),
    )
}  # fmt: skip


def some_keys(layout: fr.TokenLayout) -> slice:
    """The references; without any, the second row of the target on."""
    if layout.reference_grids:
        return layout.references
    return slice(layout.target.start + layout.target_grid[1], layout.target.stop)


def grag_like(layout: fr.TokenLayout, bias: float = 1.2, delta: float = 0.6) -> list:
    """Every reference its own group; without any, the text."""
    count = len(layout.reference_grids)
    groups = [layout.reference(n) for n in range(count)] or [layout.text]
    return [fr.BiasDelta(bias, delta + 0.3 * n, keys=keys) for n, keys in enumerate(groups)]


def loose_like(layout: fr.TokenLayout, batch: int | None = None) -> list:
    """Queries of the target loosened and turned up; with ``batch``, differently in every row."""
    scale = torch.ones(batch or 1, len(layout), dtype=torch.float64)
    gain = scale.clone()
    tokens = layout.target.stop - layout.target.start
    for row in range(len(scale)):
        scale[row, layout.target] = torch.linspace(0.2, 1, tokens).double() / (row + 1)
        gain[row, layout.target] = 1.4 + row
    if batch is None:
        scale, gain = scale[0], gain[0]
    keys = some_keys(layout)
    return [fr.QueryScale(scale, keys=keys, axes=(1, 2)), fr.LogitGain(gain, keys=slice(keys.start, keys.start + 4))]


def assert_same(out: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to a fraction of the largest value. Stock layers rotate in float32 even in a float64 model."""
    gap = float((out - expected).abs().max() / expected.abs().max())
    assert gap < tolerance, gap


def assert_differ(out: torch.Tensor, other: torch.Tensor) -> None:
    gap = float((out - other).abs().max() / other.abs().max())
    assert gap > 1e-3, gap


# ---- FLUX.1 Kontext, where one host is enough ------------------------------------------------------------------------

KONTEXT = TINY_HOSTS["kontext"]
LAYOUT, LAYERS = KONTEXT.layout, 4


def kontext_call(layout: fr.TokenLayout = LAYOUT, batch: int = 2, dtype=torch.float64) -> dict:
    return KONTEXT.call(layout, batch, dtype)


def kontext_by_formulas(model, call: dict, mods: list, layers=None) -> torch.Tensor:
    """The model's output with the formulas in some layers and the stock processor in the others."""
    ids = torch.cat([call["txt_ids"], call["img_ids"]])
    with KONTEXT.by_formulas(model, KONTEXT.attend(mods, positions=ids), layers):
        return run(model, call)


def all_four(layout: fr.TokenLayout = LAYOUT, batch: int | None = None) -> list:
    """All four kinds of modulation; the reference's keys and the target's queries, as the methods use them."""
    scale = torch.ones(batch or 1, len(layout), dtype=torch.float64)
    gain = scale.clone()
    tokens = layout.target.stop - layout.target.start
    for row in range(len(scale)):
        scale[row, layout.target] = torch.linspace(0.5, 1, tokens).double() / (row + 1)
        gain[row, layout.target] = 1.3 + row
    if batch is None:
        scale, gain = scale[0], gain[0]
    return [
        fr.QueryScale(scale, keys=layout.references, axes=(1, 2)),
        fr.BandWeight(torch.linspace(0.25, 1.4, DIM // 2), keys=layout.references),
        fr.BiasDelta(1.2, 0.7, keys=layout.reference(0)),
        fr.LogitGain(gain, keys=slice(layout.references.start, layout.references.start + 2)),
    ]


class Recorder:
    """A method that remembers its sites and answers with modulations where ``when(site)`` holds."""

    def __init__(self, mods=(), when=lambda site: True):
        self.mods, self.when, self.sites = list(mods), when, []

    def modulations(self, site):
        self.sites.append(site)
        return self.mods if self.when(site) else []
