"""The torch.library op of anchor token matching: one opaque call for compilers, graphs and fake tensors."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import reference


@torch.library.custom_op("fastrope::match_anchors", mutates_args=())
def match_anchors(
    logits: Tensor,
    anchors: Tensor,
    position: Tensor,
    seeds: Tensor,
    active: Optional[Tensor],  # noqa: UP045 - the schema parser of torch 2.9 reads Optional
    codebook: Tensor,
    rows: Tensor,
    windows: Tensor,
    candidates: int,
    tau: float,
    metric: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`fastrope.islock.reference.match` on ``backend`` ``"eager"`` or ``"triton"``."""
    call = logits, anchors, position, seeds, active, codebook, rows, windows, candidates, tau, metric
    with torch.no_grad():
        return tuple(x.contiguous() for x in reference.match(*call))


@match_anchors.register_fake
def _(logits, anchors, position, seeds, active, codebook, rows, windows, candidates, tau, metric, backend):
    batch = logits.shape[0]
    dtypes = torch.int64, torch.float32, torch.int32, torch.bool
    return tuple(logits.new_empty((batch,), dtype=dtype) for dtype in dtypes)
