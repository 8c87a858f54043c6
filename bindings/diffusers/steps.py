"""Which denoising step a call belongs to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastrope.checks import require


def find_sigma(
    sigmas: list[float] | None,
    timestep: torch.Tensor | None,
    step: int,
    model_time: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """Noise level of a step: the scheduler's, or read off the timestep the model is given.

    Args:
        sigmas: of the scheduler, where the step is an index into them; None elsewhere.
        timestep: what the model was given.
        step: index of the step.
        model_time: the scheduler's timesteps as the model is given them, affine.

    Raises:
        ValueError: neither tells.
    """
    if sigmas is not None and step < len(sigmas):
        return sigmas[step]
    known = isinstance(timestep, torch.Tensor) and timestep.numel() > 0
    require(known, "timestep", "a tensor, as nothing else tells the noise level", type(timestep).__name__)
    clean, noise = (float(model_time(torch.tensor(t, dtype=torch.float64))) for t in (0.0, 1000.0))
    return (float(timestep.flatten()[0]) - clean) / (noise - clean)


def find_step(
    pipe, timestep: torch.Tensor | None, model_time: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[int, int] | None:
    """Index of the current step in the scheduler's timesteps, and their number.

    Inside the pipeline's loop the scheduler knows the index, without a device synchronisation. Elsewhere (a pipeline
    that does not say whether it runs, another one that shares transformer and scheduler, a direct call) the timestep's
    value is looked up. None where both fail, and where the scheduler was never given steps or has made all of them:
    whoever calls then goes by another one.

    Args:
        timestep: what the model was given.
        model_time: the scheduler's timesteps as the model is given them.
    """
    scheduler = getattr(pipe, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        return None
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    count = len(timesteps)
    if index is not None and index < count and getattr(pipe, "_current_timestep", None) is not None:
        return int(index), count
    # Before they are given steps, schedulers hold those of their training.
    never = index is None and getattr(scheduler, "num_inference_steps", None) is None
    if never or (index is not None and index >= count) or not isinstance(timestep, torch.Tensor):
        return None
    dtype = timestep.dtype if timestep.is_floating_point() else torch.float32
    # The pipeline rounds to the model's dtype, then divides; the same here makes equal values equal.
    known = model_time(torch.as_tensor(timesteps).cpu().to(dtype)).double()
    distance = (known - timestep.flatten()[0].cpu().double()).abs()
    nearest = int(distance.argmin())
    if distance[nearest] > 1e-3:
        return None
    if index is not None and index < count and distance[index] == distance[nearest]:
        return int(index), count  # neighbours that half precision rounds to one value
    return nearest, count
