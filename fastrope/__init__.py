"""FastRoPE: attention with first-class modulations.

``attention`` is the op. ``QueryScale``, ``BandWeight``, ``BiasDelta``, ``LogitGain``, ``LogitBias``, ``KeyBias`` and
``ValueGain`` are its modulations. ``plan`` does the host work once, ``explain`` says what would run, and ``apply``
binds modulations to a diffusers pipeline, for which ``explain_calls`` says what ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .activity import At
from .api import attention, explain
from .functional import scaled_dot_product_attention
from .islock import ISLock
from .joint import Norm, Stream, joint_attention
from .methods import (
    GRAG,
    NAG,
    HighResolution,
    LongVideo,
    LooseRoPE,
    PromptWeights,
    ReferenceStrength,
    Region,
    Regions,
    Temperature,
    UntwistingRoPE,
)
from .methods.judges import MOVES as _MOVES
from .methods.trajectories import GAMMA as _GAMMA
from .modulations import BandWeight, BiasDelta, KeyBias, LogitBias, LogitGain, QueryScale, ValueGain
from .planning import Plan, plan
from .ran import explain_calls
from .rope import RoPE
from .sharing import Reference, ReferenceCache
from .tokens import Site, TokenLayout
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .bindings.diffusers.handle import Handle
    from .bindings.diffusers.steering import Steered

__all__ = [
    "GRAG", "NAG", "At", "BandWeight", "BiasDelta", "HighResolution", "ISLock", "KeyBias", "LogitBias", "LogitGain",
    "LongVideo", "LooseRoPE", "Norm", "Plan", "PromptWeights", "QueryScale", "Reference", "ReferenceCache",
    "ReferenceStrength", "Region", "Regions", "RoPE", "Site", "Stream", "Temperature", "TokenLayout", "UntwistingRoPE",
    "ValueGain", "apply", "attention", "explain", "explain_calls", "joint_attention", "plan", "prepare_reference",
    "remove", "scaled_dot_product_attention", "steer",
]  # fmt: skip


def apply(
    pipe: Any,
    *methods: Any,
    backend: str = "auto",
    rotation: str = "op",
    reference: Any = None,
    plain: str | Callable | None = None,
) -> Handle:
    """Bind methods and modulations to a diffusers pipeline or transformer. Only this object changes.

    Args:
        pipe: a pipeline whose ``transformer`` is in the table of hosts (FLUX.1, Kontext, Chroma, FLUX.2, Qwen-Image and
            its editors, Z-Image and related models), or the transformer itself, compiled or not.
        methods: modulations (QueryScale, BandWeight, BiasDelta ...) over the joint sequence of the model, and methods:
            objects with ``modulations(site) -> list``, called for every layer and step. :class:`fastrope.At` confines
            either to some layers and steps. Lists are flattened. Tensors may be on any device.
        backend: of :func:`fastrope.attention`, for the modulated layers.
        rotation: who rotates queries and keys in modulated layers. ``"op"``: the op, which gets them after the QK norm.
            ``"host"``: the host's own rotary embedding. The results are the same up to rounding, since the host rotates
            in float32. In compiled layers the host always rotates.
        reference: what methods share attention with (:class:`fastrope.UntwistingRoPE`). A :class:`fastrope.Reference`
            joins every call as further rows of the batch, on the target's grid. A :class:`fastrope.ReferenceCache`
            around one stores its keys instead. The reference keeps its own text in all calls, also in those of a
            negative prompt.
        plain: the attention for work that folds or splits off, as of :func:`fastrope.attention`. None: the one chosen
            for the model (``set_attention_backend``, or diffusers' context or environment variable), where one is.
            ``"fastrope"``: never that one.

    Returns:
        A :class:`fastrope.bindings.diffusers.Handle`, which is a context manager: ``remove()`` restores the very same
        processors, ``update(...)`` replaces the methods. Layers without a modulation run the host's own processor, to
        the same bits.

    Raises:
        ValueError: an unknown host, a host bound already, something that is neither a modulation nor a method.
        NotImplementedError: IP-Adapter, PAG, nunchaku, processors that are not the host's own.
    """
    from .bindings.diffusers import bind

    return bind(pipe, methods, backend, rotation, reference, plain)


def remove(pipe: Any) -> None:
    """Undo :func:`apply` when its handle is lost: calls ``handle.remove()`` of the handle bound to the transformer.

    Args:
        pipe: the pipeline or the transformer.

    Raises:
        ValueError: nothing is bound to it.
    """
    from .bindings.diffusers import unbind

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
    """One or several pictures as the reference that ``fr.apply(pipe, ..., reference=...)`` takes.

    The trajectory says what the reference's latents are at the target's noise level sigma:

    * ``"linear"``: ``(1 - sigma) image + sigma noise`` with one noise for all steps. The model does not run.
    * ``"rf_inversion"``: the model carries the picture up the scheduler's noise levels, in Euler steps with
      ``v = gamma v_model + (1 - gamma) (noise - z) / (1 - sigma)``; one call of the transformer per step. Targets may
      have other noise levels (another size or number of steps): latents are interpolated linearly between the points.
    * ``"latents"``: the argument ``latents``: a tensor per step, or a function ``(step, sigma)``.

    Args:
        pipe: a text-to-image pipeline whose ``transformer`` is in the table of hosts, with its VAE.
        image: a PIL picture, a tensor ``(3, H, W)`` or ``(R, 3, H, W)`` in 0..1, or a list of pictures: R references,
            and every target sees all of them. None for ``"latents"``.
        trajectory: ``"linear"``, ``"rf_inversion"`` or ``"latents"``.
        latents: for ``"latents"``: packed ``(R, tokens, C)`` per step as the transformer takes them (and as
            ``callback_on_step_end`` gives them); for Z-Image ``(R, C, rows, columns)``. There must be as many as the
            call has steps. A target with other noise levels is refused.
        gamma: for ``"rf_inversion"``: 1 follows the model alone, 0 is ``"linear"``.
        height, width: of the reference in pixels. The default is the picture's own size, reduced to at most a megapixel
            and cut to what the pipeline can pack. A PIL picture of other proportions is cropped, a tensor stretched.
        call: further arguments of the pipeline's call, for the reference alone: ``prompt`` (what the picture shows;
            empty by default), ``prompt_embeds``, ``num_inference_steps``, ``sigmas``, ``guidance_scale``,
            ``generator``: one, or a list of R. The noise is the pipeline's own, so a target with the same seed and size
            starts from it. Classifier-free guidance is off by default.

    Returns:
        A :class:`fastrope.Reference`. Its ``latents`` is a trajectory of :mod:`fastrope.methods.trajectories`, in the
        dtype that the transformer is given. ``pipe`` does not change; without a generator, torch's global one moves on.

    Raises:
        ValueError: naming the argument; for ``"rf_inversion"`` also a pipeline with bound methods.
        NotImplementedError: a pipeline that needs a picture of its own (Qwen-Image-Edit, image to image, inpainting,
            ControlNet), another VAE, for ``"rf_inversion"`` another scheduler than ``FlowMatchEulerDiscreteScheduler``.
    """
    from .bindings.diffusers.trajectories import prepare_reference as prepare

    return prepare(pipe, image, trajectory, latents=latents, gamma=gamma, height=height, width=width, **call)


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
    """Run a pipeline with a method. If a judge rejects an early estimate, start again with another parameter.

    After step ``ask_after`` (from 0) the pipeline itself decodes the one-step estimate ``x0 = x - sigma v``. ``v`` is
    what its scheduler was given, guidance included. The judge sees the composite and the estimate. On success the run
    goes on to its end. Otherwise the parameter moves, and the run starts again from the same noise. After
    ``max_tries`` verdicts there is a last run, without the judge.

    If the first verdict is success, the result equals a run without steering, bit for bit. Method, processors,
    scheduler and generator are afterwards as before, also after an error.

    Args:
        pipe: a diffusers pipeline that :func:`fastrope.apply` can bind, with a ``FlowMatchEulerDiscreteScheduler``.
        method: a dataclass with ``modulations(site)`` and the parameter: :class:`fastrope.LooseRoPE`. It does not
            change.
        judge: a function ``(composite, estimate) -> verdict`` of two PIL pictures (:mod:`fastrope.methods.judges`), or
            the name of a vision-language chat model, which is loaded
            (:class:`fastrope.bindings.transformers.judge.ChatJudge`). None compares the method's mask with its
            surroundings (:class:`fastrope.methods.judges.RegionJudge`). An unreadable answer counts as success.
        max_tries: number of verdicts at most, at least 0.
        parameter: name of the number that moves.
        moves: what each verdict except success adds to it, by default as in the authors' code. The result is never
            below 0.
        ask_after: the step after which the judge is asked; in a shorter run, the last step.
        composite: the picture that the judge sees; by default the first ``image`` of the call.
        beside: other methods and modulations to apply.
        backend: of :func:`fastrope.attention`.
        call: arguments of the pipeline, for one picture. A ``generator`` is copied for every start. Without
            ``generator`` and ``latents``, the noise is drawn once from torch's global generator.

    Returns:
        A :class:`fastrope.bindings.diffusers.steering.Steered`: ``images`` and the pipeline's whole ``output``, the
        ``method`` that made it, and all ``tries`` in order, each with its ``value``, ``verdict`` and ``estimate``.

    Raises:
        ValueError: an argument that does not fit, named; a call that makes more than one picture.
        NotImplementedError: another scheduler, or a pipeline without ``interrupt``.
    """
    from .bindings.diffusers.steering import steer as run

    return run(
        pipe, method, judge, max_tries, parameter=parameter, moves=moves, ask_after=ask_after, composite=composite,
        beside=beside, backend=backend, **call,
    )  # fmt: skip
