"""Attention under modulations in full, from the formulas of docs/mathematics.md alone: complex pairs, and every query
rotates the keys by itself. Slow, float64, and without a line of the package in it."""

from __future__ import annotations

import torch


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    axes_dim: tuple[int, ...],
    *,
    r: torch.Tensor | None = None,
    scaled: tuple[list[int], tuple[int, ...]] = ([], ()),
    groups: tuple[tuple[list[int], float, float], ...] = (),
    gain: torch.Tensor | None = None,
    theta: float = 10_000.0,
) -> torch.Tensor:
    """
    Args:
        q, k, v: ``(B, S, H, D)`` float64; pairs are neighbours, not rotated.
        positions: ``(S, axes)``.
        r: ``(B, S)``, the factor of each query's positions; ``scaled`` names the keys and axes it covers.
        groups: keys, lambda and delta of each group.
        gain: ``(B, S, S)``, the factor of each logit.
    """
    batch, tokens, _, dim = q.shape
    axis = torch.tensor([a for a, d in enumerate(axes_dim) for _ in range(d // 2)])
    freq = torch.tensor([theta ** (-2 * c / d) for d in axes_dim for c in range(d // 2)], dtype=torch.float64)
    phi = positions.double()[:, axis] * freq  # (S, D/2)
    covered = torch.zeros(tokens, dim // 2, dtype=torch.bool)
    for j in scaled[0]:
        covered[j] = torch.isin(axis, torch.tensor(scaled[1]))
    r = torch.ones(batch, tokens, dtype=torch.float64) if r is None else r
    factor = torch.where(covered, r[:, :, None, None], 1.0)  # (B, query, key, pair)
    pairs_q, pairs_k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
    turn_q = torch.polar(torch.ones_like(factor), factor * phi[:, None])  # the query turns as the key it meets does
    turn_k = torch.polar(torch.ones_like(factor), factor * phi)
    queries = torch.einsum("bihc,bijc->bijhc", pairs_q, turn_q)
    keys = torch.einsum("bjhc,bijc->bijhc", pairs_k, turn_k)
    for members, bias, delta in groups:
        mean = keys[:, :, members].mean(dim=2, keepdim=True)
        keys[:, :, members] = bias * mean + delta * (keys[:, :, members] - mean)
    logits = torch.einsum("bijhc,bijhc->bhij", queries, keys.conj()).real * dim**-0.5
    if gain is not None:
        logits = logits * gain[:, None]
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(dim=-1), v)


def dilated(mask: torch.Tensor, times: int) -> torch.Tensor:
    """A mask ``(h, w)`` grown by a 4-connected cross: cells at most ``times`` steps along rows and columns away."""
    h, w = mask.shape
    seeds = mask.nonzero().tolist()
    return torch.tensor([[any(abs(y - a) + abs(x - b) <= times for a, b in seeds) for x in range(w)] for y in range(h)])
