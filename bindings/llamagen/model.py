"""The LlamaGen transformer: parameter names and arithmetic of the published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastrope.checks import require, require_finite, require_tensor

from ..inputs import check_mask
from .checkpoint import load_weights, read_checkpoint
from .config import LlamaGenConfig


def rotation_table(config: LlamaGenConfig, device: torch.device | None = None) -> torch.Tensor:
    """Cosines and sines ``(prefix + N, head_dim / 2, 2)`` float32 of the 2-D rotary embedding.

    The first half of the pairs turns with the row, the second half with the column, both from 0, by
    ``theta ** (-4c / D)`` per token. Condition tokens have (0, 0) and not (1, 0), as in the training of the published
    models. So queries and keys of the condition are zero, and every query gives all condition tokens the logit 0.
    """
    half = config.head_dim // 2
    frequency = config.theta ** (-torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    turn = torch.arange(config.grid, dtype=torch.float32, device=device)[:, None] * frequency
    rows = turn[:, None].expand(-1, config.grid, -1)
    columns = turn[None].expand(config.grid, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([table.new_zeros(config.prefix, *table.shape[1:]), table])


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate interleaved pairs of ``x (B, S, H, D)`` by ``table (S, D/2, 2)``, in float32; the result has the dtype of
    ``x``."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = (part[None, :, None] for part in table.unbind(-1))
    first, second = pairs.unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).type_as(x)


class Cache:
    """Keys and values of every layer, ``(layers, B, key heads, length, D)``, filled from the front."""

    def __init__(self, config: LlamaGenConfig, batch: int, length: int, like: torch.Tensor) -> None:
        shape = (config.layers, batch, config.key_heads, length, config.head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def extend(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``(B, key heads, n, D)`` at ``start``, and return everything up to its end."""
        end = start + keys.shape[2]
        self.keys[layer, :, :, start:end] = keys
        self.values[layer, :, :, start:end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, the quotient in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Attention(nn.Module):
    """Causal self-attention of ``x (B, n, dim)`` with rotary embedding. ``extend`` adds keys and values to a cache and
    returns all so far. ``mask (B, 1, 1 or n, length)`` is bool, True where a query sees a token."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_dim = config.heads, config.key_heads, config.head_dim
        self.wqkv = nn.Linear(config.dim, (self.heads + 2 * self.key_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor, table: torch.Tensor, mask: torch.Tensor | None, extend: Any) -> torch.Tensor:
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.key_heads, self.key_heads], dim=2)
        q, k, v = rotate(q, table).transpose(1, 2), rotate(k, table).transpose(1, 2), v.transpose(1, 2)
        k, v = extend(k, v)
        causal = mask is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.heads != self.key_heads
        )
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward of ``x (B, n, dim)``, each normalised first and added."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.eps)
        self.ffn_norm = RMSNorm(config.dim, config.eps)

    def forward(self, x: torch.Tensor, table: torch.Tensor, mask: torch.Tensor | None, extend: Any) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), table, mask, extend)
        return x + self.feed_forward(self.ffn_norm(x))


class CaptionProjection(nn.Module):
    """Two linear layers with GELU, ``(B, prefix, caption_dim)`` to ``(B, prefix, dim)``."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """From text features to condition tokens; also holds the learned features for no text."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        features = torch.randn(config.prefix, config.caption_dim) / config.caption_dim**0.5
        self.register_buffer("uncond_embedding", features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.cap_proj(features)


class ClassEmbedding(nn.Module):
    """From labels to one condition token each; the last row means no label."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.classes + 1, config.dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)[:, None]


class LlamaGen(nn.Module):
    """A causal transformer over condition tokens, then image tokens in raster order.

    Weights are random until they are loaded. :meth:`run` is one step of generation, ``forward`` a whole image.
    """

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding: Any = CaptionEmbedding(config) if config.condition == "text" else ClassEmbedding(config)
        self.tok_embeddings = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.eps)
        self.output = nn.Linear(config.dim, config.vocabulary, bias=False)
        self._table: torch.Tensor | None = None

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path | Mapping,
        *,
        grid: int,
        heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LlamaGen:
        """A published checkpoint (``t2i_XL_stage1_256.pt``: grid 16; ``t2i_XL_stage2_512.pt``: grid 32), ready to run.

        Args:
            source: a file or its content, see :func:`read_checkpoint`.
            grid: image tokens per side.
            heads: needed for a size that is not published.
            device, dtype: to run in; None means those of the file.

        Raises:
            ValueError: names or shapes that are not LlamaGen's; the message lists them.
        """
        weights = read_checkpoint(source)
        with torch.device("meta"):
            model = cls(LlamaGenConfig.of_weights(weights, grid, heads))
        return load_weights(model, weights).to(device=device, dtype=dtype)

    def table(self, device: torch.device) -> torch.Tensor:
        """:func:`rotation_table` on ``device``, computed once."""
        if self._table is None or self._table.device != device:
            self._table = rotation_table(self.config, device)
        return self._table

    def no_condition(self, batch: int) -> torch.Tensor:
        """The condition of the unconditional branch: features ``(B, prefix, caption_dim)``, or labels ``(B,)``."""
        if self.config.condition == "text":
            return self.cls_embedding.uncond_embedding.expand(batch, -1, -1)
        device = self.tok_embeddings.weight.device
        return torch.full((batch,), self.config.classes, dtype=torch.long, device=device)

    def check_condition(self, condition: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Require ``condition`` and ``mask`` as :meth:`forward` takes them.

        Raises:
            ValueError: naming the argument.
        """
        c = self.config
        if c.condition == "class":
            require_tensor("condition", condition, (1,), "(B,) of labels")
            require(condition.dtype in (torch.int32, torch.int64), "condition", "integer labels", condition.dtype)
            wrong = condition[(condition < 0) | (condition > c.classes)].tolist()
            require(not wrong, "condition", f"labels below {c.classes}, or {c.classes} for none", wrong[:3])
            require(mask is None, "mask", "None with a class condition", "a mask")
            return
        require_tensor("condition", condition, (3,), f"(B, {c.prefix}, {c.caption_dim})")
        shape = tuple(condition.shape[1:])
        require(shape == (c.prefix, c.caption_dim), "condition", f"shape (B, {c.prefix}, {c.caption_dim})", shape)
        require(condition.is_floating_point(), "condition", "floating-point features", condition.dtype)
        made_by = "as encode_prompts returns them"
        if mask is not None:
            batch, length = condition.shape[:2]
            check_mask("mask", mask, (batch, length), f"features at the end of the prefix, {made_by}")
        require_finite("condition", condition, ("row", "token", "channel"))
        padded = mask is None and not bool(condition.any(-1).all())
        require(not padded, "mask", f"the mask of condition, {made_by}", "None, though some features are all zero")

    def run(
        self,
        x: torch.Tensor,
        start: int = 0,
        visible: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Logits ``(B, n, V)`` float32 of embeddings ``x (B, n, dim)`` at sequence positions ``start ...``.

        Args:
            start: position of the first; condition tokens are 0 .. prefix - 1. Above 0 only with a cache, and n = 1.
            visible: positions that count, ``(B, >= start + n)`` bool; every token sees itself all the same.
            cache: holds the keys and values of positions before ``start``, and takes those of these.
        """
        end = start + x.shape[1]
        require(start == 0 or x.shape[1] == 1, "x", "one token after the first run", x.shape[1])
        mask = None
        if visible is not None and start > 0:
            mask = visible[:, None, None, :end]
        elif visible is not None:
            position = torch.arange(end, device=x.device)
            causal = position <= position[:, None]
            mask = ((causal & visible[:, None, :end]) | (position == position[:, None]))[:, None]
        table = self.table(x.device)[start:end]
        for index, layer in enumerate(self.layers):
            extend = (lambda k, v: (k, v)) if cache is None else (lambda k, v, i=index: cache.extend(i, start, k, v))
            x = layer(x, table, mask, extend)
        return self.output(self.norm(x)).float()

    def forward(self, tokens: torch.Tensor, condition: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``(B, n + 1, V)`` float32: ``[:, i]`` predicts image token i from the condition and tokens before it.

        Args:
            tokens: ``(B, n)`` long, the first ``n < N`` image tokens.
            condition: features ``(B, prefix, caption_dim)``, or labels ``(B,)``.
            mask: condition tokens that count, ``(B, prefix)`` bool.
        """
        self.check_condition(condition, mask)
        prefix = self.cls_embedding(condition.to(self.dtype) if condition.is_floating_point() else condition)
        x = torch.cat([prefix, self.tok_embeddings(tokens)], dim=1)
        visible = None if mask is None else F.pad(mask.bool(), (0, tokens.shape[1]), value=True)
        return self.run(x, visible=visible)[:, self.config.prefix - 1 :]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.tok_embeddings.weight.dtype
