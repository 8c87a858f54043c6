"""The example workflows of the ComfyUI nodes, as its HTTP interface takes them, and where nodes stand in a picture.

``graphs.py`` beside this file makes of them what ComfyUI's editor opens, and the pictures of docs/comfyui.md.
"""

from __future__ import annotations

# Inputs of every class in their order; those of a lower-case type are widgets. Outputs, by type.
CLASSES: dict[str, tuple[dict[str, str], list[str]]] = {
    "UNETLoader": ({"unet_name": "combo", "weight_dtype": "combo"}, ["MODEL"]),
    "DualCLIPLoader": ({"clip_name1": "combo", "clip_name2": "combo", "type": "combo"}, ["CLIP"]),
    "CLIPLoader": ({"clip_name": "combo", "type": "combo"}, ["CLIP"]),
    "VAELoader": ({"vae_name": "combo"}, ["VAE"]),
    "LoadImage": ({"image": "upload"}, ["IMAGE", "MASK"]),
    "LoadImageMask": ({"image": "upload", "channel": "combo"}, ["MASK"]),
    "FluxKontextImageScale": ({"image": "IMAGE"}, ["IMAGE"]),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, ["LATENT"]),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "CLIPTextEncode": ({"clip": "CLIP", "text": "text"}, ["CONDITIONING"]),
    "TextEncodeQwenImageEdit": (
        {"clip": "CLIP", "vae": "VAE", "image": "IMAGE", "prompt": "text"}, ["CONDITIONING"]
    ),
    "ReferenceLatent": ({"conditioning": "CONDITIONING", "latent": "LATENT"}, ["CONDITIONING"]),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": "float"}, ["CONDITIONING"]),
    "ModelSamplingAuraFlow": ({"model": "MODEL", "shift": "float"}, ["MODEL"]),
    "ConditioningZeroOut": ({"conditioning": "CONDITIONING"}, ["CONDITIONING"]),
    "ConditioningSetMask": (
        {"conditioning": "CONDITIONING", "mask": "MASK", "strength": "float", "set_cond_area": "combo"},
        ["CONDITIONING"],
    ),
    "ConditioningCombine": (
        {"conditioning_1": "CONDITIONING", "conditioning_2": "CONDITIONING"}, ["CONDITIONING"]
    ),
    "EmptySD3LatentImage": ({"width": "int", "height": "int", "batch_size": "int"}, ["LATENT"]),
    "KSampler": (
        {
            "model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT",
            "seed": "seed", "steps": "int", "cfg": "float", "sampler_name": "combo", "scheduler": "combo",
            "denoise": "float",
        },
        ["LATENT"],
    ),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "string"}, []),
    "PreviewImage": ({"images": "IMAGE"}, []),
    "FastRoPE_GRAG": (
        {
            "model": "MODEL", "delta": "float", "strength": "float", "reference": "int", "text_strength": "float",
            "text_delta": "float", "value_delta": "float", "start_percent": "float", "end_percent": "float",
            "layers": "string",
        },
        ["MODEL"],
    ),
    "FastRoPE_ReferenceStrength": (
        {
            "model": "MODEL", "weight": "float", "reference": "int", "start_percent": "float", "end_percent": "float",
            "layers": "string",
        },
        ["MODEL"],
    ),
    "FastRoPE_LooseRoPE": (
        {
            "model": "MODEL", "composite": "IMAGE", "mask": "MASK", "original": "IMAGE", "boost": "float",
            "levels": "int", "dilation": "int", "timing": "combo", "reference": "int", "layers": "string",
        },
        ["MODEL", "IMAGE"],
    ),
    "FastRoPE_UntwistingRoPE": (
        {
            "model": "MODEL", "preset": "combo", "reference": "int", "s_hf_start": "float", "s_hf_end": "float",
            "s_lf_start": "float", "s_lf_end": "float", "beta": "float", "adain": "float", "other_axes": "combo",
            "blocks": "combo", "start_percent": "float", "end_percent": "float", "layers": "string",
            "reference_latent": "LATENT", "reference_conditioning": "CONDITIONING", "noise_seed": "int",
            "keep": "boolean",
        },
        ["MODEL"],
    ),
    "FastRoPE_Regions": (
        {
            "model": "MODEL", "regions": "CONDITIONING", "local": "boolean", "start_percent": "float",
            "end_percent": "float", "layers": "string",
        },
        ["MODEL", "CONDITIONING"],
    ),
    "FastRoPE_NAG": (
        {
            "model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "scale": "float", "tau": "float",
            "alpha": "float", "start_percent": "float", "end_percent": "float", "layers": "string",
        },
        ["MODEL", "CONDITIONING"],
    ),
    "FastRoPE_HighResolution": (
        {
            "model": "MODEL", "kind": "combo", "trained_width": "int", "trained_height": "int", "exponent": "float",
            "start_percent": "float", "end_percent": "float",
        },
        ["MODEL"],
    ),
    "FastRoPE_Inspect": ({"model": "MODEL", "layers": "string", "every": "int"}, ["MODEL", "FASTROPE_RECORD"]),
    "FastRoPE_AttentionChart": ({"record": "FASTROPE_RECORD", "latent": "LATENT"}, ["IMAGE", "LATENT"]),
}  # fmt: skip

OURS = {
    "FastRoPE_GRAG": dict(
        delta=1.1, strength=1.0, reference=-1, text_strength=1.0, text_delta=1.0, value_delta=1.0, start_percent=0.0,
        end_percent=1.0, layers="",
    ),
    "FastRoPE_ReferenceStrength": dict(weight=1.5, reference=-1, start_percent=0.0, end_percent=1.0, layers=""),
    "FastRoPE_LooseRoPE": dict(boost=0.83, levels=5, dilation=2, timing="scaled", reference=0, layers=""),
    "FastRoPE_UntwistingRoPE": dict(
        preset="paper", reference=0, s_hf_start=0.25, s_hf_end=0.75, s_lf_start=1.0, s_lf_end=1.4, beta=2.0, adain=0.5,
        other_axes="low", blocks="all", start_percent=0.0, end_percent=1.0, layers="", noise_seed=0, keep=False,
    ),
    "FastRoPE_Regions": dict(local=False, start_percent=0.0, end_percent=1.0, layers=""),
    "FastRoPE_NAG": dict(scale=5.0, tau=2.5, alpha=0.25, start_percent=0.0, end_percent=1.0, layers=""),
    "FastRoPE_HighResolution": dict(
        kind="dype", trained_width=1024, trained_height=1024, exponent=2.0, start_percent=0.0, end_percent=1.0
    ),
    "FastRoPE_Inspect": dict(layers="", every=1),
    "FastRoPE_AttentionChart": {},
}  # fmt: skip
MASKED = dict(strength=1.0, set_cond_area="default")
KONTEXT = {
    "model": ("UNETLoader", dict(unet_name="flux1-dev-kontext_fp8_scaled.safetensors", weight_dtype="default")),
    "clip": (
        "DualCLIPLoader",
        dict(clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp8_e4m3fn_scaled.safetensors", type="flux"),
    ),
    "vae": ("VAELoader", dict(vae_name="ae.safetensors")),
}
QWEN = {
    "model": ("UNETLoader", dict(unet_name="qwen_image_edit_fp8_e4m3fn.safetensors", weight_dtype="default")),
    "clip": ("CLIPLoader", dict(clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors", type="qwen_image")),
    "vae": ("VAELoader", dict(vae_name="qwen_image_vae.safetensors")),
}


def _kontext(prompt: str, picture: str, steered: str, given: dict, model: str = "steered", steps: int = 20) -> dict:
    """An edit with FLUX.1 Kontext: guidance 2.5, no negative prompt. Values ``("name", n)`` are output n of a node."""
    return {
        **KONTEXT,
        "picture": ("LoadImage", dict(image=picture)),
        "scaled": ("FluxKontextImageScale", dict(image=("picture", 0))),
        "encoded": ("VAEEncode", dict(pixels=("scaled", 0), vae=("vae", 0))),
        "prompt": ("CLIPTextEncode", dict(clip=("clip", 0), text=prompt)),
        "reference": ("ReferenceLatent", dict(conditioning=("prompt", 0), latent=("encoded", 0))),
        "guidance": ("FluxGuidance", dict(conditioning=("reference", 0), guidance=2.5)),
        "nothing": ("ConditioningZeroOut", dict(conditioning=("prompt", 0))),
        "steered": (steered, {**OURS[steered], "model": ("model", 0), **given}),
        "sampler": (
            "KSampler",
            dict(
                model=(model, 0), positive=("guidance", 0), negative=("nothing", 0), latent_image=("encoded", 0),
                seed=1, steps=steps, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
            ),
        ),
        "decoded": ("VAEDecode", dict(samples=("sampler", 0), vae=("vae", 0))),
        "saved": ("SaveImage", dict(images=("decoded", 0), filename_prefix="fastrope")),
    }  # fmt: skip


KONTEXT_PLACES = {
    "model": (0, 0), "clip": (0, 1), "vae": (0, 2), "picture": (0, 3), "scaled": (1, 3), "encoded": (2, 3),
    "prompt": (1, 1), "reference": (2, 1), "guidance": (3, 1), "nothing": (2, 2), "steered": (2, 0), "sampler": (4, 0),
    "decoded": (5, 0), "saved": (6, 0),
}  # fmt: skip

HARMONISE = (
    "Blend the pasted object into the scene: match light, shadows and perspective. Keep the style of the picture."
)

WORKFLOWS: dict[str, tuple[str, dict, dict]] = {
    "grag-qwen-image-edit": (
        "GRAG on Qwen-Image-Edit, at the published settings: 24 steps, CFG 4, delta 1.1",
        {
            **QWEN,
            "picture": ("LoadImage", dict(image="photo.png")),
            "encoded": ("VAEEncode", dict(pixels=("picture", 0), vae=("vae", 0))),
            "prompt": (
                "TextEncodeQwenImageEdit",
                dict(clip=("clip", 0), vae=("vae", 0), image=("picture", 0), prompt="make it evening"),
            ),
            "negative": (
                "TextEncodeQwenImageEdit",
                dict(clip=("clip", 0), vae=("vae", 0), image=("picture", 0), prompt=" "),
            ),
            "steered": ("FastRoPE_GRAG", {**OURS["FastRoPE_GRAG"], "model": ("model", 0)}),
            "sampler": (
                "KSampler",
                dict(
                    model=("steered", 0), positive=("prompt", 0), negative=("negative", 0), latent_image=("encoded", 0),
                    seed=1, steps=24, cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0,
                ),
            ),
            "decoded": ("VAEDecode", dict(samples=("sampler", 0), vae=("vae", 0))),
            "saved": ("SaveImage", dict(images=("decoded", 0), filename_prefix="fastrope")),
        },
        {
            "model": (0, 0), "clip": (0, 1), "vae": (0, 2), "picture": (0, 3), "steered": (1, 0), "prompt": (1, 2),
            "negative": (2, 2), "encoded": (1, 3), "sampler": (3, 0), "decoded": (4, 0), "saved": (5, 0),
        },
    ),
    "grag-flux-kontext": (
        "GRAG on FLUX.1 Kontext",
        _kontext("make it evening", "photo.png", "FastRoPE_GRAG", {}),
        KONTEXT_PLACES,
    ),
    "reference-strength-flux-kontext": (
        "Reference strength on FLUX.1 Kontext",
        _kontext("make it evening", "photo.png", "FastRoPE_ReferenceStrength", {}),
        KONTEXT_PLACES,
    ),
    "looserope-flux-kontext": (
        "LooseRoPE on FLUX.1 Kontext, at the published settings: 28 steps, guidance 2.5",
        {
            **_kontext(HARMONISE, "composite.png", "FastRoPE_LooseRoPE",
                       dict(composite=("scaled", 0), mask=("paste", 0)), steps=28),
            "paste": ("LoadImageMask", dict(image="paste-mask.png", channel="red")),
            "saliency": ("PreviewImage", dict(images=("steered", 1))),
        },
        {**KONTEXT_PLACES, "paste": (1, 0), "saliency": (3, 0)},
    ),
    "untwisting-rope-flux-kontext": (
        "Untwisting RoPE with the host's own reference, at the paper's numbers",
        _kontext("a lighthouse on a cliff, in the style of the reference", "style.png", "FastRoPE_UntwistingRoPE", {}),
        KONTEXT_PLACES,
    ),
    "untwisting-rope-z-image": (
        "Untwisting RoPE with a style picture of its own, on a model that takes no references",
        {
            "model": ("UNETLoader", dict(unet_name="z_image_turbo_bf16.safetensors", weight_dtype="default")),
            "clip": ("CLIPLoader", dict(clip_name="qwen_3_4b.safetensors", type="lumina2")),
            "vae": ("VAELoader", dict(vae_name="ae.safetensors")),
            "picture": ("LoadImage", dict(image="style.png")),
            "shifted": ("ModelSamplingAuraFlow", dict(model=("model", 0), shift=3.0)),
            "prompt": ("CLIPTextEncode", dict(clip=("clip", 0), text="a lighthouse on a cliff")),
            "shown": ("CLIPTextEncode", dict(clip=("clip", 0), text="")),
            "nothing": ("ConditioningZeroOut", dict(conditioning=("prompt", 0))),
            "encoded": ("VAEEncode", dict(pixels=("picture", 0), vae=("vae", 0))),
            "steered": (
                "FastRoPE_UntwistingRoPE",
                {
                    **OURS["FastRoPE_UntwistingRoPE"], "model": ("shifted", 0), "reference_latent": ("encoded", 0),
                    "reference_conditioning": ("shown", 0), "preset": "own numbers", "other_axes": "match",
                },
            ),
            "empty": ("EmptySD3LatentImage", dict(width=1024, height=1024, batch_size=1)),
            "sampler": (
                "KSampler",
                dict(
                    model=("steered", 0), positive=("prompt", 0), negative=("nothing", 0), latent_image=("empty", 0),
                    seed=1, steps=9, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
                ),
            ),
            "decoded": ("VAEDecode", dict(samples=("sampler", 0), vae=("vae", 0))),
            "saved": ("SaveImage", dict(images=("decoded", 0), filename_prefix="fastrope")),
        },
        {
            "model": (0, 0), "clip": (0, 1), "vae": (0, 2), "picture": (0, 3), "shifted": (1, 0), "prompt": (1, 1),
            "shown": (1, 2), "encoded": (1, 3), "steered": (2, 0), "nothing": (2, 1), "empty": (2, 3),
            "sampler": (3, 0), "decoded": (4, 0), "saved": (5, 0),
        },
    ),
    "regions-flux": (
        "A prompt for the whole picture and two for its halves, on FLUX.1, in one run of the model",
        {
            **KONTEXT,
            "model": ("UNETLoader", dict(unet_name="flux1-dev.safetensors", weight_dtype="fp8_e4m3fn")),
            "whole": ("CLIPTextEncode", dict(clip=("clip", 0), text="a harbour at dawn, oil painting")),
            "boat": ("CLIPTextEncode", dict(clip=("clip", 0), text="a red boat")),
            "tower": ("CLIPTextEncode", dict(clip=("clip", 0), text="a white lighthouse")),
            "left": ("LoadImageMask", dict(image="left-mask.png", channel="red")),
            "right": ("LoadImageMask", dict(image="right-mask.png", channel="red")),
            "boat left": ("ConditioningSetMask", {**MASKED, "conditioning": ("boat", 0), "mask": ("left", 0)}),
            "tower right": ("ConditioningSetMask", {**MASKED, "conditioning": ("tower", 0), "mask": ("right", 0)}),
            "halves": (
                "ConditioningCombine", dict(conditioning_1=("boat left", 0), conditioning_2=("tower right", 0))
            ),
            "all": ("ConditioningCombine", dict(conditioning_1=("whole", 0), conditioning_2=("halves", 0))),
            "steered": (
                "FastRoPE_Regions", {**OURS["FastRoPE_Regions"], "model": ("model", 0), "regions": ("all", 0)}
            ),
            "guidance": ("FluxGuidance", dict(conditioning=("steered", 1), guidance=3.5)),
            "nothing": ("ConditioningZeroOut", dict(conditioning=("whole", 0))),
            "empty": ("EmptySD3LatentImage", dict(width=1024, height=1024, batch_size=1)),
            "sampler": (
                "KSampler",
                dict(
                    model=("steered", 0), positive=("guidance", 0), negative=("nothing", 0), latent_image=("empty", 0),
                    seed=1, steps=28, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
                ),
            ),
            "decoded": ("VAEDecode", dict(samples=("sampler", 0), vae=("vae", 0))),
            "saved": ("SaveImage", dict(images=("decoded", 0), filename_prefix="fastrope")),
        },
        {
            "model": (0, 0), "clip": (0, 1), "vae": (0, 2), "left": (0, 3), "right": (0, 4), "whole": (1, 1),
            "boat": (1, 2), "tower": (1, 3), "nothing": (2, 1), "boat left": (2, 2), "tower right": (2, 3),
            "halves": (3, 2), "all": (4, 1), "steered": (5, 0), "guidance": (6, 1), "empty": (5, 2), "sampler": (7, 0),
            "decoded": (8, 0), "saved": (8, 1),
        },
    ),
    "nag-flux-schnell": (
        "NAG, a negative prompt for FLUX.1 schnell, at the published settings: 4 steps, scale 5",
        {
            **KONTEXT,
            "model": ("UNETLoader", dict(unet_name="flux1-schnell.safetensors", weight_dtype="fp8_e4m3fn")),
            "prompt": ("CLIPTextEncode", dict(clip=("clip", 0), text="portrait of an old sailor")),
            "against": ("CLIPTextEncode", dict(clip=("clip", 0), text="glasses, hat, beard")),
            "nothing": ("ConditioningZeroOut", dict(conditioning=("prompt", 0))),
            "empty": ("EmptySD3LatentImage", dict(width=1024, height=1024, batch_size=1)),
            "steered": (
                "FastRoPE_NAG",
                {
                    **OURS["FastRoPE_NAG"], "model": ("model", 0), "positive": ("prompt", 0),
                    "negative": ("against", 0),
                },
            ),
            "sampler": (
                "KSampler",
                dict(
                    model=("steered", 0), positive=("steered", 1), negative=("nothing", 0), latent_image=("empty", 0),
                    seed=1, steps=4, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
                ),
            ),
            "decoded": ("VAEDecode", dict(samples=("sampler", 0), vae=("vae", 0))),
            "saved": ("SaveImage", dict(images=("decoded", 0), filename_prefix="fastrope")),
        },
        {
            "model": (0, 0), "clip": (0, 1), "vae": (0, 2), "prompt": (1, 1), "against": (1, 2), "steered": (2, 0),
            "nothing": (2, 1), "empty": (2, 2), "sampler": (3, 0), "decoded": (4, 0), "saved": (5, 0),
        },
    ),
    "high-resolution-flux": (
        "FLUX.1 at 2048 x 2048, twice its trained size",
        {
            **KONTEXT,
            "model": ("UNETLoader", dict(unet_name="flux1-dev.safetensors", weight_dtype="fp8_e4m3fn")),
            "prompt": ("CLIPTextEncode", dict(clip=("clip", 0), text="a market street at dawn, in great detail")),
            "guidance": ("FluxGuidance", dict(conditioning=("prompt", 0), guidance=3.5)),
            "nothing": ("ConditioningZeroOut", dict(conditioning=("prompt", 0))),
            "empty": ("EmptySD3LatentImage", dict(width=2048, height=2048, batch_size=1)),
            "steered": ("FastRoPE_HighResolution", {**OURS["FastRoPE_HighResolution"], "model": ("model", 0)}),
            "sampler": (
                "KSampler",
                dict(
                    model=("steered", 0), positive=("guidance", 0), negative=("nothing", 0), latent_image=("empty", 0),
                    seed=1, steps=28, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
                ),
            ),
            "decoded": ("VAEDecode", dict(samples=("sampler", 0), vae=("vae", 0))),
            "saved": ("SaveImage", dict(images=("decoded", 0), filename_prefix="fastrope")),
        },
        {
            "model": (0, 0), "clip": (0, 1), "vae": (0, 2), "steered": (1, 0), "prompt": (1, 1), "guidance": (2, 1),
            "nothing": (2, 2), "empty": (1, 2), "sampler": (3, 0), "decoded": (4, 0), "saved": (5, 0),
        },
    ),
    "inspect-flux-kontext": (
        "Where attention goes while GRAG is at work",
        {
            **_kontext("make it evening", "photo.png", "FastRoPE_GRAG", {}, model="watched"),
            "watched": (
                "FastRoPE_Inspect",
                {**OURS["FastRoPE_Inspect"], "model": ("steered", 0), "layers": "0, 9, 19, 38, 56"},
            ),
            "chart": ("FastRoPE_AttentionChart", dict(record=("watched", 1), latent=("sampler", 0))),
            "shown": ("PreviewImage", dict(images=("chart", 0))),
            "decoded": ("VAEDecode", dict(samples=("chart", 1), vae=("vae", 0))),
        },
        {**KONTEXT_PLACES, "watched": (3, 0), "chart": (5, 1), "shown": (6, 1), "decoded": (5, 0)},
    ),
}  # fmt: skip
