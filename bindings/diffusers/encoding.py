"""Pictures as latents of a pipeline."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from fastrope.checks import is_whole, require
from fastrope.pictures import rgb

AREA = 1024**2  # pixels, at most, of a picture without a height and width of the user


def as_pictures(image: Any) -> Any:
    """One or several pictures as a list of PIL pictures in RGB, or as a tensor ``(R, 3, H, W)`` in 0..1.

    Raises:
        ValueError: no picture, pictures of several kinds, tensors of another shape or range.
    """
    several = list(image) if isinstance(image, (list, tuple)) else [image]
    require(len(several) > 0, "image", "at least one picture", "none")
    if all(isinstance(x, torch.Tensor) for x in several):
        shapes = [tuple(x.shape) for x in several]
        ok = all(x.ndim in (3, 4) and x.shape[-3] == 3 for x in several) and len({s[-2:] for s in shapes}) == 1
        require(ok, "image", "tensors (3, H, W) or (R, 3, H, W) of one size", shapes)
        low, high = (float(f(torch.stack([f(x) for x in several]))) for f in (torch.min, torch.max))
        require(low >= 0 and high <= 1, "image", "values in 0..1", f"{low:g}..{high:g}")
        return torch.cat([x if x.ndim == 4 else x[None] for x in several])
    from PIL import Image

    kinds = sorted({type(x).__name__ for x in several})
    require(all(isinstance(x, Image.Image) for x in several), "image", "PIL pictures or tensors", kinds)
    return [rgb("image", x) for x in several]


def picture_size(pipe: Any, pictures: Any, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """Height and width of a reference, in pixels.

    Args:
        pictures: PIL pictures, of which the first counts, or a tensor ``(R, 3, H, W)``.
        height, width: returned as they are if both are given. One alone keeps the proportions. Without them, the size
            is the picture's own, reduced to at most :data:`AREA`. The result is cut to multiples of what the pipeline
            packs into a token.

    Raises:
        ValueError: a height or width that is no positive integer.
    """
    for name, size in (("height", height), ("width", width)):
        require(size is None or (is_whole(size) and size > 0), name, "a positive number of pixels", repr(size))
    if height is not None and width is not None:
        return height, width
    if isinstance(pictures, torch.Tensor):
        rows, columns = pictures.shape[-2:]
    else:
        columns, rows = pictures[0].size
    if height is not None:
        factor = height / rows
    else:
        factor = width / columns if width is not None else min(1.0, math.sqrt(AREA / (rows * columns)))
    multiple = 2 * pipe.vae_scale_factor
    rows, columns = (max(multiple, int(n * factor + 1e-6) // multiple * multiple) for n in (rows, columns))
    return rows, columns


@torch.no_grad()
def encode(pipe: Any, pictures: Any, height: int, width: int) -> torch.Tensor:
    """Latents of pictures, scaled and packed as in the pipeline's loop. They are the mode of the VAE's distribution.

    Args:
        pictures: what the pipeline's image processor takes: a list of PIL pictures, or a tensor in 0..1.

    Returns:
        ``(R, tokens, C)`` packed; for Z-Image ``(R, C, rows, columns)``.

    Raises:
        NotImplementedError: a VAE that none of the hosts has.
    """
    mode = {} if isinstance(pictures, torch.Tensor) else {"resize_mode": "crop"}
    pixels = pipe.image_processor.preprocess(pictures, height=height, width=width, **mode)
    vae = pipe.vae
    pixels = pixels.to(pipe._execution_device, vae.dtype)
    config = vae.config
    if hasattr(vae, "bn"):  # FLUX.2: patches normalised by the statistics of a batch norm
        latents = pipe._encode_vae_image(pixels, generator=None)
    elif getattr(config, "latents_mean", None) is not None:  # Qwen-Image: a video VAE
        mean, std = (
            torch.tensor(x, device=pixels.device, dtype=pixels.dtype).view(1, -1, 1, 1, 1)
            for x in (config.latents_mean, config.latents_std)
        )
        latents = (_mode_of(vae.encode(pixels.unsqueeze(2))) - mean) / std
    elif hasattr(config, "scaling_factor"):
        shift = getattr(config, "shift_factor", None) or 0.0
        latents = (_mode_of(vae.encode(pixels)) - shift) * config.scaling_factor
    else:
        raise NotImplementedError(
            f"pipe.vae: expected that of FLUX, FLUX.2 or Qwen-Image, received {type(vae).__name__}"
        )
    pack = getattr(pipe, "_pack_latents", None)
    if pack is None:
        return latents
    if len(inspect.signature(pack).parameters) == 1:
        return pack(latents)
    channels = latents.shape[1]
    return pack(latents, len(latents), channels, *latents.shape[-2:])


def _mode_of(encoded: Any) -> torch.Tensor:
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded[0] if isinstance(encoded, tuple) else encoded.latents
