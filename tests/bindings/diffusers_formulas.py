"""Modulated attention of every host, read off the formulas: logits and weights of every pair in full.

Nothing here is shared with the binding or with any backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import fastrope as fr


@dataclass
class Attention:
    """``out (B, S, H * D)`` from normalised, unrotated q, k, v.

    Args:
        positions: ``(S, axes)`` or ``(B, S, axes)``.
        axes: channels per axis; theta: of the frequencies.
        mods: modulations; key_mask: ``(B, S)`` bool.
        bias: ``(B, S, S)``, added to the logits last.
        weights: the last call's softmax ``(B, H, Sq, Sk)``, kept for who wants to look.
    """

    positions: torch.Tensor
    axes: tuple[int, ...]
    theta: float
    mods: list
    key_mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    weights: list = field(default_factory=list)

    def __call__(self, q, k, v):
        batch, length, _, dim = q.shape
        positions = self.positions.double().expand(batch, -1, -1)
        frequencies = [self.theta ** (-torch.arange(0, d, 2).double() / d) for d in self.axes]
        angles = torch.cat([positions[..., a, None] * f for a, f in enumerate(frequencies)], dim=-1)  # (B, S, pairs)
        axis = torch.cat([torch.full((d // 2,), a) for a, d in enumerate(self.axes)])
        alive = torch.ones(batch, length, dtype=torch.bool) if self.key_mask is None else self.key_mask
        # One angle per batch row, query, key and pair: phi' on either side.
        factor = torch.ones(batch, length, length, dim // 2, dtype=torch.float64)
        weight = torch.ones(length, dim // 2, dtype=torch.float64)
        gain = torch.ones(batch, length, length, dtype=torch.float64)
        added, value_gain = torch.zeros_like(gain), torch.ones(batch, length, dtype=torch.float64)
        groups, value_groups = [], []
        for m in self.mods:
            if isinstance(m, fr.KeyBias):
                added = added + m.bias.double().reshape(-1, 1, length)
                continue
            keys = torch.zeros(length, dtype=torch.bool)
            keys[m.keys] = True
            if isinstance(m, fr.QueryScale):
                pairs = torch.isin(axis, torch.tensor(m.axes))
                r = m.scale.double().reshape(-1, length, 1, 1).expand(batch, length, length, dim // 2)
                factor = torch.where(keys[:, None] & pairs, r, factor)
            elif isinstance(m, fr.BandWeight):
                weight = weight * torch.where(keys[:, None], m.weight.double(), 1.0)
            elif isinstance(m, fr.BiasDelta):
                (groups if m.on == "keys" else value_groups).append((keys, m.bias, m.delta))
            elif isinstance(m, fr.LogitBias):
                bias = torch.as_tensor(m.bias, dtype=torch.float64)
                bias = bias.reshape(bias.shape if bias.ndim == 2 else (1, -1))[..., None]  # (B or 1, S or 1, 1)
                added = added + torch.where(keys, bias, 0.0)
            elif isinstance(m, fr.ValueGain):
                value_gain[:, m.keys] *= torch.as_tensor(m.gain, dtype=torch.float64)
            else:
                gain = gain * torch.where(keys, m.gain.double().reshape(-1, length, 1), 1.0)
        q = torch.view_as_complex(q.double().unflatten(-1, (-1, 2)).contiguous())  # (B, S, H, pairs)
        k = torch.view_as_complex(k.double().unflatten(-1, (-1, 2)).contiguous())
        turn_q = torch.exp(1j * factor * angles[:, :, None])  # (B, Sq, Sk, pairs)
        turn_k = torch.exp(1j * factor * angles[:, None])
        k_hat = torch.einsum("bjhc,bijc->bijhc", k, turn_k)
        for keys, bias, delta in groups:
            member = (keys & alive).double()  # (B, Sk)
            mu = torch.einsum("bijhc,bj->bihc", k_hat, member.to(k_hat.dtype)) / member.sum(1)[:, None, None, None]
            k_hat = torch.where(keys[:, None, None], bias * mu[:, :, None] + delta * (k_hat - mu[:, :, None]), k_hat)
        k_hat = k_hat * weight[:, None, :]
        s = torch.einsum("bihc,bijc,bijhc->bhij", q.conj(), turn_q.conj(), k_hat).real
        s = s * gain[:, None] * dim**-0.5 + added[:, None]
        s = s.masked_fill(~alive[:, None, None], -torch.inf)
        if self.bias is not None:
            s = s + self.bias[:, None]
        p = s.softmax(dim=-1)
        self.weights.append(p)
        values = v.double()
        for keys, bias, delta in value_groups:
            member = (keys & alive).double()
            nu = torch.einsum("bjhd,bj->bhd", values, member) / member.sum(1)[:, None, None]
            values = torch.where(keys[:, None, None], bias * nu[:, None] + delta * (values - nu[:, None]), values)
        values = values * value_gain[..., None, None]
        return torch.einsum("bhij,bjhd->bihd", p, values).to(v.dtype).flatten(2)


class Flux:
    """FLUX.1 and its kin, double blocks of FLUX.2."""

    def __init__(self, attend):
        self.attend = attend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        image = heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is None:
            return self.attend(*image)
        added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
        text = heads(attn, encoder_hidden_states, *added)
        out = self.attend(*(torch.cat([t, i], dim=1) for t, i in zip(text, image, strict=True)))
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](out[:, length:]), attn.to_add_out(out[:, :length])


class Qwen(Flux):
    """Qwen-Image and its editors: the same, with the mask's name among the arguments."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        encoder_hidden_states_mask=None,
        attention_mask=None,
        image_rotary_emb=None,
    ):
        return super().__call__(attn, hidden_states, encoder_hidden_states)


class Flux2Single:
    """Single blocks of FLUX.2: QKV and MLP in one projection."""

    def __init__(self, attend):
        self.attend = attend

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        x = attn.to_qkv_mlp_proj(hidden_states)
        n = attn.heads * attn.head_dim
        q, k, v = (x[..., i * n : (i + 1) * n].unflatten(-1, (attn.heads, -1)) for i in range(3))
        gate, value = x[..., 3 * n :].chunk(2, dim=-1)
        mlp = torch.nn.functional.silu(gate) * value
        return attn.to_out(torch.cat([self.attend(attn.norm_q(q), attn.norm_k(k), v), mlp], dim=-1))


class ZImage:
    """Z-Image's joint blocks."""

    def __init__(self, attend):
        self.attend = attend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None):
        out = self.attend(*heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k))
        return attn.to_out[0](out)


def heads(attn, x, to_q, to_k, to_v, norm_q, norm_k):
    """Normalised queries and keys, and values, ``(B, S, heads, D)``."""
    q, k, v = (to(x).reshape(*x.shape[:2], attn.heads, -1) for to in (to_q, to_k, to_v))
    return norm_q(q), norm_k(k), v
