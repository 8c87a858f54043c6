"""A dispatch mode that notes what a call reads on the host, and the largest tensor that comes to be."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Notes every op that reads a value on the host, and the largest tensor that comes to be."""

    SYNCHRONISES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.read, self.largest, self.where = [], 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        boolean = name in ("index", "index_put_") and any(
            getattr(x, "dtype", None) == torch.bool for x in args[1] if x is not None
        )
        if name.startswith(self.SYNCHRONISES) or boolean:
            self.read.append(name)
        if name == "_to_copy" and any(t.device != found.device for t in args[:1]):
            self.read.append(name)
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                size = x.untyped_storage().nbytes()
                if size > self.largest:
                    self.largest, self.where = size, f"{name} {tuple(x.shape)} {x.dtype}"
        return found
