"""Binding for diffusers. A new host is a row in :mod:`.hosts`, and a processor where its attention has a new shape."""

from fastrope.extras import importing

with importing("diffusers"):
    from ..image.inspection import Record
    from ..image.sequence import JointSequence
    from .handle import Handle, bind, unbind
    from .hosts import Host, register_host
    from .processors import BoundProcessor, Stream
    from .video import PositionHandle

__all__ = [
    "BoundProcessor", "Handle", "Host", "JointSequence", "PositionHandle", "Record", "Stream", "bind", "register_host",
    "unbind",
]  # fmt: skip
