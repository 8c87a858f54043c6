"""Binding for transformers: anchor token matching (ISLock) inside ``generate()`` of autoregressive image models."""

from ..anchors import Generated, Grid, Record
from . import emu3, janus, lumina
from .processor import AnchorProcessor

__all__ = ["AnchorProcessor", "Generated", "Grid", "Record", "emu3", "janus", "lumina"]
