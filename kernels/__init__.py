"""Triton kernels and their launchers. They know tensors and tables, not modulations; ``fastrope`` drives them.

Submodules that need triton are imported on first use: ``abi`` and ``config`` serve where it is not installed.
"""

from importlib import import_module

_HOME = {
    "KernelTables": "tables", "LaunchConfig": "config", "MatchConfig": "match", "Streams": "streams",
    "ValueFactors": "tables",
    "axis_block_attention": "axis_blocks", "describable": "descriptors", "fused_attention": "attention",
    "group_means": "means", "match_anchors": "match", "pack_rows": "pack", "polynomial_attention": "polynomial",
    "order_keys": "order", "per_query_means": "query_means",
    "prepare_queries": "pack", "reweight_keys": "means", "scatter_rows": "pack",
    "select": "config", "select_match": "match", "ships": "config",
}  # fmt: skip

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = found  # so that calls find it without coming here
    return found
