"""Triton kernels and their launchers. They know tensors and tables, not modulations; ``fastrope`` drives them."""

from .attention import SLOT_TILE, SegmentTables, fused_attention
from .config import LaunchConfig, current_arch, override, select
from .means import group_means
from .pack import pack_rows
from .patches import patch_attention

__all__ = [
    "SLOT_TILE", "LaunchConfig", "SegmentTables", "current_arch", "fused_attention", "group_means", "override",
    "pack_rows", "patch_attention", "select",
]  # fmt: skip
