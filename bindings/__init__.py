"""Bindings: methods and modulations put into the attention of a host library's models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diffusers import Handle


def apply(pipe: Any, *methods: Any, backend: str = "auto", rotation: str = "op", reference: Any = None) -> Handle:
    """See :func:`fastrope.apply`."""
    from .diffusers import bind  # imports diffusers

    return bind(pipe, methods, backend, rotation, reference)


def remove(pipe: Any) -> None:
    """See :func:`fastrope.remove`."""
    from .diffusers import unbind

    unbind(pipe)
