"""Binding for transformers: anchor token matching (ISLock) inside ``generate()`` of autoregressive image models."""

from fastrope.extras import importing

from ..anchors import Generated, Grid, Record

with importing("transformers"):
    from . import emu3, janus, lumina
    from .processor import AnchorProcessor

__all__ = ["AnchorProcessor", "Generated", "Grid", "Record", "emu3", "janus", "lumina"]
