"""The door for models that a node has compiled: one opaque op in the place of attention.

The host's compile node drops the guards on its options: what compiled code finds there the first time holds for good.
So it finds an op that asks, when it runs, what the layer is to do in the call under way.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .models import Family

COMPILED = "torch.compile"  # the host's key for the wrapper of its compile nodes
ATTENTION = "comfy.ldm.modules.attention"
_DOORS: weakref.WeakValueDictionary[int, CompiledDoor] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class CompiledDoor:
    """One override for all calls of a patched model.

    Args:
        family, transformer: of the model.
    """

    def __init__(self, family: Family, transformer: Any) -> None:
        number, first = next(_NUMBERS), 0
        self._first = {}
        for name, host, _ in family.blocks:
            self._first[host] = first
            first += len(getattr(transformer, name))
        self._addresses = [torch.tensor([number, layer], device="cpu") for layer in range(first)]
        self._running = threading.local()
        _DOORS[number] = self

    def run(self, call: Any, given: Mapping[str, Any], model: Callable[[dict], Any]) -> Any:
        """``model(options)`` with this door open to ``call``, a :class:`.calls.ModelCall`."""
        before = getattr(self._running, "call", None)
        self._running.call = call
        try:
            return model({**given, "optimized_attention_override": self.override})
        finally:
            self._running.call = before

    def override(self, func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Any:
        """In the place of the host's attention, traced or not."""
        options = kwargs.get("transformer_options") or {}
        first = self._first.get(options.get("block_type"))
        if first is None or options.get("block_index") is None:
            return func(q, k, v, heads, *args, **kwargs)
        layer = first + options["block_index"]
        if not torch.compiler.is_compiling():
            return self._running.call.override(func, q, k, v, heads, *args, **kwargs)
        mask = args[0] if args else kwargs.get("mask")
        if not kwargs.get("skip_reshape", False):
            q, k, v = (x.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for x in (q, k, v))
        out = comfyui_attention(q, k, v, mask, self._addresses[layer])
        return out if kwargs.get("skip_output_reshape", False) else out.transpose(1, 2).flatten(2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """``(B, H, S, D)``, when the op runs."""
        call = self._running.call
        return call.opaque(layer, sys.modules[ATTENTION].optimized_attention, q, k, v, mask)


_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@torch.library.custom_op("fastrope::comfyui_attention", mutates_args=(), tags=_TAGS)
def comfyui_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, address: Tensor) -> Tensor:
    """Attention of a layer, steered or the host's own as the call says that runs this.

    Args:
        q, k, v: ``(B, H, S, D)``, rotated by the host.
        mask: what the host masks with.
        address: ``(2,)`` int64 on the CPU: the door and the layer.

    Returns:
        ``(B, H, S, D)`` contiguous.
    """
    number, layer = address.tolist()
    return _DOORS[number].attend(layer, q, k, v, mask).contiguous()


@comfyui_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, address: Tensor):
    return q.new_empty(q.shape)
