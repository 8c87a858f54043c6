"""FastRoPE: attention with first-class modulations, at flash-attention speed.

``attention`` is the op; ``QueryScale``, ``BandWeight``, ``BiasDelta`` and ``LogitGain`` are what it can be told;
``plan`` does the host work once; ``explain`` says what would run; ``apply`` binds modulations to a diffusers pipeline.
"""

from .activity import At
from .api import attention, explain
from .islock import ISLock
from .joint import Norm, Stream, joint_attention
from .methods import GRAG, LooseRoPE, UntwistingRoPE
from .modulations import BandWeight, BiasDelta, LogitGain, QueryScale
from .planning import Plan, plan
from .rope import RoPE
from .sharing import Reference, ReferenceCache
from .tokens import Site, TokenLayout

__version__ = "0.1.0"

__all__ = [
    "GRAG", "At", "BandWeight", "BiasDelta", "ISLock", "LogitGain", "LooseRoPE", "Norm", "Plan", "QueryScale",
    "Reference", "ReferenceCache", "RoPE", "Site", "Stream", "TokenLayout", "UntwistingRoPE", "apply", "attention",
    "explain", "joint_attention", "plan", "prepare_reference", "remove", "steer",
]  # fmt: skip


def apply(pipe, *methods, **options):
    """Bind methods and modulations to a diffusers pipeline or transformer; see :func:`fastrope.bindings.apply`."""
    from .bindings import apply as bind

    return bind(pipe, *methods, **options)


def remove(pipe) -> None:
    """Undo ``apply`` where its handle was not kept; see :func:`fastrope.bindings.remove`."""
    from .bindings import remove as unbind

    unbind(pipe)


def prepare_reference(pipe, image=None, trajectory="linear", **arguments):
    """A picture as the reference of ``apply(pipe, ..., reference=...)``; see
    :func:`fastrope.bindings.diffusers.trajectories.prepare_reference`."""
    from .bindings.diffusers.trajectories import prepare_reference as prepare

    return prepare(pipe, image, trajectory, **arguments)


def steer(pipe, method, judge=None, max_tries=4, **arguments):
    """Run a pipeline under a method that a judge corrects; see :func:`fastrope.bindings.diffusers.steering.steer`."""
    from .bindings.diffusers.steering import steer as run

    return run(pipe, method, judge, max_tries, **arguments)
