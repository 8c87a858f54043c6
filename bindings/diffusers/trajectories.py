"""A picture as the reference of shared attention: its latents at every noise level, and the transformer's arguments.

Nothing of a pipeline is written again here. A second pipeline on the same models runs the pipeline's own call with the
picture's latents in place of noise: it encodes the prompt, packs, makes ids and noise levels, and runs its loop. The
arguments of the first call of the transformer are the reference's. For an inversion the scheduler's noise levels rise.
"""

from __future__ import annotations

import copy
import functools
import inspect
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

from .encoding import as_pictures, encode, picture_size
from .hosts import Host, find_host
from .pipelines import require_euler, second_pipeline
from .processors import BoundProcessor

TRAJECTORIES = ("linear", "rf_inversion", "latents")


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
    wanted, unwanted = ("latents", "image") if trajectory == "latents" else ("image", "latents")
    require(given[wanted] is not None, wanted, f"a value, for trajectory {trajectory!r}", None)
    received = type(given[unwanted]).__name__
    require(given[unwanted] is None, unwanted, f"None, for trajectory {trajectory!r}", received)
    called: Any = getattr(pipe, "transformer", None)
    require(isinstance(called, torch.nn.Module), "pipe", "a diffusers pipeline with a transformer", type(pipe).__name__)
    host = find_host(getattr(called, "_orig_mod", called))
    _check_pipeline(pipe)
    pictures = None if image is None else as_pictures(image)
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
        path: Any = latents if callable(latents) else _of_steps(latents, walk)
    elif inverting:
        path = PathTrajectory(walk.sigmas, [walk.as_input(z) for z in walk.points], walk.hidden.dtype)
    else:
        path = LinearTrajectory(walk.as_input(walk.clean), walk.as_input(walk.noise), walk.hidden.dtype)
    return fr.Reference(path, walk.arguments)


class _Read(Exception):
    """The transformer's first call was seen, and nothing more is wanted."""


class _Walk:
    """The pipeline's call with the picture's latents in place of noise.

    Args:
        pictures: PIL pictures or a tensor ``(R, 3, H, W)``; None keeps the noise.
        gamma: of the inversion; None stops before the model runs.

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
        self.thread = threading.get_ident()  # other threads may run the same transformer meanwhile

    def run(self, call: dict) -> None:
        """Run the pipeline's call once."""
        transformer = self.pipe.transformer
        # First, so that a handle's hook does not take the call for a target's.
        hook = transformer.register_forward_pre_hook(torch.compiler.disable(self._see), with_kwargs=True, prepend=True)
        changes = {"scheduler": self._scheduler()}
        if self.gamma is None:
            changes["_progress_bar_config"] = {"disable": True}  # the run stops at once
        try:
            second_pipeline(self.pipe, self._encode, **changes)(**call)
        except _Read:
            pass
        finally:
            hook.remove()
            self.pipe.maybe_free_model_hooks()

    def as_input(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of the loop in the layout that the transformer takes; those of Z-Image get an axis of frames."""
        return latents.unsqueeze(2) if latents.ndim == 4 else latents

    def _encode(self, noise: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        """Latents of the pictures, in place of the pipeline's noise."""
        self.noise = self.clean = noise
        if self.pictures is not None:
            clean = encode(self.pipe, self.pictures, arguments["height"], arguments["width"])
            same = clean.shape == noise.shape
            require(same, "image", f"latents {tuple(noise.shape)}, as the pipeline's own", tuple(clean.shape))
            self.clean = clean.to(noise)
        return self.clean

    def _see(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """Store the arguments of the transformer's first call."""
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
    def step_sigmas(self) -> list[float] | None:
        """Noise levels of the steps of the call; None if the scheduler does not tell."""
        sigmas, timesteps = (getattr(self.scheduler, name, None) for name in ("sigmas", "timesteps"))
        return None if sigmas is None or timesteps is None else sigmas[: len(timesteps)].tolist()

    # ---- inversion --------------------------------------------------------------------------------------------------

    def _scheduler(self) -> Any:
        """A copy of the pipeline's scheduler. For an inversion its noise levels rise, and :meth:`_step` makes its
        steps."""
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
        if not self.points:
            self.points.append(_wide(self.clean))
        done = len(self.points) - 1
        z, noise = self.points[-1], _wide(self.noise)
        z = rf_step(z, model_output.to(z), noise, self.sigmas[done], self.sigmas[done + 1], cast(float, self.gamma))
        self.points.append(z)
        return (z.to(sample.dtype),)


def _arguments_of(pipe: Any, transformer: Any, call: dict, rows: int) -> dict[str, Any]:
    """Arguments of the pipeline's call for ``rows`` pictures; 0 if the call itself says how many."""
    known = inspect.signature(type(pipe).__call__).parameters
    for name in call:
        fits = name in known and name not in ("output_type", "return_dict", "callback_on_step_end")
        require(fits, "call", f"arguments of {type(pipe).__name__} that describe the reference", repr(name))
    call = {name: value for name, value in call.items() if value is not None}
    if call.get("prompt") is None and call.get("prompt_embeds") is None:
        call["prompt"] = ""
    if isinstance(call.get("prompt"), str) and rows > 1:
        call["prompt"] = [call["prompt"]] * rows
    for name in ("prompt", "prompt_embeds"):
        several = call.get(name)
        if rows and several is not None and not isinstance(several, str):
            require(len(several) == rows, name, f"{rows} rows, one per picture", len(several))
    # If the model has no distilled guidance, this argument means a second pass with an empty prompt.
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
            f"pipe: expected a text-to-image pipeline, received {type(pipe).__name__}; make one of the same models, "
            "such as FluxPipeline(**parts) or QwenImagePipeline(**parts), with those parts of pipe.components that it "
            "takes"
        )


def _check_inversion(pipe: Any, transformer: Any) -> None:
    require_euler(pipe, "for an inversion")
    bound = any(isinstance(getattr(m, "processor", None), BoundProcessor) for m in transformer.modules())
    require(not bound, "pipe", "a pipeline without bound methods: prepare the reference before fr.apply", "a bound one")


def _of_steps(latents: Any, walk: _Walk) -> Callable:
    """The user's latents, one tensor per step, as the transformer takes them."""
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
    sigmas = walk.step_sigmas
    if sigmas is not None:
        expected = f"{len(sigmas)}, one per step (num_inference_steps)"
        require(len(found) == len(sigmas), "latents", expected, len(found))
    return StepTrajectory(found, walk.hidden.dtype, sigmas)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
