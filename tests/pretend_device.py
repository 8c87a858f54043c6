"""A device that is not there: "mps", on which the CPU computes.

As on the real one there is no float64, not even on the way to the CPU, and tensors of two devices do not mix. So what
fails here fails there, and what lands on the wrong device fails anywhere.
"""

from __future__ import annotations

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("mps", 0)
ABSENT = (torch.float64, torch.complex128)
BETWEEN = ("_to_copy", "copy_")  # ops that take tensors of two devices
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # which take indices of the CPU


class Elsewhere(torch.Tensor):
    """A tensor of the device; ``inner`` holds its values. For torch's own code, which asks the drivers of a device, it
    is a meta tensor."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        """A tensor like ``inner``, on the device."""
        refuse(inner.dtype)
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip
        self.inner = inner
        return self

    device = property(lambda self: DEVICE)
    is_meta = False

    def tolist(self):
        """Which torch has for tensors of its own alone."""
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Every op that meets such a tensor."""
        return dispatch(func, args, kwargs or {})

    def __repr__(self):
        return f"Elsewhere({self.inner!r})"


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_there(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


@contextlib.contextmanager
def pretended():
    """While active, the device can be named."""
    with torch.no_grad(), _Ops(), _Functions():
        yield DEVICE


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its parameters and buffers on the device."""
    for part in module.modules():
        for name, x in part._parameters.items():
            part._parameters[name] = None if x is None else torch.nn.Parameter(x.detach().to(DEVICE), False)
        for name, x in part._buffers.items():
            part._buffers[name] = None if x is None else x.to(DEVICE)
    return module


def refuse(dtype: torch.dtype | None) -> None:
    """Raise where the device has no such dtype."""
    if dtype in ABSENT:
        raise TypeError(f"Cannot convert a MPS Tensor to {dtype} dtype as the MPS framework doesn't support it")


def is_there(device: torch.device | str | None) -> bool:
    """Whether it is this device that is named; torch's own code names the one it takes it for."""
    return device is not None and torch.device(device).type in (DEVICE.type, "meta")


def dispatch(func, args, kwargs):
    """Run an op on the values. Its outputs are on the device named, or else on that of its inputs."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    both = there and any(not isinstance(x, Elsewhere) and x.ndim > 0 for x in tensors)
    if both and name not in BETWEEN and not (name in INDEXING and isinstance(args[0], Elsewhere)):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found mps:0 and cpu")
    if there and name in BETWEEN:  # converted where it was
        refuse(kwargs.get("dtype") if name == "_to_copy" else args[0].dtype)
    named, outside = kwargs.get("device"), bool(there)
    if named is not None:
        outside = is_there(named)
        kwargs = {**kwargs, "device": "cpu" if outside else named}
    owner = {id(x.inner): x for x in there}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = func(*args, **kwargs)
    if any(x is out for x in args):  # in place
        return owner.get(id(out), out)
    return tree_map(lambda x: Elsewhere(x) if outside and isinstance(x, torch.Tensor) else x, out)
