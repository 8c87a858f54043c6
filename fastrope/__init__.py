"""FastRoPE: attention with first-class modulations.

``attention`` is the op; ``QueryScale``, ``BandWeight``, ``BiasDelta``, ``LogitGain``, ``LogitBias``, ``KeyBias`` and
``ValueGain`` are what it can be told; ``plan`` does the host work once; ``explain`` says what would run; ``apply``
binds modulations to a diffusers pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .activity import At
from .api import attention, explain
from .islock import ISLock
from .joint import Norm, Stream, joint_attention
from .methods import GRAG, NAG, HighResolution, LongVideo, LooseRoPE, UntwistingRoPE
from .methods.judges import MOVES as _MOVES
from .methods.trajectories import GAMMA as _GAMMA
from .modulations import BandWeight, BiasDelta, KeyBias, LogitBias, LogitGain, QueryScale, ValueGain
from .planning import Plan, plan
from .rope import RoPE
from .sharing import Reference, ReferenceCache
from .tokens import Site, TokenLayout

if TYPE_CHECKING:
    from .bindings.diffusers.handle import Handle
    from .bindings.diffusers.steering import Steered

__version__ = "0.1.0"

__all__ = [
    "GRAG", "NAG", "At", "BandWeight", "BiasDelta", "HighResolution", "ISLock", "KeyBias", "LogitBias", "LogitGain",
    "LongVideo", "LooseRoPE", "Norm", "Plan", "QueryScale", "Reference", "ReferenceCache", "RoPE", "Site", "Stream",
    "TokenLayout", "UntwistingRoPE", "ValueGain", "apply", "attention", "explain", "joint_attention", "plan",
    "prepare_reference", "remove", "steer",
]  # fmt: skip


def apply(pipe: Any, *methods: Any, backend: str = "auto", rotation: str = "op", reference: Any = None) -> Handle:
    """Bind methods and modulations to a diffusers pipeline or transformer, in place and on this instance alone.

    Args:
        pipe: a pipeline whose ``transformer`` is in the table of hosts (FLUX.1, Kontext, Chroma, FLUX.2, Qwen-Image and
            its editors, Z-Image and their kin), or the transformer itself, compiled or not.
        methods: modulations (QueryScale, BandWeight, BiasDelta ...) over the joint sequence of the model, and
            objects with ``modulations(site) -> list`` that are asked for every layer and step (:class:`fastrope.At`
            makes one of either, for some layers and steps); lists are flattened. Tensors may be on any device.
        backend: of :func:`fastrope.attention`, for the modulated layers.
        rotation: who rotates queries and keys in modulated layers: ``"op"`` hands them over as they come out of the QK
            norm, ``"host"`` after the host's own rotary embedding. Same result up to rounding (the host rotates in
            float32). Compiled layers always let the host rotate.
        reference: whom methods share attention with (:class:`fastrope.UntwistingRoPE`): a :class:`fastrope.Reference`,
            which joins every call as further rows of the batch, on the target's grid, or a
            :class:`fastrope.ReferenceCache` around one. It has its own text in all calls, also in those of a negative
            prompt.

    Returns:
        A :class:`fastrope.bindings.diffusers.Handle`: a context manager; ``remove()`` restores the very same
        processors, ``update(...)`` replaces the methods. Layers that nothing modulates run the host's own processor, to
        the same bits.

    Raises:
        ValueError: an unknown host, a host bound already, something that is neither modulation nor method.
        NotImplementedError: IP-Adapter, PAG, nunchaku, context parallelism, processors that are not the host's own.
    """
    from .bindings import apply as bind

    return bind(pipe, *methods, backend=backend, rotation=rotation, reference=reference)


def remove(pipe: Any) -> None:
    """Undo :func:`apply` where its handle was not kept: ``handle.remove()`` of whatever is bound to the transformer.

    Args:
        pipe: the pipeline or the transformer.

    Raises:
        ValueError: nothing is bound to it.
    """
    from .bindings import remove as unbind

    unbind(pipe)


def prepare_reference(
    pipe: Any,
    image: Any = None,
    trajectory: str = "linear",
    *,
    latents: Any = None,
    gamma: float = _GAMMA,
    height: int | None = None,
    width: int | None = None,
    **call: Any,
) -> Reference:
    """A picture, or several, as the reference that ``fr.apply(pipe, ..., reference=...)`` takes.

    Trajectories, that is what stands for the reference at the target's noise level sigma:

    * ``"linear"``: ``(1 - sigma) image + sigma noise`` with one noise for all steps. The model is not asked.
    * ``"rf_inversion"``: the picture carried up the scheduler's noise levels by the model (Euler),
      ``v = gamma v_model + (1 - gamma) (noise - z) / (1 - sigma)``; one call of the transformer per step. The target
      may have other noise levels than the reference (another size or number of steps): between two of its own the path
      is straight, as Euler's steps are.
    * ``"latents"``: your own, ``latents``: a tensor per step, or a function ``(step, sigma)``.

    Args:
        pipe: a text-to-image pipeline whose ``transformer`` is in the table of hosts, with its VAE.
        image: a PIL picture, a tensor ``(3, H, W)`` or ``(R, 3, H, W)`` in 0..1, or a list of pictures: R references,
            each of which every target sees. None for ``"latents"``.
        trajectory: ``"linear"``, ``"rf_inversion"`` or ``"latents"``.
        latents: for ``"latents"``: packed ``(R, tokens, C)`` per step as the transformer takes them (what
            ``callback_on_step_end`` hands out); for Z-Image ``(R, C, rows, columns)``. As many as the call has steps; a
            target whose noise levels are others is refused.
        gamma: for ``"rf_inversion"``: 1 follows the model alone, 0 is ``"linear"``.
        height, width: of the reference in pixels; by default the picture's own, made smaller to a megapixel at most and
            cut to what the pipeline can pack. A PIL picture of other proportions is cropped, a tensor stretched.
        call: further arguments of the pipeline's call, of the reference alone: ``prompt`` (what the picture shows;
            empty by default), ``prompt_embeds``, ``num_inference_steps``, ``sigmas``, ``guidance_scale``,
            ``generator``: one, or a list of R. The noise is the pipeline's own, so a target with the same seed and size
            starts from it. Classifier-free guidance is off unless asked for.

    Returns:
        A :class:`fastrope.Reference`; its ``latents`` is the trajectory of :mod:`fastrope.methods.trajectories`, in the
        dtype the transformer is given. ``pipe`` is as it was; its global generator has moved if none was given.

    Raises:
        ValueError: naming the argument; for ``"rf_inversion"`` also a pipeline that methods are bound to.
        NotImplementedError: a pipeline that cannot do without a picture of its own (Qwen-Image-Edit, image to image,
            inpainting, ControlNet), another VAE, for ``"rf_inversion"`` another scheduler than
            ``FlowMatchEulerDiscreteScheduler``.
    """
    from .bindings.diffusers.trajectories import prepare_reference as prepare

    own = dict(latents=latents, gamma=gamma, height=height, width=width)
    return prepare(pipe, image, trajectory, **own, **call)


def steer(
    pipe: Any,
    method: Any,
    judge: Callable | str | None = None,
    max_tries: int = 4,
    *,
    parameter: str = "boost",
    moves: Mapping[str, float] = _MOVES,
    ask_after: int = 2,
    composite: Any = None,
    beside: Sequence = (),
    backend: str = "auto",
    **call: Any,
) -> Steered:
    """Run a pipeline under a method, and start again with another value of its parameter where a judge is not content.

    After step ``ask_after`` (from 0) the one-step estimate ``x0 = x - sigma v`` is decoded by the pipeline itself,
    ``v`` being what its scheduler was given: guidance included. The judge sees the composite and the estimate. On
    success the run goes on to its end; otherwise the parameter moves and the run starts again from the same noise.
    After ``max_tries`` verdicts a last run follows that nobody is asked about.

    A run whose first verdict is success equals a run without steering, bit for bit. Nothing stays behind: method,
    processors, scheduler and generator are as before, after errors too.

    Args:
        pipe: a diffusers pipeline that :func:`fastrope.apply` can bind, with a ``FlowMatchEulerDiscreteScheduler``.
        method: a dataclass with ``modulations(site)`` and the parameter, :class:`fastrope.LooseRoPE`. It is not
            changed.
        judge: a function ``(composite, estimate) -> verdict`` of two PIL pictures (:mod:`fastrope.methods.judges`); the
            name of a vision-language chat model, which is then loaded
            (:class:`fastrope.bindings.transformers.judge.ChatJudge`); None compares the method's mask with its
            surroundings (:class:`fastrope.methods.judges.RegionJudge`). An answer that cannot be read counts as
            success.
        max_tries: verdicts at most, at least 0.
        parameter: the number to move.
        moves: what each verdict but success adds to it, by default that of the authors' code; the result is never
            below 0.
        ask_after: the step to ask after; the last one where a run is shorter.
        composite: the picture to show the judge; the first ``image`` of the call by default.
        beside: other methods and modulations to apply.
        backend: of :func:`fastrope.attention`.
        call: arguments of the pipeline, for one picture. A ``generator`` is copied for every start; without
            ``generator`` and ``latents`` the noise is drawn once from torch's global generator.

    Returns:
        A :class:`fastrope.bindings.diffusers.steering.Steered`: ``images`` and the pipeline's whole ``output``, the
        ``method`` that made it, and all ``tries`` in order, each with its ``value``, ``verdict`` and ``estimate``.

    Raises:
        ValueError: an argument that does not fit, named; a call that makes more than one picture.
        NotImplementedError: another scheduler, or a pipeline without ``interrupt``.
    """
    from .bindings.diffusers.steering import steer as run

    own = dict(parameter=parameter, moves=moves, ask_after=ask_after, composite=composite, beside=beside)
    return run(pipe, method, judge, max_tries, **own, backend=backend, **call)
