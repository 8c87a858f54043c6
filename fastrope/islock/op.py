"""The torch.library op of anchor token matching: one opaque call for compilers, graphs and fake tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .. import device as devices
from .. import kernels, verification
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
        return "eager" if obstacle or not devices.on_gpu(logits) else "triton"
    return backend


def _trusted(logits: Tensor, codebook: Tensor, metric: str) -> bool:
    """Whether the kernel may run unasked: see :mod:`fastrope.verification`."""
    device = logits.device
    if not verification.needed(device):
        return True
    kind = f"match: {metric}, {logits.dtype} logits, {codebook.dtype} codebook, {codebook.shape[1]} channels"
    return verification.holds(kind, device, lambda: _wrong(logits, codebook, metric))


def _wrong(logits: Tensor, codebook: Tensor, metric: str) -> str | None:
    """How the kernel differs from the reference on a small call with tensors like these; None where it does not."""
    generator = torch.Generator().manual_seed(0)
    rows, known, vocab = 4, 300, 310

    def on_device(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(logits.device, dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    index = torch.arange(rows, device=logits.device)
    call = (
        on_device(2 * normal(rows, vocab), logits.dtype), 7 * index - 1, index, index + 5, index != 2,
        on_device(normal(known, codebook.shape[1]), codebook.dtype),
        torch.arange(known, dtype=torch.int32, device=logits.device),
        torch.full((rows,), 20, dtype=torch.int32, device=logits.device), 20, 1.5 * codebook.shape[1], metric,
    )  # fmt: skip
    names = "tokens", "distance", "window", "accepted"
    for name, found, expected in zip(names, _launch(*call), reference.match(*call), strict=True):
        same = torch.allclose(found, expected, rtol=1e-4) if name == "distance" else torch.equal(found, expected)
        if not same:
            return f"{name} {found.tolist()}, expected {expected.tolist()}"
    return None


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
    chosen = choose(logits, codebook, backend)
    launches = chosen == "triton" and (backend == "triton" or _trusted(logits, codebook, metric))
    run = _launch if launches else reference.match
    return run(logits, anchors, position, seeds, active, codebook, rows, windows, candidates, tau, metric)


@match_anchors.register_fake
def _(logits: Tensor, *_: object):
    batch = logits.shape[0]
    dtypes = torch.int64, torch.float32, torch.int32, torch.bool
    return tuple(logits.new_empty((batch,), dtype=dtype) for dtype in dtypes)
