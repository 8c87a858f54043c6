"""Attention processors, one per shape of the hosts' own.

A processor is a plain object: a module would enter the host's ``state_dict``. It holds no number, because a compiler
specialises on every number it meets; the plan of a call reaches it through its :class:`Slot`.
"""

from __future__ import annotations

import torch

import fastrope as fr


class Slot:
    """What one attention layer is to do in the current call: a plan, or None for the host's own attention."""

    def __init__(self, backend: str):
        self.plan: fr.Plan | None = None
        self.filled = False
        self.backend = backend


class BoundProcessor:
    """A processor that stands in for ``original``; diffusers' settings pass through to that."""

    def __init__(self, original, slot: Slot):
        self.original = original
        self.slot = slot

    @property
    def _attention_backend(self):
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend):
        self.original._attention_backend = backend

    @property
    def _parallel_config(self):
        return None

    @_parallel_config.setter
    def _parallel_config(self, config):
        if config is not None:
            raise NotImplementedError(
                "context parallelism: expected a model that no fastrope handle is bound to, since modulations need the "
                "whole sequence on one device; call handle.remove() first"
            )

    def plan(self) -> fr.Plan | None:
        """The plan of this call.

        Raises:
            ValueError: the layer was called before the transformer was.
        """
        if not self.slot.filled:
            raise ValueError(
                "transformer: expected a call of the object that fastrope.apply was given, received one that went "
                "round it, so that the layout of the sequence is unknown"
            )
        return self.slot.plan


class FluxProcessor(BoundProcessor):
    """FLUX.1: double-stream blocks project text and image apart and join them as ``[text | image]``; single-stream
    blocks get the joint sequence. Queries and keys are normalised here and rotated inside the op."""

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        """``hidden_states (B, S_image or S, C)``, ``encoder_hidden_states (B, S_text, C)`` in double-stream blocks."""
        plan = self.plan()
        if plan is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attention_mask is not None:
            raise NotImplementedError("attention_mask: expected None in a modulated layer of FLUX, received a mask")
        q, k, v = _project(attn, hidden_states, "to_qkv", ("to_q", "to_k", "to_v"))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            text = _project(attn, encoder_hidden_states, "to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))
            text = attn.norm_added_q(text[0]), attn.norm_added_k(text[1]), text[2]
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, (q, k, v), strict=True))
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast normalises in float32
        out = fr.attention(q, k, v, plan=plan, backend=self.slot.backend).flatten(2)
        if encoder_hidden_states is None:
            return out
        split = encoder_hidden_states.shape[1]
        image = attn.to_out[0](out[:, split:].contiguous())
        return attn.to_out[1](image), attn.to_add_out(out[:, :split].contiguous())


def _project(attn, x: torch.Tensor, fused: str, separate: tuple[str, str, str]) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values ``(B, S, heads, D)``; the head count is what a tensor-parallel shard holds."""
    if attn.fused_projections:
        parts = getattr(attn, fused)(x).chunk(3, dim=-1)
    else:
        parts = [getattr(attn, name)(x) for name in separate]
    return tuple(part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
