"""Every host of the table with random weights, small enough for a CPU: the model, a call, a real pipeline around it.

Grids are odd and no two of them alike; everything differs between the rows of a batch.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import diffusers
import diffusers_formulas as formulas
import torch

import fastrope as fr

TEXT = 5
TARGET, REFERENCES = (3, 5), [(2, 3), (4, 3)]
WIDTH = 32  # of text embeddings
HEADS, DIM = 2, 16

for name in ("diffusers", "transformers"):  # advice on missing encoders
    logging.getLogger(name).setLevel(logging.ERROR)


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


def positions_of(layout: fr.TokenLayout, convention: str) -> torch.Tensor:
    """``(S, axes)``. LongCat and Ovis count text on the diagonal, LongCat its pictures from frame 1 on."""
    if convention not in ("longcat", "ovis"):
        return layout.positions(convention)
    positions = layout.positions("flux")
    positions[layout.text, 1:] = torch.arange(layout.text_tokens)[:, None]
    if convention == "longcat":
        positions[layout.text_tokens :] += torch.tensor([1, layout.text_tokens, layout.text_tokens])
    return positions


def lively(model):
    """The stock initialisation is so small that attention hardly shows in the output."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 / math.sqrt(weight[0].numel()))
            elif name.endswith((".norm_q.weight", ".norm_k.weight", ".norm_added_q.weight", ".norm_added_k.weight")):
                weight.fill_(1.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def run(model, call: dict) -> torch.Tensor:
    """The transformer's output, pictures of a list stacked."""
    with torch.no_grad():
        out = model(**call, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


# ---- FLUX.1 and its kin ----------------------------------------------------------------------------------------------

BLOCKS = dict(num_layers=2, num_single_layers=2, attention_head_dim=DIM, num_attention_heads=HEADS,
              joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8))  # fmt: skip
TWO_STREAMS = {"transformer_blocks": formulas.Flux, "single_transformer_blocks": formulas.Flux}


def build_flux(layers=(2, 2)):
    blocks = BLOCKS | dict(zip(("num_layers", "num_single_layers"), layers, strict=True))
    return lively(diffusers.FluxTransformer2DModel(patch_size=1, in_channels=4, pooled_projection_dim=WIDTH, **blocks))


def build_chroma():
    return lively(
        diffusers.ChromaTransformer2DModel(
            patch_size=1, in_channels=4, approximator_num_channels=8, approximator_hidden_dim=16,
            approximator_layers=2, **BLOCKS,
        )
    )  # fmt: skip


def build_longcat():
    return lively(
        diffusers.LongCatImageTransformer2DModel(patch_size=1, in_channels=4, pooled_projection_dim=WIDTH, **BLOCKS)
    )


def build_ovis():
    return lively(diffusers.OvisImageTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, **BLOCKS))


def ids_call(convention: str, *, pooled: bool = False, guidance: bool = False, channels: int = 4):
    """Calls of transformers that take position ids."""

    def call(layout: fr.TokenLayout, batch: int = 2, dtype=torch.float64) -> dict:
        # LongCat's pipelines keep the ids in single precision, the others hand them over in that of the model.
        ids = positions_of(layout, convention).to(torch.float32 if convention == "longcat" else dtype)
        arguments = {
            "hidden_states": torch.randn(batch, len(layout) - layout.text_tokens, channels, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, layout.text_tokens, WIDTH, dtype=dtype),
            "timestep": torch.full((batch,), 0.5, dtype=dtype),
            "txt_ids": ids[layout.text],
            "img_ids": ids[layout.text_tokens :],
        }
        if pooled:
            arguments["pooled_projections"] = torch.randn(batch, WIDTH, dtype=dtype)
        if guidance:
            arguments["guidance"] = torch.full((batch,), 2.5, dtype=dtype)
        return arguments

    return call


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def latent_arguments(steps: int, grid=TARGET, pixels: int = 16) -> dict:
    """Of a pipeline that makes ``grid`` tokens of some pixels a side."""
    return dict(height=pixels * grid[0], width=pixels * grid[1], num_inference_steps=steps, output_type="latent",
                generator=torch.Generator().manual_seed(2), return_dict=False)  # fmt: skip


NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXT_2 = NO_TEXT | {"text_encoder_2": None, "tokenizer_2": None}


def scheduler(shift: float = 3.0):
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


def kl_vae():
    """One pixel per latent."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=1, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip


def kontext_pipeline(transformer=None):
    parts = dict(transformer=transformer or build_flux(), scheduler=scheduler(), vae=kl_vae())
    return quiet(diffusers.FluxKontextPipeline(**parts, **NO_TEXT_2))


def flux_prompts(batch: int, positive: int, negative: int | None, dtype) -> dict:
    given = {"prompt_embeds": prompt(batch, positive), "pooled_prompt_embeds": prompt(batch, 1, 3)[:, 0]}
    if negative:
        given |= {"negative_prompt_embeds": prompt(batch, negative, 4)}
        given |= {"negative_pooled_prompt_embeds": prompt(batch, 1, 5)[:, 0]}
    guidance = {"true_cfg_scale": 2.0} if negative else {}
    return {name: value.to(dtype) for name, value in given.items()} | guidance


def kontext_generate(pipe, steps=2, batch=2, lengths=(TEXT, None), **more):
    positive, negative = lengths
    more |= flux_prompts(batch, positive, negative, pipe.transformer.dtype)
    rows, columns = REFERENCES[0]
    picture = torch.rand(1, 3, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(6))
    size = latent_arguments(steps, pixels=2)
    return pipe(image=picture, max_area=4 * math.prod(TARGET), _auto_resize=False, **size, **more)[0]


def flux_pipeline(transformer=None):
    parts = dict(transformer=transformer or build_flux(), scheduler=scheduler(), vae=None)
    return quiet(diffusers.FluxPipeline(**parts, **NO_TEXT_2))


def flux_generate(pipe, steps=2, batch=2, lengths=(TEXT, None), **more):
    positive, negative = lengths
    more |= flux_prompts(batch, positive, negative, pipe.transformer.dtype)
    return pipe(**latent_arguments(steps), **more)[0]


def chroma_pipeline(transformer=None):
    parts = dict(transformer=transformer or build_chroma(), scheduler=scheduler(), vae=None)
    return quiet(diffusers.ChromaPipeline(**parts, **NO_TEXT))


def chroma_generate(pipe, steps=2, batch=2, lengths=(TEXT, None), **more):
    positive, negative = lengths
    more |= {"prompt_embeds": prompt(batch, positive), "guidance_scale": 2.0 if negative else 0.0}
    more.setdefault("prompt_attention_mask", torch.ones(batch, positive, dtype=torch.bool))
    if negative:
        more |= {"negative_prompt_embeds": prompt(batch, negative, 4)}
        more["negative_prompt_attention_mask"] = torch.ones(batch, negative, dtype=torch.bool)
    return pipe(**latent_arguments(steps), **more)[0]


def ovis_pipeline(transformer=None):
    parts = dict(transformer=transformer or build_ovis(), scheduler=scheduler(), vae=None)
    return quiet(diffusers.OvisImagePipeline(**parts, **NO_TEXT))


def ovis_generate(pipe, steps=2, batch=2, lengths=(TEXT, None), **more):
    positive, negative = lengths
    more |= {
        "prompt_embeds": prompt(batch, positive),
        "guidance_scale": 2.0 if negative else 1.0,
        "negative_prompt": None,
    }
    if negative:
        more["negative_prompt_embeds"] = prompt(batch, negative, 4)
    return pipe(**latent_arguments(steps), **more)[0]


# ---- FLUX.2 ----------------------------------------------------------------------------------------------------------


def build_flux2():
    blocks = BLOCKS | {"axes_dims_rope": (4, 4, 4, 4)}
    return lively(
        diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=4, timestep_guidance_channels=32, mlp_ratio=2.0, rope_theta=2000, **blocks
        )
    )


def flux2_pipeline(transformer=None):
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1, latent_channels=1, norm_num_groups=1, sample_size=16, use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()  # fmt: skip
    parts = dict(transformer=transformer or build_flux2(), scheduler=scheduler(), vae=vae)
    return quiet(diffusers.Flux2Pipeline(**parts, **NO_TEXT))


def flux2_generate(pipe, steps=2, batch=2, lengths=(TEXT, None), references=REFERENCES, **more):
    # The pipeline wants pictures of at least 64 pixels a side: large ones, that it is told to see as small.
    def small(image, height, width, resize_mode):
        return next(p for p in pictures if p[0] is image)[1]

    from PIL import Image

    pictures = []
    for n, (rows, columns) in enumerate(references):
        g = torch.Generator().manual_seed(6 + n)
        pictures.append((Image.new("RGB", (64, 64)), torch.rand(1, 3, 2 * rows, 2 * columns, generator=g)))
    with mock.patch.object(pipe.image_processor, "preprocess", small):
        out = pipe(image=[p[0] for p in pictures], prompt_embeds=prompt(batch, lengths[0]),
                   **latent_arguments(steps, pixels=2), **more)  # fmt: skip
    return out[0]


# ---- Qwen-Image ------------------------------------------------------------------------------------------------------


def build_qwen(layers: int = 3):
    return lively(
        diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=1, num_layers=layers, attention_head_dim=DIM,
            num_attention_heads=HEADS, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip


def qwen_call(layout: fr.TokenLayout, batch: int = 2, dtype=torch.float64) -> dict:
    grids = (layout.target_grid, *layout.reference_grids)
    return {
        "hidden_states": torch.randn(batch, len(layout) - layout.text_tokens, 4, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, layout.text_tokens, WIDTH, dtype=dtype),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "img_shapes": [[(1, *grid) for grid in grids]] * batch,
    }


def qwen_pipeline(kind=diffusers.QwenImageEditPlusPipeline, transformer=None):
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=1, dim_mult=[1], num_res_blocks=1, temperal_downsample=[], latents_mean=[0.1],
        latents_std=[1.5],
    )  # fmt: skip
    parts = dict(transformer=transformer or build_qwen(), scheduler=scheduler(), vae=vae.eval(), **NO_TEXT)
    if kind is not diffusers.QwenImagePipeline:
        parts["processor"] = None
    return quiet(kind(**parts))


def qwen_generate(pipe, steps=2, batch=2, lengths=(TEXT, None), masked=(False, False), **more):
    from PIL import Image

    positive, negative = lengths
    if isinstance(pipe, diffusers.QwenImageEditPlusPipeline):  # takes one prompt, for any number of images
        more, batch = more | {"num_images_per_prompt": batch}, 1
    more |= {"prompt_embeds": prompt(batch, positive), "prompt_embeds_mask": text_mask(batch, positive, masked[0])}
    if negative:
        more |= {"negative_prompt_embeds": prompt(batch, negative, 4), "true_cfg_scale": 2.0}
        more |= {"negative_prompt_embeds_mask": text_mask(batch, negative, masked[1])}
    sizes, gradient = list(REFERENCES), Image.radial_gradient("L")
    if isinstance(pipe, diffusers.QwenImageEditPlusPipeline):
        more["image"] = [gradient.resize((64 + n, 64)).convert("RGB") for n in range(len(sizes))]
    elif isinstance(pipe, diffusers.QwenImageEditPipeline):
        more["image"] = gradient.resize((64, 64)).convert("RGB")

    def small(area, ratio):  # widths of the pictures tell them apart
        rows, columns = sizes[round(64 * ratio) - 64]
        return (2 * columns, 2 * rows) if module.endswith("plus") else (2 * columns, 2 * rows, None)

    module = type(pipe).__module__
    patched = mock.patch(f"{module}.calculate_dimensions", small) if "image" in more else contextlib.nullcontext()
    with patched:
        return pipe(**latent_arguments(steps, pixels=2), **more)[0]


def text_mask(batch: int, length: int, masked: bool) -> torch.Tensor:
    """``(B, length)``; masked, the last row's prompt is two tokens shorter."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    if masked:
        mask[-1, -2:] = False
    return mask


# ---- Z-Image ---------------------------------------------------------------------------------------------------------


def build_z_image():
    model = diffusers.ZImageTransformer2DModel(
        in_channels=2, dim=HEADS * DIM, n_layers=3, n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS,
        cap_feat_dim=WIDTH, axes_dims=[4, 4, 8], axes_lens=[256, 32, 32],
    )  # fmt: skip
    model = lively(model)
    with torch.no_grad():
        for refiner in (*model.noise_refiner, *model.context_refiner, *model.layers):
            refiner.attention_norm2.weight.fill_(0.5)
    return model


def z_image_call(layout: fr.TokenLayout, batch: int = 2, dtype=torch.float64, captions=None) -> dict:
    rows, columns = layout.target_grid
    captions = captions or [layout.text_tokens] * batch
    return {
        "x": [torch.randn(2, 1, 2 * rows, 2 * columns, dtype=dtype) for _ in range(batch)],
        "t": torch.full((batch,), 0.5, dtype=dtype),
        "cap_feats": [torch.randn(length, WIDTH, dtype=dtype) for length in captions],
    }


def z_image_pipeline(transformer=None):
    parts = dict(transformer=transformer or build_z_image(), scheduler=scheduler(), vae=None)
    return quiet(diffusers.ZImagePipeline(**parts, **NO_TEXT))


def z_image_generate(pipe, steps=2, batch=2, lengths=(TEXT, None), **more):
    positive, negative = lengths
    more |= {"prompt_embeds": list(prompt(batch, positive)), "guidance_scale": 2.0 if negative else 0.0}
    if negative:
        more["negative_prompt_embeds"] = list(prompt(batch, negative, 4))
    return pipe(**latent_arguments(steps), **more)[0]


# ---- the table -------------------------------------------------------------------------------------------------------

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
