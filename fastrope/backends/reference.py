"""The specification: modulated attention in plain torch, equation by equation.

Materialises the ``(B, H, Sq, Sk)`` logits; for reading and for tests, not for pictures. It uses the modulations as the
user gave them and none of the lowered tables, so it can judge the backends that do.

Dtypes: float64 in, float64 throughout. Otherwise the rounding of a careful half-precision implementation: rotation in
float32 rounded to the input dtype, as are modulated keys; logits, softmax and accumulation in float32; probabilities
rounded to the input dtype before they meet the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..planning.resolved import Resolved
from ..rope import RoPE, rotate


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resolved: Resolved,
    scale: float,
    return_lse: bool = False,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Modulated attention.

    Args:
        q: ``(B, Sq, H, D)``; k, v: ``(B, Sk, Hkv, D)``, ``H % Hkv == 0``.
        resolved: what the user asked for.
        scale: factor of the logits.
        queries: ``(n,)`` indices; compute these queries only, ``out (B, n, H, D)``.

    Returns:
        ``out (B, Sq, H, D)`` in the input dtype and, if asked, ``lse (B, H, Sq)``, natural log, float32 or float64.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = torch.arange(q.shape[1], device=q.device) if queries is None else queries
    present = resolved.present
    if present is not None:  # what a masked key holds must not matter, not even a NaN
        k, v = k.masked_fill(~present[:, :, None, None], 0), v.masked_fill(~present[:, :, None, None], 0)
    s = logits(q[:, queries], k, resolved, scale, queries, wide)
    bias = _biases(resolved, queries, wide)
    if bias is not None:  # s_ij = ... + b_i + beta_j
        hidden = (bias == -torch.inf)[:, None]
        s = torch.where(hidden, -torch.inf, s + bias[:, None])
    p = s.softmax(dim=-1)
    if bias is not None:  # no key left: zeros
        p = p.masked_fill(hidden.all(dim=-1, keepdim=True), 0)
    vt = _values(v, resolved, wide)
    out = torch.einsum("bhij,bjhd->bihd", p.to(q.dtype).to(wide), _per_head(vt, q).to(wide)).to(q.dtype)
    return out, s.logsumexp(dim=-1) if return_lse else None


def _biases(resolved: Resolved, queries: Tensor, wide: torch.dtype) -> Tensor | None:
    """``b_i + beta_j``, ``(Bx, n, Sk)``; None without any. A masked key has ``-inf``."""
    total = None if resolved.key_bias is None else resolved.key_bias[:, None]
    for bias in resolved.biases:
        b = torch.where(bias.keys, bias.b[:, queries, None], 0)
        total = b if total is None else total + b
    return None if total is None else total.expand(-1, len(queries), -1).to(wide)


def _values(v: Tensor, resolved: Resolved, wide: torch.dtype) -> Tensor:
    """``vt``, rounded once to the dtype of v."""
    vt = v.to(wide)
    for group in resolved.value_groups:  # vt = lambda nu + delta (v - nu)
        nu = _mean(v.to(wide), group.keys if resolved.present is None else group.keys & resolved.present)
        bias, delta = (x.to(wide)[:, None, None, None] for x in (group.bias, group.delta))
        vt = torch.where(group.keys[:, None, None], bias * nu + delta * (vt - nu), vt)
    for u in resolved.value_gains:
        vt = u[:, :, None, None].to(wide) * vt
    return vt.to(v.dtype)


def logits(
    q: Tensor,
    k: Tensor,
    resolved: Resolved,
    scale: float,
    queries: Tensor,
    wide: torch.dtype,
) -> Tensor:
    """``s_ij``, ``(B, H, n, Sk)``, for the ``n`` queries whose indices are ``queries``."""
    scales = resolved.scale
    if scales is None:
        s = _logits_at(q, k, None, resolved, queries, wide)
    else:  # queries that share r_i share khat, so one pass per distinct value
        r = scales.r[:, queries]
        s = q.new_zeros((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dtype=wide)
        for value in r.unique():
            rows = (r == value).any(dim=0).nonzero().flatten()
            part = _logits_at(q[:, rows], k, value, resolved, queries[rows], wide)
            part = torch.where((r[:, rows] == value)[:, None, :, None], part, s[:, :, rows])
            s = s.index_copy(2, rows, part)
    s = s * scale
    for gain in resolved.gains:  # s_ij = g_i scale <...>
        g = torch.where(gain.keys, gain.g[:, queries, None].to(wide), 1)
        s = s * g[:, None]
    return s


def _logits_at(
    q: Tensor,
    k: Tensor,
    r: Tensor | None,
    resolved: Resolved,
    queries: Tensor,
    wide: torch.dtype,
) -> Tensor:
    """``<R(phi'[i]) q_i, ktt_ij>`` for queries that share one ``r`` (None: no QueryScale)."""
    rope, key_rope = resolved.rope, resolved.key_rope or resolved.rope
    khat = _rotated(k, key_rope, None, None, resolved)
    q_plain, q_scaled = _rotated(q, rope, queries, None, resolved), None
    if r is not None:
        covered = resolved.scale.keys[:, None, None]
        khat = torch.where(covered, _rotated(k, key_rope, None, r, resolved), khat)
        q_scaled = _rotated(q, rope, queries, r, resolved)
    kt = khat
    for group in resolved.key_groups:  # kt = lambda mu + delta (khat - mu)
        mu = _mean(khat.to(wide), group.keys if resolved.present is None else group.keys & resolved.present)
        bias, delta = (x.to(wide)[:, None, None, None] for x in (group.bias, group.delta))
        kt = torch.where(group.keys[:, None, None], (bias * mu + delta * (khat.to(wide) - mu)).to(k.dtype), kt)
    ktt = kt
    for weight in resolved.weights:  # ktt = w_c kt on pair c
        w = weight.w.to(wide)
        w = w.repeat_interleave(2) if rope.pairing == "interleaved" else torch.cat((w, w))
        ktt = torch.where(weight.keys[:, None, None], (w * ktt.to(wide)).to(k.dtype), ktt)
    ktt = _per_head(ktt, q).to(wide)
    s = torch.einsum("bihd,bjhd->bhij", q_plain.to(wide), ktt)
    if q_scaled is not None:
        s = torch.where(resolved.scale.keys, torch.einsum("bihd,bjhd->bhij", q_scaled.to(wide), ktt), s)
    return s


def _rotated(x: Tensor, rope: RoPE | None, tokens: Tensor | None, r: Tensor | None, resolved: Resolved) -> Tensor:
    """``R(phi') x`` with ``phi' = r phi`` on the scaled pairs (r None: ``phi``), less what is applied already."""
    if rope is None:
        return x
    phi = rope.angles if tokens is None else rope.angles[..., tokens, :]
    turn = phi if r is None else torch.where(resolved.scale.pairs, r * phi.to(r.dtype), phi)
    if rope.applied:
        turn = turn - phi
        if r is None:
            return x
    return rotate(x, turn, rope.pairing)


def _mean(khat: Tensor, member: Tensor) -> Tensor:
    """``mu``: mean over member keys, ``(B, 1, Hkv, D)``; zero where there is none."""
    member = torch.atleast_2d(member)[:, :, None, None].to(khat.dtype)
    return (khat * member).sum(dim=1, keepdim=True) / member.sum(dim=1, keepdim=True).clamp(min=1)


def _per_head(x: Tensor, q: Tensor) -> Tensor:
    """Repeat key heads for grouped-query attention."""
    return x.repeat_interleave(q.shape[2] // x.shape[2], dim=2)
