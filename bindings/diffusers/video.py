"""Video transformers. Their positions can be rescaled; their attention is not modulated."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

import fastrope as fr
from fastrope.activity import flat_methods
from fastrope.checks import require
from fastrope.rescaling import Rescaling, rescaling_of

from ..image.fingerprints import Memo
from .embedders import Embedder, RescaledTables
from .parallel import context_parallel
from .steps import Step, find_sigma, find_step, running_pipeline


@dataclass(frozen=True)
class VideoHost:
    """A video transformer with axes of frames, rows and columns.

    Args:
        embedder: makes the rotary table from latents ``(B, C, frames, rows, columns)``.
        patch: reads the number of latents per token on each axis from the model.
        axes_dim, theta: read the RoPE from the model.
    """

    embedder: Callable[[Any], Embedder]
    patch: Callable[[Any], tuple[int, int, int]]
    axes_dim: Callable[[Any], tuple[int, ...]]
    theta: Callable[[Any], float]


def _raster(patch: tuple[int, int, int]) -> Callable[..., tuple[Tensor]]:
    """Positions of all tokens of latents, frame by frame, row by row."""

    def positions(hidden_states: Tensor) -> tuple[Tensor]:
        sides = [torch.arange(n // p, device=hidden_states.device) for n, p in zip(hidden_states.shape[2:], patch,
                                                                                     strict=True)]  # fmt: skip
        return (torch.cartesian_prod(*sides).view(-1, 3),)

    return positions


def _wan_patch(model: Any) -> tuple[int, int, int]:
    frames, rows, columns = model.config.patch_size
    return frames, rows, columns


def _hunyuan_patch(model: Any) -> tuple[int, int, int]:
    return model.config.patch_size_t, model.config.patch_size, model.config.patch_size


WAN = VideoHost(
    embedder=lambda model: Embedder("rope", _raster(_wan_patch(model))),
    patch=_wan_patch,
    axes_dim=lambda model: (model.rope.t_dim, model.rope.h_dim, model.rope.w_dim),
    theta=lambda model: 10_000.0,
)
HUNYUAN = VideoHost(
    embedder=lambda model: Embedder("rope", _raster(_hunyuan_patch(model))),
    patch=_hunyuan_patch,
    axes_dim=lambda model: tuple(model.config.rope_axes_dim),
    theta=lambda model: float(model.config.rope_theta),
)
VIDEO_HOSTS = {
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN,
    "HunyuanVideoTransformer3DModel": HUNYUAN,
}
# Weak on both sides, because the model's hooks hold the handle, which holds the model.
_BOUND: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[PositionHandle]] = weakref.WeakKeyDictionary()


def video_host(model: torch.nn.Module) -> VideoHost | None:
    """The row of a transformer; None if there is none."""
    names = [cls.__name__ for cls in type(model).__mro__ if cls.__module__.split(".")[0] == "diffusers"]
    return next((VIDEO_HOSTS[name] for name in names if name in VIDEO_HOSTS), None)


class PositionHandle:
    """Methods that rescale positions, bound to the transformers of a video pipeline. A context manager, which removes
    them at its end.

    Args:
        models: the transformers (Wan 2.2 has two), of one class.
        methods: flat.
        pipe: the pipeline that the handle was made for, if any.

    Raises:
        ValueError: a method that changes attention; a transformer that is bound already.
        NotImplementedError: a transformer that is compiled as a whole.
    """

    def __init__(self, models: list[torch.nn.Module], methods: tuple, pipe: Any = None) -> None:
        self._undo = contextlib.ExitStack()
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        self._local, self._memo, self._user_step = threading.local(), Memo(), None
        self._methods = _checked(methods)
        for model in models:
            require(model not in _BOUND, "pipe", "a transformer without a bound handle", "one with it")
        try:
            for model in models:
                self._install(model)
        except BaseException:
            self._undo.close()
            raise
        self.bound = True

    @property
    def methods(self) -> tuple:
        """The bound methods, flat."""
        return self._methods

    def update(self, *methods: Any) -> None:
        """Replace all methods, from the next call of a transformer on.

        Raises:
            ValueError: a method that changes attention, or a removed handle.
        """
        self._require_bound()
        self._methods = _checked(flat_methods(methods, "methods"))

    def set_step(self, step: int | None, num_steps: int = 50) -> None:
        """Set the denoising step that methods see, for calls outside of a pipeline. ``None``: find it out again.

        Raises:
            ValueError: a step outside ``[0, num_steps)``, or a removed handle.
        """
        self._require_bound()
        if step is not None:
            ok = isinstance(step, int) and isinstance(num_steps, int) and 0 <= step < num_steps
            require(ok, "step", f"an integer in [0, {num_steps})", repr(step))
        self._user_step = None if step is None else Step(step, num_steps)

    def inspect(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: attention is not bound here.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("inspect: expected a transformer whose attention is bound, received one of video, "
                                  "whose positions alone are")  # fmt: skip

    def remove(self) -> None:
        """Remove the hooks.

        Raises:
            ValueError: the handle was removed before.
        """
        self._require_bound()
        self.bound = False
        self._undo.close()

    def __enter__(self) -> PositionHandle:
        self._require_bound()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bound:
            self.remove()

    def _require_bound(self) -> None:
        require(self.bound, "handle", "a bound handle", "one that was removed already")

    def _install(self, model: torch.nn.Module) -> None:
        host = video_host(model)
        assert host is not None
        undo = self._undo
        wanted = lambda: getattr(self._local, "rescaling", None)  # noqa: E731
        tables = RescaledTables(host.embedder(model), model, host.axes_dim(model), host.theta(model), wanted)
        undo.callback(tables.remove)

        def before(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._local.rescaling = self._rescaling(module, host, args, kwargs)

        def after(module: torch.nn.Module, args: tuple, output: Any) -> None:
            self._local.rescaling = None

        undo.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(after, always_call=True).remove)
        _BOUND[model] = weakref.ref(self)
        undo.callback(_BOUND.pop, model, None)

    def _rescaling(
        self, model: torch.nn.Module, host: VideoHost, args: tuple, kwargs: dict[str, Any]
    ) -> Rescaling | None:
        """The rescaling of one call."""
        latents, timestep = (kwargs.get(name, args[n] if n < len(args) else None) for n, name in
                             enumerate(("hidden_states", "timestep")))  # fmt: skip
        require(isinstance(latents, Tensor) and latents.ndim == 5, "hidden_states",
                "latents (B, C, frames, rows, columns)", type(latents).__name__)  # fmt: skip
        # Wan 2.2 has one per token, and 0 for those of a given picture.
        time = timestep.amax().reshape(1) if isinstance(timestep, Tensor) else None
        running = running_pipeline(model) or _running_second(model)
        scheduler = getattr(self._pipe() if running is None else running, "scheduler", None)
        step = self._user_step or find_step(scheduler, time, _as_given, running is not None)
        step = step or Step(0, fr.Site.num_steps)
        _, rows, columns = (n // p for n, p in zip(latents.shape[2:], host.patch(model), strict=True))
        site = fr.Site(
            fr.TokenLayout(0, (rows, columns)), step=step.index, num_steps=step.count, axes_dim=host.axes_dim(model),
            theta=host.theta(model), temporal_axis=0, sigma=find_sigma(step, self._memo, time, _as_given),
        )  # fmt: skip
        found = rescaling_of(self._methods, site)
        if found is not None and context_parallel(model) is not None:
            raise NotImplementedError("context parallelism: expected no rescaled positions on a video transformer, "
                                      "which splits its rotary table")  # fmt: skip
        return found


def bind_video(target: Any, model: torch.nn.Module, methods: tuple) -> PositionHandle:
    """A handle on all transformers of a video pipeline, or on one transformer."""
    models = [model]
    if not isinstance(target, torch.nn.Module):
        second = getattr(target, "transformer_2", None)
        models = [m for m in (target.transformer, second) if m is not None]
    for each in models:
        if hasattr(each, "_orig_mod"):
            raise NotImplementedError("positions: expected a transformer that is not compiled as a whole; compile its "
                                      "blocks, with transformer.compile_repeated_blocks()")  # fmt: skip
    return PositionHandle(models, methods, None if isinstance(target, torch.nn.Module) else target)


def unbind_video(model: torch.nn.Module) -> bool:
    """Remove the handle of a video transformer; False if there is none."""
    found = _BOUND.get(model)
    handle = None if found is None else found()
    if handle is not None:
        handle.remove()
    return handle is not None


def _checked(methods: tuple) -> tuple:
    for m in methods:
        if isinstance(m, fr.At):
            _checked(m.what)
            continue
        expected = "methods that rescale positions (HighResolution, LongVideo) on a video transformer, whose attention "
        require(hasattr(m, "rescaling"), "methods", f"{expected}is not modulated", type(m).__name__)
    return methods


def _as_given(timesteps: Tensor) -> Tensor:
    return timesteps


def _running_second(model: torch.nn.Module) -> Any:
    return running_pipeline(model, "transformer_2")
