"""What nodes do to a model: a clone that is steered, or looked at, by one more of them."""

from __future__ import annotations

from typing import Any

from ..image.inspection import Inspector, Record
from .bound import Bound
from .models import family_of
from .references import LatentReference
from .steering import KEY, Steering


def steer(
    model: Any, method: Any, refers: bool = False, reference: LatentReference | None = None, number: int | None = None
) -> Any:
    """A clone of a ``ModelPatcher`` that is steered by one more method. The model it was made of stays as it is.

    Args:
        model: the patcher.
        method: with ``modulations(site) -> list``.
        refers, number: see :class:`.bound.Bound`.
        reference: a latent that the method shares attention with.

    Raises:
        NotImplementedError: a model that cannot be steered.
        ValueError: something that is no method.
    """
    before = steering_of(model)
    if reference is not None and before.reference not in (None, reference):
        raise ValueError("reference_latent: expected one per model, received another beside that of an earlier node; "
                         "put several pictures into one latent batch")  # fmt: skip
    bound = [*before.bound, Bound(method, refers, number)]
    return _bind(model, Steering(bound, before.watchers, reference or before.reference, before.backend))


def watch(model: Any, inspector: Inspector, record: Record) -> Any:
    """A clone of a patcher whose attention is looked at, also where nothing steers it."""
    before = steering_of(model)
    if before.reference is not None:
        raise NotImplementedError("inspect: expected a model without a reference latent, received one with it")
    return _bind(model, Steering(before.bound, [*before.watchers, (inspector, record)], None, before.backend))


def steering_of(model: Any) -> Steering:
    """The steering of a patcher; an empty one where it has none."""
    held = [wrapper.__self__ for wrapper in model.get_wrappers("apply_model", KEY)]
    return held[-1] if held else Steering()


def _bind(model: Any, steering: Steering) -> Any:
    family_of(model.model)
    clone = model.clone()
    for place, wrapper in (("apply_model", steering.around), ("prepare_sampling", steering.check)):
        clone.remove_wrappers_with_key(place, KEY)
        clone.add_wrapper_with_key(place, KEY, wrapper)
    for moment, answer in (("on_pre_run", steering.begin), ("on_cleanup", steering.forget)):
        clone.remove_callbacks_with_key(moment, KEY)
        clone.add_callback_with_key(moment, KEY, answer)
    return clone
