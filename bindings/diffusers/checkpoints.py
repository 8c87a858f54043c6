"""Gradient checkpointing: a block that runs a second time does what it did in its own forward.

Later forwards, forwards of other threads and the removal of the handle may lie between the two runs. diffusers' models
pass their blocks to ``_gradient_checkpointing_func``. While a handle is bound, they pass blocks that carry their
forward with them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch

from .forwards import Forwards
from .layer_op import Layer

NAME = "_gradient_checkpointing_func"


def follow(model: torch.nn.Module, forwards: Forwards) -> None:
    """Let the model's blocks carry their forward, with any checkpointing function that the user has set."""
    function = getattr(model, NAME, None)
    if callable(function) and not isinstance(function, _Following):
        setattr(model, NAME, _Following(function, forwards))


def unfollow(model: torch.nn.Module) -> None:
    """Put the model's own function back."""
    function = getattr(model, NAME, None)
    if isinstance(function, _Following):
        setattr(model, NAME, function.original)


class _Following:
    """``function(block, *args)``."""

    def __init__(self, original: Callable, forwards: Forwards) -> None:
        self.original = original
        self._forwards = forwards

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # compiled layers refuse gradients anyway
            block = _Carrying(block, self._forwards)
        return self.original(block, *args, **kwargs)


class _Carrying:
    """A block, together with the forward that it is part of now. It holds nothing else of the handle."""

    def __init__(self, block: torch.nn.Module, forwards: Forwards) -> None:
        self._block = block
        self._forwards = forwards
        self._forward = forwards.current()
        self._processors = {
            name: module.processor
            for name, module in block.named_modules()
            if isinstance(getattr(getattr(module, "processor", None), "layer", None), Layer)
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame, forward = sys._getframe(), self._forward
        self._forward = forward.unobserved()
        try:
            with self._forwards.lock:
                self._forwards.enter(frame, forward)
                block = self._bound_block()
            return block(*args, **kwargs)
        finally:
            self._forwards.leave(frame)

    def _bound_block(self) -> torch.nn.Module:
        """The block with the processors of its forward. If they were removed since, the block itself stays as it is,
        because others may run it meanwhile; a copy with the same parameters gets the processors."""
        block = self._block
        for name, processor in self._processors.items():
            if self._block.get_submodule(name).processor is not processor:
                block = _with_processor(block, name.split(".") if name else [], processor)
        return block


def _with_processor(module: torch.nn.Module, path: list[str], processor: Any) -> torch.nn.Module:
    """A copy with another processor. It shares all modules except those on the path to the processor.

    Raises:
        NotImplementedError: something replaced ``forward`` of a module on the path. It would run the original module.
    """
    if "forward" in vars(module) or getattr(module, "_compiled_call_impl", None) is not None:
        raise NotImplementedError(
            f"gradient checkpointing: expected backward() before handle.remove() for blocks with hooks of offloading "
            f"or of a compiler, received a {type(module).__name__} with such hooks after it"
        )
    twin = copy.copy(module)
    if path:
        twin._modules = dict(module._modules)
        twin._modules[path[0]] = _with_processor(module.get_submodule(path[0]), path[1:], processor)
    else:
        twin.processor = processor
    return twin
