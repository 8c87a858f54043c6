"""What a modulated launch reads beside q, k and v."""

from dataclasses import dataclass

import torch

LOG2E = 1.4426950408889634  # the kernels' softmax runs in base 2
SLOT_TILE = 128  # query slots that share a level; every BLOCK_M divides it


@dataclass(frozen=True)
class SegmentTables:
    """What a plan says of a modulated call, as device tensors. Batches ``Bx`` are 1 or B; None where unused.

    segments ``(n, 12)`` int32; weights ``(W, D/2)``, groups ``(Bx, G, 3)`` (lambda, delta, unmasked keys), gains
    ``(Bx, N, Sq)`` float32; means ``(B, Hkv, G, 1 + L, D)`` of the groups per level and row_means
    ``(B, Hkv, G', C, D)`` per continuous slot, of the G' groups among these segments, float32; slots
    ``(Bx, T * SLOT_TILE)`` query index or -1 and slot_level ``(Bx, T)`` int32, -1 for tiles of continuous queries,
    which come first and fill C slots.
    """

    segments: torch.Tensor
    weights: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    gains: torch.Tensor | None = None
    means: torch.Tensor | None = None
    row_means: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    slot_level: torch.Tensor | None = None
    key_heads: int = 1
    num_views: int = 1
    num_levels: int = 0
    scaled_keys: int = 0
    continuous: int = 0


def batch_stride(x: torch.Tensor | None) -> int:
    """Elements from one batch row to the next of a ``(1 or B, ...)`` table; 0 where the rows share it."""
    return x.stride(0) if x is not None and x.shape[0] > 1 else 0
