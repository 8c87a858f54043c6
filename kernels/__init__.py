"""Triton kernels and their launchers. They know tensors and tables, not modulations; ``fastrope`` drives them."""

from .attention import describable, fused_attention
from .config import LaunchConfig, current_arch, override, select, ships
from .match import MatchConfig, match_anchors, select_match
from .means import group_means
from .pack import pack_rows, prepare_queries
from .patches import patch_attention
from .streams import Streams
from .tables import SLOT_TILE, SegmentTables

__all__ = [
    "SLOT_TILE", "LaunchConfig", "MatchConfig", "SegmentTables", "Streams", "current_arch", "describable",
    "fused_attention", "group_means", "match_anchors", "override", "pack_rows", "patch_attention", "prepare_queries",
    "select", "select_match", "ships",
]  # fmt: skip
