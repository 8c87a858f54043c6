"""References prepared by tiny pipelines, and what the transformer is given in a run."""

from __future__ import annotations

import math

import pytest
import torch

import fastrope as fr

diffusers = pytest.importorskip("diffusers")
import tiny_pipelines as pipelines  # noqa: E402
import tiny_transformers as tiny  # noqa: E402

STEPS = 4


SIZE = (6, 10)  # of pictures: 3 x 5 tokens


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(rows: int = 1, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.stack([torch.rand(3, *size, generator=torch.Generator().manual_seed(n)) for n in range(rows)])


def kl_vae(channels: int):
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=channels, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    ).eval()  # fmt: skip


def with_vae(cls, transformer, channels: int = 1, nothing=pipelines.NO_TEXT, **more):
    parts = dict(transformer=transformer, scheduler=pipelines.scheduler(), vae=kl_vae(channels))
    return pipelines.quiet(cls(**parts, **nothing, **more))


def longcat():
    wide = diffusers.LongCatImageTransformer2DModel(patch_size=1, in_channels=64, pooled_projection_dim=tiny.WIDTH,
                                                    **tiny.BLOCKS)  # fmt: skip
    pipe = with_vae(diffusers.LongCatImagePipeline, tiny.lively(wide), 16, text_processor=None)
    # The pipeline takes no embeddings alone.
    pipe._encode_prompt = lambda prompt: torch.cat([pipelines.prompt(1, tiny.TEXT, len(words)) for words in prompt])
    return pipe


def klein():
    blocks = tiny.BLOCKS | {"axes_dims_rope": (4, 4, 4, 4)}
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, timestep_guidance_channels=32, mlp_ratio=2.0, rope_theta=2000,
        guidance_embeds=False, **blocks,
    )  # fmt: skip
    parts = pipelines.flux2_pipeline(tiny.lively(transformer)).components
    return pipelines.quiet(diffusers.Flux2KleinPipeline(**parts))


PIPELINES = {
    "flux": lambda: with_vae(diffusers.FluxPipeline, tiny.build_flux(), nothing=pipelines.NO_TEXT_2),
    "kontext": pipelines.kontext_pipeline,
    "chroma": lambda: with_vae(diffusers.ChromaPipeline, tiny.build_chroma()),
    "longcat": longcat,
    "ovis": lambda: with_vae(diffusers.OvisImagePipeline, tiny.build_ovis()),
    "flux2": pipelines.flux2_pipeline,
    "klein": klein,
    "qwen": lambda: pipelines.qwen_pipeline(diffusers.QwenImagePipeline),
    "z-image": lambda: with_vae(diffusers.ZImagePipeline, tiny.build_z_image(), 2),
}


def text(name: str, rows: int) -> dict:
    embeds = pipelines.prompt(rows, tiny.TEXT)
    if name == "longcat":
        return {"prompt": ["ink" * n for n in range(rows)]}
    if name == "z-image":
        return {"prompt_embeds": list(embeds)}
    more = {}
    if name in ("flux", "kontext"):
        more = {"pooled_prompt_embeds": pipelines.prompt(rows, 1, 3)[:, 0]}
    if name == "kontext":
        more |= {"max_area": math.prod(SIZE), "_auto_resize": False}
    if name in ("chroma", "qwen"):
        mask = {"chroma": "prompt_attention_mask", "qwen": "prompt_embeds_mask"}[name]
        more = {mask: torch.ones(rows, tiny.TEXT, dtype=torch.bool)}
    return {"prompt_embeds": embeds, **more}


def seeds(rows: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(40 + n) for n in range(rows)]


def prepare(case, trajectory: str = "linear", rows: int = 1, **more) -> fr.Reference:
    name, pipe = case
    given = {"generator": seeds(rows), "num_inference_steps": STEPS, **text(name, rows), **more}
    given.setdefault("image", pictures(rows) if trajectory != "latents" else None)
    return fr.prepare_reference(pipe, given.pop("image"), trajectory, **given)


def seen_in_a_run(case, rows: int = 1, **more) -> tuple[list[dict], object]:
    """What the pipeline itself tells its transformer, call by call, and its output."""
    name, pipe = case
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(zip(("x", "t", "cap_feats"), args, strict=False)) | kwargs),
        with_kwargs=True,
    )
    size = {"height": SIZE[0], "width": SIZE[1]}
    off = {} if name in ("flux", "kontext", "flux2", "qwen") else {"guidance_scale": 0.0}
    off |= {"enable_prompt_rewrite": False} if name == "longcat" else {}
    given = size | off | text(name, rows) | {"num_inference_steps": STEPS, "generator": seeds(rows)} | more
    try:
        with torch.no_grad():
            out = pipe(**given, output_type="latent", return_dict=False)[0]
    finally:
        hook.remove()
    return calls, out


def hidden(call: dict) -> torch.Tensor:
    found = call.get("hidden_states", call.get("x"))
    return torch.stack(found) if isinstance(found, list) else found


def loop_layout(latents: torch.Tensor) -> torch.Tensor:
    """The transformer's input as the pipeline's loop has it."""
    return latents.squeeze(2) if latents.ndim == 5 else latents
