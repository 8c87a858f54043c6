"""What :mod:`.trajectories` and :mod:`.steering` do with a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


def second_pipeline(pipe: Any, latents: Callable[..., torch.Tensor], **attributes: Any) -> Any:
    """A pipeline on the same models, which starts from other latents.

    Args:
        pipe: the first pipeline. It does not change, and it alone frees the hooks of offloading.
        latents: ``latents(prepared, arguments)``, what the loop starts from: given the latents that the pipeline
            itself prepared, and the arguments of its ``prepare_latents`` by name.
        attributes: that differ from the first pipeline's.
    """
    kind = type(pipe)
    signature = inspect.signature(kind.prepare_latents)

    class Second(kind):
        def prepare_latents(self, *args: Any, **kwargs: Any):
            prepared = super().prepare_latents(*args, **kwargs)
            named = signature.bind(self, *args, **kwargs).arguments
            if isinstance(prepared, tuple):
                return latents(prepared[0], named), *prepared[1:]
            return latents(prepared, named)

        def maybe_free_model_hooks(self):
            """The first pipeline does it."""

    second = object.__new__(Second)
    second.__dict__.update(pipe.__dict__, **attributes)
    return second


def require_euler(pipe: Any, purpose: str) -> None:
    """Require the scheduler whose step is ``x + (sigma' - sigma) v``.

    Raises:
        NotImplementedError: another scheduler.
    """
    kind = type(getattr(pipe, "scheduler", None)).__name__
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise NotImplementedError(
            f"pipe.scheduler: expected FlowMatchEulerDiscreteScheduler {purpose}, received {kind}"
        )
