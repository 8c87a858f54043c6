"""Section 4: a tiny FLUX Kontext pipeline, offline and untrained, under every modulation and backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import fastrope as fr

from . import scene as scenes
from .probe import smooth_noise
from .tiny import AXES, CHANNELS, JOINT, pipeline, quiet
from .untwisting import head_weights

# LooseRoPE's five levels, least salient first (range factor, crop factor); see the paper's code, steps 0 to 10.
RANGE_FACTORS = (0.6503, 0.6603, 0.8250, 0.9897, 0.9997)
CROP_FACTORS = (0.6500, 0.6510, 0.9975, 1.3440, 1.3450)
BOOST = 0.83
S_HF, S_LF, BETA = 0.75, 1.40, 2.0  # Untwisting RoPE at the end of its schedule
BIAS, DELTA = 1.0, 1.10  # GRAG's demo

NAMES = ("none", "QueryScale", "BandWeight", "BiasDelta", "LogitGain", "all four")


@dataclass(frozen=True)
class Settings:
    """One run: picture size in pixels (two per token and side), steps, text tokens and seed."""

    pixels: int = 32
    steps: int = 4
    text: int = 8
    seed: int = 0

    @property
    def grid(self) -> int:
        """Tokens per side of the target and of the reference."""
        return self.pixels // 2

    @property
    def layout(self) -> fr.TokenLayout:
        """The joint sequence [text, target, reference]."""
        return fr.TokenLayout(text=self.text, target=(self.grid, self.grid), references=[(self.grid, self.grid)])


def recipes(settings: Settings, device: torch.device) -> dict[str, tuple]:
    """The modulations of each name in :data:`NAMES`, on the joint sequence."""
    layout, grid = settings.layout, settings.grid
    target, reference = layout.target, layout.reference(0)
    mask, level = crop_levels(scenes.draw_scene(), grid)
    scale, gain = (torch.ones(len(layout), dtype=torch.float64) for _ in range(2))
    scale[target] = torch.where(mask, torch.tensor(RANGE_FACTORS, dtype=torch.float64)[level], 1.0)
    gain[target] = torch.where(mask, torch.tensor(CROP_FACTORS, dtype=torch.float64)[level], 1.0)
    pasted = torch.zeros(len(layout), dtype=torch.bool)
    pasted[reference] = mask
    weight = head_weights(AXES, S_HF, S_LF, BETA)
    single = {
        "QueryScale": fr.QueryScale(scale.to(device), keys=reference, axes=(1, 2)),
        "BandWeight": fr.BandWeight(weight.to(device), keys=reference),
        "BiasDelta": fr.BiasDelta(BIAS, DELTA, keys=reference),
        "LogitGain": fr.LogitGain(gain.to(device), keys=pasted.to(device)),
    }
    return {"none": (), **{name: (m,) for name, m in single.items()}, "all four": tuple(single.values())}


def crop_levels(scene: scenes.Scene, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The dilated crop ``(grid * grid,)`` bool and the saliency level 0..4 of every token."""
    saliency = (scenes.saliency(scene, grid) * BOOST).clamp(0, 1)
    levels = len(RANGE_FACTORS)
    return scenes.mask_tokens(scene, grid), (saliency * levels).long().clamp(max=levels - 1)


def run(
    settings: Settings,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    names: tuple[str, ...] = NAMES,
    wrap: Callable[[tuple[str, ...]], Iterator[str]] = iter,
) -> dict[str, torch.Tensor]:
    """Run the pipeline once per name.

    Args:
        backend: of :func:`fastrope.apply`; ``"host"`` runs diffusers' own attention and FastRoPE not at all.
        names: of :func:`recipes`.
        wrap: progress bar around the names.

    Returns:
        name -> final latents ``(3, pixels, pixels)``, pixels in -1..1, CPU float64.
    """
    pipe = pipeline(settings.seed, device, dtype)
    call = _inputs(settings, device, dtype)
    modulations = recipes(settings, device)
    results = {}
    for name in wrap(names):
        bound = contextlib.nullcontext() if backend == "host" else fr.apply(pipe, *modulations[name], backend=backend)
        with bound, quiet():
            latents = pipe(**call, output_type="latent").images
        latents = pipe._unpack_latents(latents, settings.pixels, settings.pixels, pipe.vae_scale_factor)
        results[name] = latents[0].double().cpu()
    return results


def _inputs(settings: Settings, device, dtype) -> dict:
    """Arguments of the pipeline: the composite, random embeddings as the prompt, blurred noise to start from."""
    from PIL import Image

    generator = torch.Generator().manual_seed(settings.seed + 1)
    pixels = scenes.at_size(scenes.draw_scene(), settings.pixels)
    image = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
    noise = 0.5 * smooth_noise((3, settings.pixels, settings.pixels), settings.pixels / 16, generator)[None]
    side = settings.grid
    noise = noise.view(1, 3, side, 2, side, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, side * side, CHANNELS)
    return dict(
        image=image, latents=noise.to(device, dtype), height=settings.pixels, width=settings.pixels,
        max_area=settings.pixels**2, _auto_resize=False, num_inference_steps=settings.steps, guidance_scale=2.5,
        prompt_embeds=torch.randn(1, settings.text, JOINT, generator=generator).to(device, dtype),
        pooled_prompt_embeds=torch.randn(1, JOINT, generator=generator).to(device, dtype),
    )  # fmt: skip
