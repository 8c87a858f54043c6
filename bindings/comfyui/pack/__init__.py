"""The folder that goes into ComfyUI's custom_nodes; the nodes themselves are in the package fastrope."""

try:
    from fastrope.bindings.comfyui.nodes import comfy_entrypoint
except ModuleNotFoundError as error:
    if error.name != "fastrope":
        raise
    raise ModuleNotFoundError(
        "fastrope is not installed in ComfyUI's Python: run its python -m pip install . in a clone of FastRoPE's "
        "repository",
        name=error.name,
    ) from error

__all__ = ["comfy_entrypoint"]
