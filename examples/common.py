"""What the scripts share: their options, and the pipelines that these name, with the arguments of a call.

``--tiny`` takes small models in the place of published ones, without a download. They were trained on handwritten
digits, and understand plain words: a digit, colours, a texture.
"""

import argparse
from pathlib import Path

import torch

from fastrope import lab
from fastrope.commands.words import Tokenizer, understand

STEPS = 8  # of the small models


def options(description: str, **defaults):
    """Options of a script: one for each of ``defaults``, and ``--model``, ``--tiny``, ``--out``. A pair is the default
    for published models and the one for the small model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default[0] if isinstance(default, tuple) else default))
    parser.add_argument("--model", help="instead of the one that the script is written for")
    parser.add_argument("--tiny", action="store_true", help="a small model that comes with the package")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for pictures")
    found = parser.parse_args()
    if found.tiny:
        torch.set_num_threads(1)  # tensors so small lose more to waiting threads than they gain
    for name, default in defaults.items():
        if getattr(found, name) is None:
            setattr(found, name, default[found.tiny] if isinstance(default, tuple) else default)
    return found


def editor(options, device=None):
    """A FLUX.1 Kontext pipeline, on a device or offloaded, and the arguments of a call beside the generator."""
    if options.tiny:
        picture = lab.pictures(1)[0]
        return _small(edit=True), lab.CALL | dict(image=picture, prompt=options.prompt, num_inference_steps=STEPS)
    from diffusers import FluxKontextPipeline
    from diffusers.utils import load_image

    name = options.model or "black-forest-labs/FLUX.1-Kontext-dev"
    pipe = FluxKontextPipeline.from_pretrained(name, torch_dtype=torch.bfloat16)
    if device is None:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
    image = load_image(options.image)
    size = dict(width=image.width, height=image.height)
    return pipe, dict(image=image, prompt=options.prompt, guidance_scale=2.5, num_inference_steps=28, **size)


def text_to_image(options):
    """A FLUX.1 pipeline, and the arguments of a call beside the generator."""
    if options.tiny:
        return _small(edit=False), dict(prompt=options.prompt, height=16, width=16, num_inference_steps=STEPS)
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(options.model or "black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    size = dict(height=1024, width=1024)
    return pipe, dict(prompt=options.prompt, guidance_scale=3.5, num_inference_steps=28, **size)


def video(options):
    """A Wan 2.1 pipeline, and the arguments of a call beside the generator."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    if not options.tiny:
        name = options.model or "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        pipe = WanPipeline.from_pretrained(name, torch_dtype=torch.bfloat16)
        pipe.enable_model_cpu_offload()
        return pipe, dict(prompt=options.prompt, num_frames=129)
    torch.manual_seed(0)
    heads, width = dict(num_attention_heads=2, attention_head_dim=12), dict(ffn_dim=32, text_dim=16, freq_dim=32)
    transformer = WanTransformer3DModel(in_channels=4, out_channels=4, num_layers=2, **heads, **width)
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    pipe = WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(), transformer)
    text = dict(prompt_embeds=torch.randn(1, 5, 16), negative_prompt_embeds=torch.randn(1, 5, 16))
    return pipe, dict(height=32, width=32, num_frames=129, num_inference_steps=2, **text)


def _small(edit: bool):
    """The small model in diffusers' pipeline, which then reads plain words."""
    pipe = lab.pipeline(edit=edit)

    class Small(type(pipe)):
        def encode_prompt(self, prompt=None, prompt_embeds=None, pooled_prompt_embeds=None, **more):
            if prompt_embeds is None:
                prompt_embeds, pooled_prompt_embeds = lab.prompt(**understand("prompt", prompt, edit)).values()
            return prompt_embeds, pooled_prompt_embeds, torch.zeros(prompt_embeds.shape[1], 3)

    pipe.__class__ = Small
    pipe.tokenizer_2 = Tokenizer(edit)
    return pipe
