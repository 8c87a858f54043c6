"""Shared attention read off its formulas: every logit in full, float64. Nothing here is shared with the library.

The reference runs first, by itself, with processors that write down what each layer makes of it; then the target runs
with processors that read it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
from diffusers_hosts import TinyHost
from tiny_transformers import positions_of

import fastrope as fr


def band(high: float, low: float, beta: float, axes: tuple[int, ...], spatial=(1, 2), axis0="low") -> torch.Tensor:
    """``s_d`` of all pairs, one by one."""
    found = []
    for axis, channels in enumerate(axes):
        last = channels // 2 - 1
        for d in range(channels // 2):
            curve = high + (low - high) * (d / last) ** beta
            flat = {"low": low, "match": curve}.get(axis0, axis0)
            found.append(curve if axis in spatial else flat)
    return torch.tensor(found, dtype=torch.float64)


@dataclass
class Seen:
    """What a layer makes of the reference: normalised, unrotated queries and keys, and values, ``(R, S, heads, D)``."""

    layers: list = field(default_factory=list)


@dataclass
class Shared:
    """Attention of one call, layer after layer.

    Args:
        host: whose axes and theta.
        layout: of the target; positions ``(S, axes)`` or ``(B, S, axes)``; key_mask ``(B, S)``; bonus ``(B, S)``: 1 is
            added to logits of a query and a key of the sequence that both have it.
        seen, span, angles_at: the reference's layers, its image tokens, its positions ``(S, axes)``.
        weights: of the reference's keys, ``(D/2,)``.
        layers: where it is shared; None: everywhere.
    """

    host: TinyHost
    span_target: slice
    positions: torch.Tensor
    key_mask: torch.Tensor | None = None
    bonus: torch.Tensor | None = None
    seen: Seen | None = None
    span: slice | None = None
    positions_reference: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    adain: float = 0.0
    layers: set | None = None
    records: Seen | None = None
    count: int = 0

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Complex pairs of ``x (B, S, H, D)``, rotated."""
        angles = torch.cat(
            [
                positions.double()[..., a, None] * self.host.theta ** (-torch.arange(0, d, 2).double() / d)
                for a, d in enumerate(self.host.axes)
            ],
            dim=-1,
        )
        pairs = torch.complex(x.double()[..., 0::2], x.double()[..., 1::2])
        angles = angles if angles.ndim == 3 else angles[None]
        return pairs * torch.exp(1j * angles)[:, :, None]

    def __call__(self, q, k, v):
        layer, self.count = self.count, self.count + 1
        if self.records is not None:
            self.records.layers.append((q, k, v))
        shares = self.seen is not None and (self.layers is None or layer in self.layers)
        if shares:
            q_ref, k_ref, v_ref = (x[:, self.span] for x in self.seen.layers[layer])
            q, k = (self.restyled(x, r) for x, r in ((q, q_ref), (k, k_ref)))
        queries, keys, values = self.turn(q, self.positions), self.turn(k, self.positions), v
        mask = torch.ones(keys.shape[:2], dtype=torch.bool) if self.key_mask is None else self.key_mask
        if shares:
            at = self.positions_reference[..., self.span, :]
            weights = torch.ones(len(q[0, 0, 0]) // 2) if self.weights is None else self.weights
            for row in range(len(k_ref)):
                here = at if at.ndim == 2 else at[row]
                extra = self.turn(k_ref[row][None], here) * weights
                keys = torch.cat([keys, extra.expand(len(keys), -1, -1, -1)], dim=1)
                values = torch.cat([values, v_ref[row].expand(len(values), -1, -1, -1)], dim=1)
                mask = torch.cat([mask, torch.ones(len(mask), extra.shape[1], dtype=torch.bool)], dim=1)
        s = torch.einsum("bihc,bjhc->bhij", queries.conj(), keys).real * q.shape[-1] ** -0.5
        if self.bonus is not None:
            s[..., : q.shape[1]] += (self.bonus[:, :, None] & self.bonus[:, None, :])[:, None]
        p = s.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1)
        return torch.einsum("bhij,bjhd->bihd", p, values.double()).to(v.dtype).flatten(2)

    def restyled(self, x, reference):
        """AdaIN of the target's image tokens, from the tokens of all references."""
        if not self.adain:
            return x
        x = x.clone()
        inner, pool = x[:, self.span_target].double(), reference.double().flatten(0, 1)
        mean, mean_r = inner.mean(dim=1, keepdim=True), pool.mean(dim=0)
        std = ((inner - mean).square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        std_r = ((pool - mean_r).square().mean(dim=0) + 1e-6).sqrt()
        new = (inner - mean) / std * std_r + mean_r
        x[:, self.span_target] = ((1 - self.adain) * inner + self.adain * new).to(x.dtype)
        return x


@dataclass
class Row:
    """One call's sequence: the layout, positions and masks of its rows."""

    layout: fr.TokenLayout
    positions: torch.Tensor
    key_mask: torch.Tensor | None = None
    bonus: torch.Tensor | None = None

    @classmethod
    def of(cls, host: TinyHost, layout: fr.TokenLayout) -> Row:
        """Rows that are all alike."""
        return cls(layout, positions_of(layout, host.convention))


@contextlib.contextmanager
def watching(host: TinyHost, model, row: Row):
    """The model with plain attention from the formulas, written down in the ``Seen`` that this yields."""
    seen = Seen()
    plain = Shared(host, row.layout.target, row.positions, row.key_mask, row.bonus, records=seen)
    with host.by_formulas(model, plain):
        yield seen


@contextlib.contextmanager
def sharing(host: TinyHost, model, row: Row, seen: Seen, reference: Row, **dials):
    """The model with shared attention from the formulas."""
    shared = Shared(host, row.layout.target, row.positions, row.key_mask, row.bonus, seen, reference.layout.target,
                    reference.positions, **dials)  # fmt: skip
    with host.by_formulas(model, shared):
        yield
