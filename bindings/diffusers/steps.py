"""Which denoising step a call belongs to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch

from fastrope.checks import require

from ..image.fingerprints import Memo, values_of


class Step(NamedTuple):
    """A step of a run.

    Args:
        index, count: number of the step, from 0, and number of steps.
        scheduler: ``index`` counts in its timesteps; None if the user set the step, or nobody knows it.
    """

    index: int
    count: int
    scheduler: object | None = None


def running_pipeline(model: torch.nn.Module, name: str = "transformer") -> Any:
    """The pipeline whose call runs the transformer, from this thread's call stack; None if there is none.

    Args:
        name: of the pipeline's attribute that holds the transformer.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",) and code.co_argcount:
            owner = _owner(frame)
            called = getattr(owner, name, None)
            if called is not None and getattr(called, "_orig_mod", called) is model:
                return owner
        frame = frame.f_back
    return None


def _owner(frame: FrameType):
    """The object whose method a frame runs."""
    values = frame.f_locals
    owner = values.get("self")
    # Before Python 3.13 the frame keeps this dict, and so tensors that the method no longer uses. Nobody else reads it
    # unless the method itself has called locals().
    if type(values) is dict and sys.getrefcount(values) <= 3:
        values.clear()
    return owner


def find_sigma(
    step: Step,
    memo: Memo,
    timestep: torch.Tensor | None,
    model_time: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """Noise level of a step: the scheduler's, or the one that belongs to the model's timestep.

    Args:
        memo: remembers the scheduler's noise levels.
        timestep: the timestep that the model was given.
        model_time: turns the scheduler's timesteps into the model's; affine.

    Raises:
        ValueError: there is neither.
    """
    sigmas = getattr(step.scheduler, "sigmas", None)
    known = memo(values_of, sigmas) if isinstance(sigmas, torch.Tensor) else []
    if step.index < len(known):
        return known[step.index]
    told = isinstance(timestep, torch.Tensor) and timestep.numel() > 0
    require(told, "timestep", "a tensor, since the noise level is unknown otherwise", type(timestep).__name__)
    ends = torch.tensor([0.0, 1000.0], dtype=torch.float64, device="cpu")
    clean, noise = model_time(ends).tolist()
    return (float(timestep.flatten()[0]) - clean) / (noise - clean)


def find_step(
    scheduler: Any, timestep: torch.Tensor | None, model_time: Callable[[torch.Tensor], torch.Tensor], running: bool
) -> Step | None:
    """The current step among the scheduler's timesteps.

    In its pipeline's call the scheduler knows the index, without a device synchronisation. Elsewhere (in a loop of the
    user's, or in the first step of pipelines that set no begin index) the value of the timestep is looked up. None if
    both fail, and if the scheduler has no steps yet or has done all of them: then another scheduler is at work.

    Args:
        timestep: the timestep that the model was given.
        model_time: turns the scheduler's timesteps into the model's.
        running: True if the scheduler's pipeline runs the model.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        return None
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    count = len(timesteps)
    if running and index is not None and index < count:
        return Step(int(index), count, scheduler)
    # Before set_timesteps, schedulers hold the steps of their training.
    never = index is None and getattr(scheduler, "num_inference_steps", None) is None
    if never or (index is not None and index >= count) or not isinstance(timestep, torch.Tensor):
        return None
    dtype = timestep.dtype if timestep.is_floating_point() else torch.float32
    # The pipeline rounds to the model's dtype and then divides. The same order here gives equal values.
    known = model_time(torch.as_tensor(timesteps, device="cpu").to(dtype)).double()
    distance = (known - timestep.flatten()[0].cpu().double()).abs()
    nearest = int(distance.argmin())
    if distance[nearest] > 1e-3:
        return None
    if index is not None and index < count and distance[index] == distance[nearest]:
        nearest = int(index)  # half precision rounds neighbours to one value
    return Step(nearest, count, scheduler)
