"""Triton kernels and their launchers. They know tensors and tables, not modulations; ``fastrope`` drives them."""

from .attention import fused_attention
from .config import LaunchConfig, current_arch, override, select, ships
from .descriptors import describable
from .match import MatchConfig, match_anchors, select_match
from .means import group_means
from .pack import pack_rows, prepare_queries
from .patches import patch_attention
from .series import series_attention
from .streams import Streams
from .tables import SLOT_TILE, SegmentTables

__all__ = [
    "SLOT_TILE", "LaunchConfig", "MatchConfig", "SegmentTables", "Streams", "current_arch", "describable",
    "fused_attention", "group_means", "match_anchors", "override", "pack_rows", "patch_attention", "prepare_queries",
    "select", "select_match", "series_attention", "ships",
]  # fmt: skip
