"""Attention of a target whose keys are its own sequence and, behind it, the image tokens of a shared reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrope as fr
from fastrope.checks import require
from fastrope.modulations import Modulation

from .sequence import JointSequence
from .work import Work


def with_shared(tokens: fr.TokenLayout, grids: Sequence[tuple[int, int]]) -> fr.TokenLayout:
    """The same layout with shared references."""
    return fr.TokenLayout(
        tokens.text_tokens, tokens.target_grid, tokens.reference_grids, tokens.order, tokens.padding, grids
    )


def image_angles(sequence: JointSequence, rope: fr.RoPE, rows: int) -> Tensor:
    """Angles ``(tokens, D/2)`` of the image tokens of all ``rows`` references, one after another.

    Args:
        sequence, rope: of one reference in a call of its own, or of all of them where their positions differ.
    """
    angles = rope.angles[..., sequence.layout().target, :]
    return angles.repeat(rows, 1) if angles.ndim == 2 else angles.flatten(0, 1)


def target_work(
    sequence: JointSequence, rope: fr.RoPE, modulations: Sequence, shared: Tensor | None, like: Work | None
) -> Work:
    """Attention of the target over its sequence and, in a layer that shares, over the reference.

    Args:
        sequence, rope: of the target's rows.
        modulations: over the keys of the sequence, or over the shared keys behind them.
        shared: angles ``(tokens, D/2)`` of the shared keys; None if none are shared.
        like: work over the same tokens, see :class:`.work.Work`.
    """
    if shared is None:
        return Work(sequence, rope, tuple(modulations), like=like)
    key_rope = _key_rope(rope, shared) if like is None else like.key_rope
    modulations = tuple(over_sequence(m, rope.tokens, len(shared)) for m in modulations)
    return Work(_followed_by(sequence, len(shared)), rope, modulations, key_rope, like)


def over_sequence(m: Modulation, length: int, further: int) -> Modulation:
    """A modulation over a sequence of ``length`` tokens, for a call where ``further`` keys follow the sequence: open
    and negative bounds of its keys count from the end of the sequence, and a key bias adds nothing to further keys.

    Raises:
        ValueError: a slice that begins or ends before the sequence does.
    """
    if isinstance(m, fr.KeyBias):
        return replace(m, bias=F.pad(m.bias, (0, further))) if m.bias.shape[-1] == length else m
    keys = m.keys
    if isinstance(keys, slice):
        inside = all(n is None or n >= -length for n in (keys.start, keys.stop))
        require(inside, f"{type(m).__name__}.keys", f"a slice within {length} keys", keys)
        start, stop = (n if n is None or n >= 0 else n + length for n in (keys.start, keys.stop))
        stop = length if stop is None and (start or 0) < length else stop
        return m if (start, stop) == (keys.start, keys.stop) else replace(m, keys=slice(start, stop, keys.step))
    if keys.dtype == torch.bool and len(keys) == length:
        return replace(m, keys=keys.nonzero().flatten())
    return m


def _key_rope(rope: fr.RoPE, shared: Tensor) -> fr.RoPE:
    shared = shared.to(rope.angles)
    shared = shared if rope.angles.ndim == 2 else shared.expand(len(rope.angles), -1, -1)
    return fr.RoPE(torch.cat([rope.angles, shared], dim=-2), rope.axis, rope.pairing)


def _followed_by(sequence: JointSequence, tokens: int) -> JointSequence:
    """The sequence with masks that cover further keys: every query attends to these, and the host adds nothing to
    their logits."""
    mask, bonus = sequence.key_mask, sequence.bonus
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), tokens)], dim=1)
    if bonus is not None:
        bonus = torch.cat([bonus, bonus.new_zeros(len(bonus), tokens)], dim=1)
    return replace(sequence, key_mask=mask, bonus=bonus)
