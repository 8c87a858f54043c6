"""The call that tests of ops and of compiled code make."""

from __future__ import annotations

import torch
from numerics import Call, axial, biases_and_values, every_modulation, generator, grid, key_masks, tensors

SCALE = 0.25


def a_call(dtype=torch.float32, kind="levels", mask="random", tokens=12, batch=2, dim=16) -> Call:
    g = generator(0)
    q, k, v = tensors(g, batch=batch, queries=tokens, heads=4, key_heads=2, dim=dim, dtype=dtype)
    biased = kind == "biases"  # beside gains: both lie in channels of q and k
    modulations = every_modulation(g, tokens, tokens, dim, "levels" if biased else kind)
    modulations += biases_and_values(g, tokens, tokens, batch) if biased else []
    rope = axial(grid(tokens, 2), dim)
    return Call(q, k, v, rope, modulations=modulations, key_mask=key_masks(g, mask, batch, tokens), scale=SCALE)


def leaves(call: Call) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in (call.q, call.k, call.v)]
