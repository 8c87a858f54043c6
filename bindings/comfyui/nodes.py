"""The extension that ComfyUI loads: all nodes. A new one is listed here."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes_edit import GRAG, LooseRoPE, ReferenceStrength
from .nodes_inspect import AttentionChart, Inspect
from .nodes_positions import HighResolution
from .nodes_prompts import NAG, Regions
from .nodes_style import UntwistingRoPE

NODES: tuple[type[io.ComfyNode], ...] = (
    GRAG,
    ReferenceStrength,
    LooseRoPE,
    UntwistingRoPE,
    Regions,
    NAG,
    HighResolution,
    Inspect,
    AttentionChart,
)


class FastRoPE(ComfyExtension):
    """The nodes of this package."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All of them."""
        return list(NODES)


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI asks a node pack for."""
    return FastRoPE()
