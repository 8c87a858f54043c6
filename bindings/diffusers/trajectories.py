"""A picture as the reference of shared attention: its latents at every noise level, and what the transformer is told.

Nothing of a pipeline is written anew. A second pipeline on the same models goes through the pipeline's own call with
the picture's latents in place of noise: it encodes the prompt, packs, makes ids and noise levels, runs its loop. What
it would tell the transformer is read off the first call. For an inversion its scheduler walks upwards.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

import fastrope as fr
from fastrope.checks import require
from fastrope.methods.trajectories import (
    GAMMA,
    LinearTrajectory,
    PathTrajectory,
    StepTrajectory,
    require_gamma,
    require_sigmas,
    rf_step,
)
from fastrope.pictures import rgb

from .hosts import Host, find_host
from .processors import BoundProcessor

TRAJECTORIES = ("linear", "rf_inversion", "latents")
AREA = 1024**2  # pixels, at most, of a reference whose size nobody names


def prepare_reference(
    pipe: Any,
    image: Any = None,
    trajectory: str = "linear",
    *,
    latents: Any = None,
    gamma: float = GAMMA,
    height: int | None = None,
    width: int | None = None,
    **call: Any,
) -> fr.Reference:
    """See :func:`fastrope.prepare_reference`."""
    require(trajectory in TRAJECTORIES, "trajectory", f"one of {TRAJECTORIES}", repr(trajectory))
    require_gamma(gamma)
    given = {"image": image, "latents": latents}
    wanted = "latents" if trajectory == "latents" else "image"
    require(given[wanted] is not None, wanted, f"something, for trajectory {trajectory!r}", None)
    other = "image" if wanted == "latents" else "latents"
    require(given[other] is None, other, f"None, for trajectory {trajectory!r}", type(given[other]).__name__)
    called: Any = getattr(pipe, "transformer", None)
    require(isinstance(called, torch.nn.Module), "pipe", "a diffusers pipeline with a transformer", type(pipe).__name__)
    host = find_host(getattr(called, "_orig_mod", called))
    _check_pipeline(pipe)
    pictures = None if image is None else _pictures(pipe, image)
    if pictures is not None:
        height, width = picture_size(pipe, pictures, height, width)
        require(getattr(pipe, "vae", None) is not None, "pipe.vae", "a VAE that encodes the image", None)
    inverting = trajectory == "rf_inversion"
    if inverting:
        _check_inversion(pipe, called)
    rows = 0 if pictures is None else len(pictures)
    call = _arguments_of(pipe, called, {"height": height, "width": width, **call}, rows)
    walk = _Walk(pipe, host, pictures, gamma if inverting else None)
    walk.run(call)
    if trajectory == "latents":
        path: Any = latents if callable(latents) else _own(latents, walk)
    elif inverting:
        path = PathTrajectory(walk.sigmas, [walk.as_input(z) for z in walk.points], walk.hidden.dtype)
    else:
        path = LinearTrajectory(walk.as_input(walk.clean), walk.as_input(walk.noise), walk.hidden.dtype)
    return fr.Reference(path, walk.arguments)


class _Read(Exception):
    """The transformer's first call was seen; nothing more is wanted."""


class _Walk:
    """The pipeline's call with the picture's latents in place of noise.

    Args:
        pictures: PIL pictures or a tensor ``(R, 3, H, W)``; None leaves the noise.
        gamma: of the inversion; None stops before the model.

    After :meth:`run`: ``clean`` and ``noise`` as ``prepare_latents`` gives them, ``hidden`` and ``arguments`` of the
    transformer's first call, the ``scheduler`` as the call left it, ``sigmas`` and ``points`` of the inversion, rising.
    """

    def __init__(self, pipe: Any, host: Host, pictures: Any, gamma: float | None) -> None:
        self.pipe, self.host, self.pictures, self.gamma = pipe, host, pictures, gamma
        self.clean: Any = None
        self.noise: Any = None
        self.hidden: Any = None
        self.scheduler: Any = None
        self.arguments: Mapping[str, Any] = {}
        self.sigmas: tuple[float, ...] = ()
        self.points: list[torch.Tensor] = []
        self.thread = threading.get_ident()  # others may run the same transformer meanwhile

    def run(self, call: dict) -> None:
        """Go through the pipeline's call once."""
        transformer = self.pipe.transformer
        # Before a handle's hook, which would take the call for one of a target's.
        hook = transformer.register_forward_pre_hook(torch.compiler.disable(self._see), with_kwargs=True, prepend=True)
        try:
            self._second()(**call)
        except _Read:
            pass
        finally:
            hook.remove()
            self.pipe.maybe_free_model_hooks()

    def as_input(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of the loop in the layout that the transformer takes; Z-Image's gain an axis of frames."""
        return latents.unsqueeze(2) if latents.ndim == 4 else latents

    def _second(self):
        """A pipeline on the same models, whose latents and scheduler are ours."""
        walk, kind = self, type(self.pipe)
        signature = inspect.signature(kind.prepare_latents)

        class Second(kind):
            def prepare_latents(self, *args: Any, **kwargs: Any):
                prepared = super().prepare_latents(*args, **kwargs)
                named = signature.bind(self, *args, **kwargs).arguments
                noise = prepared[0] if isinstance(prepared, tuple) else prepared
                clean = walk._encode(noise, named["height"], named["width"])
                return (clean, *prepared[1:]) if isinstance(prepared, tuple) else clean

            def maybe_free_model_hooks(self):
                """The first pipeline does it."""

        second = object.__new__(Second)
        second.__dict__.update(self.pipe.__dict__)
        second.__dict__["scheduler"] = self._scheduler()
        if self.gamma is None:  # a bar that would stop at nothing
            second.__dict__["_progress_bar_config"] = {"disable": True}
        return second

    def _encode(self, noise: torch.Tensor, height: int, width: int) -> torch.Tensor:
        self.noise = self.clean = noise
        if self.pictures is not None:
            clean = encode(self.pipe, self.pictures, height, width)
            same = clean.shape == noise.shape
            require(same, "image", f"latents {tuple(noise.shape)}, as the pipeline's own", tuple(clean.shape))
            self.clean = clean.to(noise)
        return self.clean

    def _see(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """What the transformer is told, at its first call."""
        if self.hidden is not None or threading.get_ident() != self.thread:
            return
        model = getattr(module, "_orig_mod", module)
        told = dict(inspect.signature(type(model).forward).bind_partial(module, *args, **kwargs).arguments)
        hidden = told.pop(self.host.hidden)
        self.hidden = torch.stack(hidden) if isinstance(hidden, (list, tuple)) else hidden
        expected = tuple(self.as_input(self.clean).shape)
        advice = "no image of a native reference and no classifier-free guidance in one batch"
        require(tuple(self.hidden.shape) == expected, "call", f"latents {expected} for the transformer: {advice}",
                tuple(self.hidden.shape))  # fmt: skip
        left_out = ("self", "return_dict", self.host.timestep)
        self.arguments = {
            name: value
            for name, value in told.items()
            if value is not None and name not in left_out and not name.endswith("_kwargs")
        }
        if self.gamma is None:
            raise _Read

    @property
    def levels(self) -> list[float] | None:
        """Noise levels of the steps of the call; None where the scheduler does not tell."""
        sigmas, timesteps = (getattr(self.scheduler, name, None) for name in ("sigmas", "timesteps"))
        return None if sigmas is None or timesteps is None else sigmas[: len(timesteps)].tolist()

    # ---- upwards ----------------------------------------------------------------------------------------------------

    def _scheduler(self):
        """A copy of the pipeline's, whose noise levels rise."""
        scheduler = self.scheduler = copy.deepcopy(self.pipe.scheduler)
        if self.gamma is None:
            return scheduler
        set_timesteps = scheduler.set_timesteps

        @functools.wraps(set_timesteps)  # pipelines ask for its signature
        def set_rising(*args: Any, **kwargs: Any):
            set_timesteps(*args, **kwargs)
            rising = scheduler.sigmas.flip(0)
            self.sigmas = tuple(rising.tolist())
            require_sigmas("pipe.scheduler", self.sigmas)
            scheduler.sigmas = rising
            scheduler.timesteps = (rising[:-1] * scheduler.config.num_train_timesteps).to(scheduler.timesteps)

        scheduler.set_timesteps = set_rising
        scheduler.step = self._step
        return scheduler

    def _step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any):
        """In place of the scheduler's."""
        if not self.points:
            self.points.append(_wide(self.clean))
        done = len(self.points) - 1
        z, noise = self.points[-1], _wide(self.noise)
        z = rf_step(z, model_output.to(z), noise, self.sigmas[done], self.sigmas[done + 1], cast(float, self.gamma))
        self.points.append(z)
        return (z.to(sample.dtype),)


# ---- pictures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(pipe: Any, pictures: Any, height: int, width: int) -> torch.Tensor:
    """Latents of pictures, scaled and packed as the pipeline's loop has them.

    Args:
        pictures: what the pipeline's image processor takes: a list of PIL pictures, or a tensor in 0..1.

    Returns:
        ``(R, tokens, C)`` packed; for Z-Image ``(R, C, rows, columns)``. The most probable latents: nothing is drawn.

    Raises:
        NotImplementedError: a VAE that is not one of the hosts'.
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
        latents = (_most_probable(vae.encode(pixels.unsqueeze(2))) - mean) / std
    elif hasattr(config, "scaling_factor"):
        shift = getattr(config, "shift_factor", None) or 0.0
        latents = (_most_probable(vae.encode(pixels)) - shift) * config.scaling_factor
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


def _most_probable(encoded: Any) -> torch.Tensor:
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded[0] if isinstance(encoded, tuple) else encoded.latents


def _pictures(pipe: Any, image: Any):
    """A list of PIL pictures, or a tensor ``(R, 3, H, W)``."""
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
    """Rows and columns of pixels that a reference has unless told otherwise.

    Args:
        pictures: PIL pictures, of which the first counts, or a tensor ``(R, 3, H, W)``.
        height, width: as they are where both are given; one alone keeps the proportions; without them the picture's own
            size, made smaller to :data:`AREA` at most. Cut to multiples of what the pipeline packs into a token.

    Raises:
        ValueError: a height or width that is no positive integer.
    """
    for name, size in (("height", height), ("width", width)):
        ok = size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0)
        require(ok, name, "a positive number of pixels", repr(size))
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


# ---- the call --------------------------------------------------------------------------------------------------------


def _arguments_of(pipe: Any, transformer: Any, call: dict, rows: int) -> dict[str, Any]:
    """Arguments of the pipeline's call for ``rows`` pictures; 0 where that is the call's own business."""
    known = inspect.signature(type(pipe).__call__).parameters
    for name in call:
        fits = name in known and name not in ("output_type", "return_dict", "callback_on_step_end")
        require(fits, "call", f"arguments of {type(pipe).__name__} that say something of the reference", repr(name))
    call = {name: value for name, value in call.items() if value is not None}
    if call.get("prompt") is None and call.get("prompt_embeds") is None:
        call["prompt"] = ""
    if isinstance(call.get("prompt"), str) and rows > 1:
        call["prompt"] = [call["prompt"]] * rows
    for name in ("prompt", "prompt_embeds"):
        several = call.get(name)
        if rows and several is not None and not isinstance(several, str):
            require(len(several) == rows, name, f"{rows} rows, one per picture", len(several))
    # Where the model has no distilled guidance, the argument means a second pass with an empty prompt.
    distilled = getattr(getattr(transformer, "_orig_mod", transformer).config, "guidance_embeds", False)
    scale = known.get("guidance_scale")
    if scale is not None and scale.default is not None and not distilled:
        call.setdefault("guidance_scale", 0.0)
    if "enable_prompt_rewrite" in known:
        call.setdefault("enable_prompt_rewrite", False)
    return {**call, "output_type": "latent", "return_dict": False}


def _check_pipeline(pipe: Any) -> None:
    known = inspect.signature(type(pipe).__call__).parameters
    wants = [name for name in ("strength", "mask_image", "control_image") if name in known]
    if wants or type(pipe).__name__.startswith("QwenImageEdit"):
        raise NotImplementedError(
            f"pipe: expected a pipeline that draws from a prompt alone, received {type(pipe).__name__}; make one of "
            "the same models, such as FluxPipeline(**parts) or QwenImagePipeline(**parts), parts being those of "
            "pipe.components that it takes"
        )


def _check_inversion(pipe: Any, transformer: Any) -> None:
    scheduler = getattr(pipe, "scheduler", None)
    if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        raise NotImplementedError(
            "pipe.scheduler: expected FlowMatchEulerDiscreteScheduler for an inversion, received "
            f"{type(scheduler).__name__}"
        )
    bound = any(isinstance(getattr(m, "processor", None), BoundProcessor) for m in transformer.modules())
    require(not bound, "pipe", "one that no method is bound to: prepare the reference before fr.apply", "a bound one")


def _own(latents: Any, walk: _Walk) -> Callable:
    """The user's latents, each as the transformer takes them."""
    several = isinstance(latents, (Sequence, torch.Tensor)) and len(latents) > 0
    require(several, "latents", "one tensor per step, or a function (step, sigma)", type(latents).__name__)
    expected = tuple(walk.hidden.shape[1:])
    found = []
    for step, x in enumerate(latents):
        shaped = walk.as_input(x) if isinstance(x, torch.Tensor) else x
        fits = isinstance(shaped, torch.Tensor) and tuple(shaped.shape[1:]) == expected
        received = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        require(fits, f"latents[{step}]", f"(R, ...) of rows as the transformer takes them, {expected}", received)
        found.append(shaped)
    levels = walk.levels
    if levels is not None:
        expected = f"{len(levels)}, one per step (num_inference_steps)"
        require(len(found) == len(levels), "latents", expected, len(found))
    return StepTrajectory(found, walk.hidden.dtype, levels)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
