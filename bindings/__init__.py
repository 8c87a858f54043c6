"""Bindings: methods and modulations put into the attention of a host library's models."""

from __future__ import annotations


def apply(pipe, *methods, backend: str = "auto", rotation: str = "op", reference=None):
    """See :func:`fastrope.apply`."""
    from .diffusers import bind  # imports diffusers

    return bind(pipe, methods, backend, rotation, reference)


def remove(pipe) -> None:
    """See :func:`fastrope.remove`."""
    from .diffusers import unbind

    unbind(pipe)
