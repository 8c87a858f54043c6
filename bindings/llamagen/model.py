"""The LlamaGen transformer: parameter names and arithmetic of the published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from fastrope.checks import require, require_finite, require_tensor

from ..inputs import check_mask
from .checkpoint import load_weights, read_checkpoint

# Published sizes: dim, layers, heads. XL has text checkpoints; all have class checkpoints.
SIZES = {
    "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1280, 36, 20), "XXL": (1536, 48, 24), "3B": (3200, 24, 32),
}  # fmt: skip


@dataclass(frozen=True)
class LlamaGenConfig:
    """Shapes of a LlamaGen transformer. A grid of ``grid x grid`` image tokens follows ``prefix`` condition tokens.

    Args:
        dim, layers, heads, kv_heads: of the transformer; ``kv_heads`` None means as many as ``heads``.
        grid: image tokens per side: 16 for 256, 24 for 384, 32 for 512 pixels.
        condition: "text" (``prefix`` T5 features of ``caption_dim`` channels) or "class" (one label of ``classes``).
        vocabulary: image tokens.
        hidden: width of the feed-forward; None rounds 8/3 dim up to a multiple of 256, as published.

    Raises:
        ValueError: a head dim that four does not divide (two axes of interleaved pairs), an unknown condition.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int | None = None
    grid: int = 32
    condition: str = "text"
    vocabulary: int = 16384
    prefix: int = 120
    caption_dim: int = 2048
    classes: int = 1000
    theta: float = 10_000.0
    eps: float = 1e-5
    hidden: int | None = None

    def __post_init__(self) -> None:
        require(self.condition in ("text", "class"), "condition", '"text" or "class"', repr(self.condition))
        require(self.grid >= 1, "grid", "an integer >= 1", self.grid)
        ok = self.dim % self.heads == 0 and self.head_dim % 4 == 0
        require(ok, "dim", f"a multiple of 4 * heads = {4 * self.heads}", self.dim)
        require(self.heads % self.key_heads == 0, "kv_heads", f"a divisor of heads = {self.heads}", self.kv_heads)
        require(self.condition == "text" or self.prefix == 1, "prefix", "1 for a class condition", self.prefix)

    @classmethod
    def published(cls, size: str, grid: int = 32, condition: str = "text") -> LlamaGenConfig:
        """The configuration of a published size: "B", "L", "XL", "XXL", "3B"."""
        require(size in SIZES, "size", f"one of {', '.join(SIZES)}", repr(size))
        dim, layers, heads = SIZES[size]
        return cls(dim, layers, heads, grid=grid, condition=condition, prefix=120 if condition == "text" else 1)

    @classmethod
    def of_weights(cls, weights: Mapping[str, torch.Tensor], grid: int, heads: int | None = None) -> LlamaGenConfig:
        """Read the configuration off a state dict; heads off :data:`SIZES`, the grid cannot be seen and is told.

        Raises:
            ValueError: not LlamaGen's weights, or a size that is not published and no ``heads``.
        """
        expected = "a LlamaGen transformer's state dict"
        needed = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight")
        for name in needed:
            require(name in weights, "weights", f"{expected} with {name}", f"{len(weights)} other names")
        vocabulary, dim = weights["tok_embeddings.weight"].shape
        layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
        if heads is None:
            heads = next((h for d, n, h in SIZES.values() if (d, n) == (dim, layers)), None)
            received = f"dim {dim}, {layers} layers, and no heads"
            require(heads is not None, "heads", "the number of heads of a size that is not published", received)
        rows = weights["layers.0.attention.wqkv.weight"].shape[0]
        heads = cast(int, heads)
        shapes: dict[str, Any] = dict(dim=dim, layers=layers, heads=heads, grid=grid, vocabulary=vocabulary)
        key_heads = (rows // (dim // heads) - heads) // 2
        shapes["kv_heads"] = None if key_heads == heads else key_heads
        hidden = weights["layers.0.feed_forward.w1.weight"].shape[0]
        shapes["hidden"] = None if hidden == cls(dim, layers, heads).ffn_width else hidden
        if "cls_embedding.cap_proj.fc1.weight" in weights:
            prefix, caption_dim = weights["cls_embedding.uncond_embedding"].shape
            return cls(**shapes, condition="text", prefix=prefix, caption_dim=caption_dim)
        name = "cls_embedding.embedding_table.weight"
        require(name in weights, "weights", f"{expected} with a caption or class embedding", "neither")
        return cls(**shapes, condition="class", prefix=1, classes=weights[name].shape[0] - 1)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def ffn_width(self) -> int:
        """Width of the SwiGLU feed-forward."""
        return -(-int(2 * 4 * self.dim / 3) // 256) * 256 if self.hidden is None else self.hidden

    @property
    def num_tokens(self) -> int:
        """Image tokens, N."""
        return self.grid * self.grid


def rotation_table(config: LlamaGenConfig, device: torch.device | None = None) -> torch.Tensor:
    """Cosines and sines ``(prefix + N, head_dim / 2, 2)`` float32 of the 2-D rotary embedding.

    The first half of the pairs turns with the row, the second with the column, both from 0, by ``theta ** (-4c / D)``
    per token. Condition tokens carry (0, 0), not (1, 0): the published models were trained with it, so queries and
    keys of the condition vanish, every query sees all condition tokens with logit 0, and only their values count.
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
    """Turn interleaved pairs of ``x (B, S, H, D)`` by ``table (S, D/2, 2)`` in float32, back in the dtype of ``x``."""
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
        """Store ``(B, key heads, n, D)`` at ``start``; everything up to there."""
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
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Text features to condition tokens; the learned features of no text."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        features = torch.randn(config.prefix, config.caption_dim) / config.caption_dim**0.5
        self.register_buffer("uncond_embedding", features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.cap_proj(features)


class ClassEmbedding(nn.Module):
    """Labels to one condition token; the last row stands for no label."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.classes + 1, config.dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)[:, None]


class LlamaGen(nn.Module):
    """A causal transformer over condition tokens, then image tokens in raster order.

    Random weights unless loaded. ``embed`` and ``run`` are its two halves; ``forward`` is both over a whole image.
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
            source: a file, or what is in it: see :func:`read_checkpoint`.
            grid: image tokens per side.
            heads: of a size that is not published.
            device, dtype: to run in; None keeps those of the file.

        Raises:
            ValueError: names or shapes that are not LlamaGen's; the message lists them.
        """
        weights = read_checkpoint(source)
        with torch.device("meta"):
            model = cls(LlamaGenConfig.of_weights(weights, grid, heads))
        return load_weights(model, weights).to(device=device, dtype=dtype)

    def table(self, device: torch.device) -> torch.Tensor:
        """:func:`rotation_table` on ``device``, made once."""
        if self._table is None or self._table.device != device:
            self._table = rotation_table(self.config, device)
        return self._table

    def no_condition(self, batch: int) -> torch.Tensor:
        """The condition of the unconditional branch: features ``(B, prefix, caption_dim)`` or labels ``(B,)``."""
        if self.config.condition == "text":
            return self.cls_embedding.uncond_embedding.expand(batch, -1, -1)
        device = self.tok_embeddings.weight.device
        return torch.full((batch,), self.config.classes, dtype=torch.long, device=device)

    def check_condition(self, condition: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Raise ``ValueError`` unless ``condition`` and ``mask`` are as :meth:`forward` takes them."""
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
        """Of the weights."""
        return self.tok_embeddings.weight.dtype
