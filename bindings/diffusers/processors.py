"""Attention processors that replace those of the hosts, one class per signature.

A processor projects as the host does and passes the streams to :meth:`BoundProcessor.attend`, which normalises, joins
and attends. Then it projects the result. It is a plain object, because a module would enter the host's ``state_dict``.

Every ``__call__`` has the argument names of the processor that it replaces, because attention modules pass only the
arguments that they find in its signature.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm

import fastrope as fr
from fastrope import Stream

from .layer_op import Layer, host_attention
from .skipping import perturbed, register

IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


class BoundProcessor:
    """A processor that replaces ``original``. diffusers' settings pass through to the original."""

    def __init__(self, original: Any = None, layer: Layer | None = None) -> None:
        if original is None:  # an IP-Adapter that is loaded creates the processors again that it does not replace
            raise NotImplementedError(
                "IP-Adapter: expected a transformer without a bound fastrope handle, received one with it; call "
                "handle.remove() before loading it"
            )
        register(type(self), type(original))
        self.original = original
        self.layer: Any = layer
        self.layer.original = original

    @property
    def _attention_backend(self):
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any):
        self.original._attention_backend = backend

    @property
    def _parallel_config(self):
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any):
        self.original._parallel_config = config

    def unmodulated(self) -> bool:
        """True if the host's own processor is to run. For a compiled layer the op decides this later."""
        return perturbed() or (not torch.compiler.is_compiling() and self.layer.state.idle)

    def attend(self, streams: list[Stream], table: Any, mask: torch.Tensor | None = None) -> torch.Tensor | None:
        """Attention over the streams, joined in the order given.

        Args:
            table: the host's rotary table for the joint sequence.
            mask: the host's mask, as its attention backend takes it.

        Returns:
            ``(B, S, heads * D)``, or None if the host's own processor is to run after all.
        """
        if table is None:
            raise NotImplementedError("rotary embedding: expected the host's table in a bound layer, received None")
        compiling = torch.compiler.is_compiling()
        if not compiling and not self.layer.applied:
            out = self.layer.attend_streams([_as_projected(s) for s in streams], mask)
            if out is not None:
                return out.flatten(2)
        q, k, v = self.prepare(streams, table if compiling or self.layer.applied else None)
        if compiling:
            if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
                raise NotImplementedError(
                    "compiled transformer: expected torch.no_grad() while a fastrope handle is bound, received tensors "
                    "that require grad; use the transformer without torch.compile for gradients"
                )
            return host_attention(q, k, v, mask, self.layer.address).flatten(2)
        out = self.layer.attend(q, k, v, mask, self.layer.applied)
        return None if out is None else out.flatten(2)

    def prepare(self, streams: list[Stream], table: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """QK norm, concatenation and, with a ``table``, the host's rotation: ``q, k, v (B, S, heads, D)``."""
        parts = [(q if nq is None else nq(q), k if nk is None else nk(k), v) for q, k, v, nq, nk in streams]
        q, k, v = parts[0] if len(parts) == 1 else (torch.cat(some, dim=1) for some in zip(*parts, strict=True))
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the norms return float32
        return (q, k, v) if table is None else (self.rotate(q, table), self.rotate(k, table), v)

    @staticmethod
    def rotate(x: torch.Tensor, table: Any) -> torch.Tensor:
        """The host's rotation of ``x (B, S, H, D)``. Here the table is ``(cos, sin)``, ``(S, D)`` each, for interleaved
        pairs."""
        return cast(torch.Tensor, apply_rotary_emb(x, table, sequence_dim=1))


class FluxProcessor(BoundProcessor):
    """FLUX.1 and related hosts, and FLUX.2's double-stream blocks. Double-stream blocks project text and image apart
    and join them as ``[text | image]``. Single-stream blocks get the joint sequence."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """``hidden_states (B, S_image or S, C)``, ``encoder_hidden_states (B, S_text, C)`` in double-stream blocks."""
        given = attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        if self.unmodulated():
            return self.original(*given)
        streams = [Stream(*_project(attn, hidden_states, "to_qkv", IMAGE), attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            text = _project(attn, encoder_hidden_states, "to_added_qkv", TEXT)
            streams.insert(0, Stream(*text, attn.norm_added_q, attn.norm_added_k))
        out = self.attend(streams, image_rotary_emb, attention_mask)
        if out is None:
            return self.original(*given)
        if encoder_hidden_states is None:
            return out
        return _project_joint(attn, out, encoder_hidden_states.shape[1])


class Flux2SingleProcessor(BoundProcessor):
    """FLUX.2's single-stream blocks. One projection makes queries, keys, values and the input of the MLP, so ``v`` is a
    strided view. One projection takes the outputs of attention and MLP."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """``hidden_states (B, S, C)``, text first."""
        if self.unmodulated():
            return self.original(attn, hidden_states, attention_mask, image_rotary_emb)
        joint = attn.to_qkv_mlp_proj(hidden_states)
        heads, mlp = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        width = joint.shape[-1] * heads // (heads + mlp)  # a tensor-parallel shard keeps the proportion
        q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in joint[..., :width].chunk(3, dim=-1))
        out = self.attend([Stream(q, k, v, attn.norm_q, attn.norm_k)], image_rotary_emb, attention_mask)
        if out is None:
            return self.original(attn, hidden_states, attention_mask, image_rotary_emb)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(joint[..., width:])], dim=-1))


class QwenProcessor(BoundProcessor):
    """Qwen-Image: every block joins ``[text | image]``. The rotary tables are complex, one for each part."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """``hidden_states (B, S_image, C)``, ``encoder_hidden_states (B, S_text, C)`` and its mask ``(B, S_text)``."""
        text_mask = encoder_hidden_states_mask
        given = attn, hidden_states, encoder_hidden_states, text_mask, attention_mask, image_rotary_emb
        if self.unmodulated():
            return self.original(*given)
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None, as in the host's own processor, received a mask")
        mask = None
        if text_mask is not None:
            image = text_mask.new_ones(hidden_states.shape[:2])
            mask = torch.cat([text_mask, image], dim=1)[:, None, None, :]
        dim = attn.inner_dim // attn.heads
        text = Stream(*_separate(attn, encoder_hidden_states, TEXT, dim), attn.norm_added_q, attn.norm_added_k)
        image = Stream(*_separate(attn, hidden_states, IMAGE, dim), attn.norm_q, attn.norm_k)
        table = None if image_rotary_emb is None else torch.cat([image_rotary_emb[1], image_rotary_emb[0]])
        out = self.attend([text, image], table, mask)
        if out is None:
            return self.original(*given)
        return _project_joint(attn, out, encoder_hidden_states.shape[1])

    @staticmethod
    def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The table holds unit complex numbers, ``(S, D/2)`` or ``(B, S, D/2)``."""
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table.unsqueeze(-2)).flatten(-2).type_as(x)


class ZImageProcessor(BoundProcessor):
    """Z-Image: one stream ``[image | text]`` with common weights. Tables and masks differ from row to row."""

    rotate = staticmethod(QwenProcessor.rotate)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> Any:
        """``hidden_states (B, S, C)``, ``attention_mask (B, S)``, ``freqs_cis (B, S, D/2)`` complex."""
        if self.unmodulated():
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        q, k, v = (getattr(attn, name)(hidden_states).unflatten(-1, (attn.heads, -1)) for name in IMAGE)
        mask = attention_mask
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None, :]
        out = self.attend([Stream(q, k, v, attn.norm_q, attn.norm_k)], freqs_cis, mask)
        if out is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        out = attn.to_out[0](out)
        return attn.to_out[1](out) if len(attn.to_out) > 1 else out


def _project(
    attn: Any, x: torch.Tensor, fused: str, separate: tuple[str, str, str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``(B, S, heads, D)``. A tensor-parallel shard holds some of the heads."""
    if attn.fused_projections:
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in getattr(attn, fused)(x).chunk(3, dim=-1))
        return q, k, v
    return _separate(attn, x, separate, attn.head_dim)


def _separate(
    attn: Any, x: Any, names: tuple[str, str, str], dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (getattr(attn, name)(x).unflatten(-1, (-1, dim)) for name in names)
    return q, k, v


def _project_joint(attn: Any, out: torch.Tensor, text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text parts of ``out (B, S, C)``, each through its own projection."""
    image = attn.to_out[0](out[:, text:].contiguous())
    if len(attn.to_out) > 1:
        image = attn.to_out[1](image)
    return image, attn.to_add_out(out[:, :text].contiguous())


def _as_projected(stream: Stream) -> Stream | None:
    """A stream for :func:`fastrope.joint_attention`, or None if a norm is not an RMS norm over the head dim."""
    norms = [_as_norm(norm, x) for norm, x in ((stream.norm_q, stream.q), (stream.norm_k, stream.k))]
    return None if None in norms else Stream(stream.q, stream.k, stream.v, *norms)


def _as_norm(module: Any, x: torch.Tensor) -> fr.Norm | None:
    """The RMS norm that a module computes. None for other modules, and for one with hooks of offloading or adapters."""
    if type(module) not in (torch.nn.RMSNorm, RMSNorm) or getattr(module, "bias", None) is not None:
        return None
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    # Without an eps, torch's norm takes a value that depends on how it is computed.
    if module.eps is None or tuple(getattr(module, "normalized_shape", x.shape[3:])) != tuple(x.shape[3:]):
        return None
    weight = module.weight
    if weight is None:
        return fr.Norm(None, module.eps)
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)  # neither quantised nor sharded
    return fr.Norm(weight, module.eps) if plain and weight.shape == x.shape[3:] and weight.device == x.device else None
