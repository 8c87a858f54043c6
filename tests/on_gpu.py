"""Decisions as on a GPU with kernels, on a machine without one."""

from __future__ import annotations

import torch

from fastrope import device as devices
from fastrope import dispatch, verification


class OnGpu:
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, x: torch.Tensor):
        self.x = x

    def __getattr__(self, name):
        return getattr(self.x, name)


def pretend(monkeypatch) -> None:
    """Until the test ends, ``decide`` takes :class:`OnGpu` tensors as those of a Hopper GPU with kernels."""
    monkeypatch.setattr(dispatch, "differentiated", lambda x: False)
    monkeypatch.setattr(devices, "kernel_obstacle", lambda q: None)
    monkeypatch.setattr(devices, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(devices, "capability", lambda device: "sm_90")
    verification.needed.cache_clear()
