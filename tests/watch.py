"""Dispatch modes that note what a call reads on the host, the largest tensor that comes to be, and how much lives."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Notes every op that reads a value on the host, and the largest tensor that comes to be.

    Args:
        known: tensors that were there before. With them an index counts that no op has made, or lift_fresh alone: torch
            makes it of Python numbers, and the host waits until a device has it.
    """

    SYNCHRONISES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "unique", "masked_select")

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.read, self.largest, self.where = [], 0, ""
        self.made = {x.untyped_storage().data_ptr(): x for x in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        indices = [x for x in args[1] if x is not None] if name in ("index", "index_put_") else []
        boolean = any(x.dtype == torch.bool for x in indices)
        of_numbers = self.made and any(x.untyped_storage().data_ptr() not in self.made for x in indices)
        if name.startswith(self.SYNCHRONISES) or boolean or of_numbers:
            self.read.append(name)
        if name == "_to_copy" and any(t.device != found.device for t in args[:1]):
            self.read.append(name)
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                if self.made and name != "lift_fresh":  # kept, so that no address is used again
                    self.made[x.untyped_storage().data_ptr()] = x
                size = x.untyped_storage().nbytes()
                if size > self.largest:
                    self.largest, self.where = size, f"{name} {tuple(x.shape)} {x.dtype}"
        return found


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that a call makes and holds at one time; ``peak`` is the most."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        found = function(*args, **(kwargs or {}))
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return found
