"""The torch.library op of anchor token matching: one opaque call for compilers, graphs and fake tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .. import device as devices
from .. import kernels
from . import reference


def choose(logits: Tensor, codebook: Tensor, backend: str) -> str:
    """The backend of a call. ``auto`` is the kernel on GPUs that have launch configurations, and the reference anywhere
    else; both give the same tokens.

    Raises:
        NotImplementedError: ``triton`` was asked for and cannot run.
    """
    obstacle = devices.kernel_obstacle(logits) or devices.kernel_obstacle(codebook)
    if backend == "triton" and obstacle:
        raise NotImplementedError(f'backend="triton" cannot match these tokens: {obstacle}')
    if backend == "auto":
        return "eager" if obstacle or logits.device.type != "cuda" else "triton"
    return backend


def _launch(logits: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config = kernels.select_match(devices.architecture(logits.device), call[4].shape[1])
    # Triton launches on the current device, which may not be the device of the tensors.
    guard = torch.cuda.device(logits.device) if logits.device.type == "cuda" else contextlib.nullcontext()
    with guard:
        return kernels.match_anchors(logits, *call, config)


@torch.library.custom_op("fastrope::match_anchors", mutates_args=())
def match_anchors(
    logits: Tensor,
    anchors: Tensor,
    position: Tensor,
    seeds: Tensor,
    active: Tensor | None,
    codebook: Tensor,
    rows: Tensor,
    windows: Tensor,
    candidates: int,
    tau: float,
    metric: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`fastrope.islock.reference.match` on ``backend`` ``"auto"``, ``"eager"`` or ``"triton"``."""
    run = _launch if choose(logits, codebook, backend) == "triton" else reference.match
    return run(logits, anchors, position, seeds, active, codebook, rows, windows, candidates, tau, metric)


@match_anchors.register_fake
def _(
    logits: Tensor,
    anchors: Tensor,
    position: Tensor,
    seeds: Tensor,
    active: Tensor | None,
    codebook: Tensor,
    rows: Tensor,
    windows: Tensor,
    candidates: int,
    tau: float,
    metric: str,
    backend: str,
):
    batch = logits.shape[0]
    dtypes = torch.int64, torch.float32, torch.int32, torch.bool
    return tuple(logits.new_empty((batch,), dtype=dtype) for dtype in dtypes)
