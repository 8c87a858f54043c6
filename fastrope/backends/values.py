"""Value gains and BiasDelta of values in torch's operations: differentiable, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..planning.lowered import Lowered


def modulated_values(v: Tensor, lowered: Lowered, dtype: torch.dtype) -> Tensor:
    """``vt (B, Sk, Hkv, D)``, rounded once to ``dtype``: ``u (delta v + (lambda - delta) nu)``."""
    tables = lowered.values
    if tables is None:
        return v
    wide = torch.promote_types(v.dtype, torch.float32)
    values = v.to(wide)
    factor, shift = tables.factors.to(wide)[..., None, None].unbind(1)
    found = factor * values
    if tables.groups is not None and (inside := tables.inside) is not None:
        member, held = tables.member[inside].long(), values[:, inside]
        if tables.bias is not None:
            held = held.masked_fill((tables.bias[:, inside] < 0)[:, :, None, None], 0)
        counts = tables.groups.values[..., 2, None, None].to(wide).clamp(min=1)
        nu = held.new_zeros(len(v), tables.groups.count, *v.shape[2:]).index_add(1, member, held) / counts
        found = found.index_add(1, inside, shift[:, inside].expand(len(v), -1, -1, -1) * nu[:, member])
    return found.to(dtype).to(v.dtype)
