"""Real pipelines around the tiny transformers, and an image of each. Grids are odd and no two of them alike."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import diffusers
import torch
from tiny_transformers import (
    REFERENCES,
    TARGET,
    TEXT,
    WIDTH,
    build_chroma,
    build_flux,
    build_flux2,
    build_ovis,
    build_qwen,
    build_z_image,
)


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


# ---- FLUX.1 and its kin ----------------------------------------------------------------------------------------------


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


def z_image_pipeline(transformer=None):
    parts = dict(transformer=transformer or build_z_image(), scheduler=scheduler(), vae=None)
    return quiet(diffusers.ZImagePipeline(**parts, **NO_TEXT))


def z_image_generate(pipe, steps=2, batch=2, lengths=(TEXT, None), **more):
    positive, negative = lengths
    more |= {"prompt_embeds": list(prompt(batch, positive)), "guidance_scale": 2.0 if negative else 0.0}
    if negative:
        more["negative_prompt_embeds"] = list(prompt(batch, negative, 4))
    return pipe(**latent_arguments(steps), **more)[0]
