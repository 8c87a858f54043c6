"""Tiny random models of the real ComfyUI, and its real sampler, for tests where ``COMFYUI_PATH`` is set."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from functools import cache

import pytest
import torch

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("set COMFYUI_PATH to a checkout of ComfyUI to run these", allow_module_level=True)

DTYPE = torch.float32
NEAR = dict(rtol=0, atol=2e-5)
FLUX = dict(
    in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
    depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True,
    txt_ids_dims=[], image_model="flux",
)  # fmt: skip
FLUX2 = dict(
    in_channels=4, out_channels=4, vec_in_dim=None, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2,
    depth=2, depth_single_blocks=2, axes_dim=[4, 4, 4, 4], theta=2000, patch_size=1, qkv_bias=False,
    guidance_embed=False, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
    default_ref_method="index", ref_index_scale=10.0, image_model="flux2",
)  # fmt: skip
QWEN = dict(
    patch_size=2, in_channels=64, out_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=12, axes_dims_rope=(4, 6, 6), image_model="qwen_image",
)  # fmt: skip
Z_IMAGE = dict(
    patch_size=2, in_channels=4, dim=256, n_layers=3, n_refiner_layers=1, n_heads=16, n_kv_heads=16, multiple_of=8,
    norm_eps=1e-5, qk_norm=True, cap_feat_dim=12, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64], rope_theta=256.0,
    z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32, image_model="lumina2",
)  # fmt: skip
KREA = dict(
    features=32, tdim=16, txtdim=8, heads=2, kvheads=1, multiplier=2, layers=3, patch=2, channels=16, txtlayers=2,
    txtheads=2, txtkvheads=2, theta=1e3, default_ref_method="index", image_model="krea2",
)  # fmt: skip
MODELS = {"flux": FLUX, "flux2": FLUX2, "qwen": QWEN, "z-image": Z_IMAGE, "krea": KREA}
TEXT = {"flux": 12, "flux2": 12, "qwen": 12, "z-image": 12, "krea": 16}  # channels of the prompt
EDITS = ("flux", "flux2", "qwen", "krea")  # take reference latents


@cache
def comfy():
    """The real package, on the CPU."""
    if os.environ["COMFYUI_PATH"] not in sys.path:
        sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_patcher
    import comfy.sample
    import comfy.samplers
    import comfy.supported_models

    return comfy


def patcher(name: str, dtype: torch.dtype = DTYPE):
    """A ``ModelPatcher`` around a model with random weights; the same ones every time."""
    host = comfy()
    kinds = host.supported_models
    kind = {
        "flux": kinds.Flux,
        "flux2": kinds.Flux2,
        "qwen": kinds.QwenImage,
        "z-image": kinds.ZImage,
        "krea": kinds.Krea2,
    }
    config = kind[name]({**MODELS[name], "dtype": dtype})
    config.set_inference_dtype(dtype, None if dtype == DTYPE else DTYPE)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.diffusion_model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            scale = "norm" in parameter_name and parameter_name.endswith(("weight", "scale"))
            offset = 1.0 if scale and name != "krea" else 0.0
            parameter.copy_(0.3 * values / max(parameter.shape[-1], 1) ** 0.5 * 2 + offset)
    cpu = torch.device("cpu")
    return host.model_patcher.ModelPatcher(model, cpu, cpu)


def latent(name: str, height: int = 8, width: int = 12, batch: int = 1, seed: int = 1) -> torch.Tensor:
    shape = (batch, 16, 1, height, width) if name in ("qwen", "krea") else (batch, 4, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(name: str, tokens: int = 5, seed: int = 2, references=(), **more) -> list:
    text = torch.randn(1, tokens, TEXT[name] if name != "krea" else 16, generator=torch.Generator().manual_seed(seed))
    options = {"pooled_output": torch.zeros(1, 8), "guidance": 3.0, **more}
    if references:
        options["reference_latents"] = list(references)
    return [[text, options]]


def edit(name: str, **options):
    """Conditionings of an edit, where the family has references; else of a prompt."""
    references = [latent(name, 4, 6, seed=9), latent(name, 6, 4, seed=8)] if name in EDITS else []
    return [conditioning(name, seed=seed, references=references, **options) for seed in (2, 3)]


def sample(model, name: str, positive=None, negative=None, steps: int = 3, cfg: float = 1.0, **options) -> torch.Tensor:
    """What the real sampler makes."""
    host = comfy()
    noise = options.pop("noise", None)
    noise = latent(name) if noise is None else noise
    positive = conditioning(name) if positive is None else positive
    negative = conditioning(name, seed=3) if negative is None else negative
    options = {"sampler_name": "euler", "scheduler": "simple", "seed": 7, "disable_pbar": True, **options}
    order = (
        steps,
        cfg,
        options.pop("sampler_name"),
        options.pop("scheduler"),
        positive,
        negative,
        torch.zeros_like(noise),
    )
    with torch.no_grad():
        return host.sample.sample(model, noise, *order, **options)


def report(capsys, what: str, found, expected) -> None:
    with capsys.disabled():
        print(f"\n  {what}: largest difference {float((found - expected).abs().max()):.2e}", end="")


def interface(functions) -> dict:
    """Names of parameters of the real functions, and of what nodes are described with."""
    comfy()
    from comfy_api.latest import io

    kinds = ("Model", "Image", "Mask", "Latent", "Conditioning", "Float", "Int", "String", "Combo", "Boolean")
    return {
        "signatures": {name: _parameters(_find(name)) for name in functions},
        "inputs": {kind: _parameters(getattr(io, kind).Input) for kind in kinds},
        "output": _parameters(io.Image.Output),
        "schema": _parameters(io.Schema),
    }


def _find(name: str):
    parts = name.split(".")
    count = next(n for n, part in enumerate(parts) if part[0].isupper() or n == len(parts) - 1)
    found = importlib.import_module(".".join(parts[:count]))
    for part in parts[count:]:
        found = getattr(found, part)
    return inspect.unwrap(found)


def _parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def foreign(model):
    """A clone with another node's override, chained as the host's own nodes chain."""
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    before = options.get("optimized_attention_override")

    def louder(func, *args, **kwargs):
        out = func(*args, **kwargs) if before is None else before(func, *args, **kwargs)
        return out + 0.5 * out.roll(1, dims=-1)

    options["optimized_attention_override"] = louder
    return clone
