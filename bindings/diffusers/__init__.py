"""Binding for diffusers. A new host is a row in :mod:`.hosts`, and a processor where its attention has a new shape."""

from .handle import Handle, bind

__all__ = ["Handle", "bind"]
