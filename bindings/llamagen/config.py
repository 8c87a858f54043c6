"""Shapes of LlamaGen transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from fastrope.checks import require

# Published sizes: dim, layers, heads. Text checkpoints exist for XL, class checkpoints for all.
SIZES = {
    "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1280, 36, 20), "XXL": (1536, 48, 24), "3B": (3200, 24, 32),
}  # fmt: skip


@dataclass(frozen=True)
class LlamaGenConfig:
    """Shapes of a LlamaGen transformer. ``prefix`` condition tokens come first, then ``grid x grid`` image tokens.

    Args:
        dim, layers, heads, kv_heads: of the transformer; ``kv_heads=None`` means as many as ``heads``.
        grid: image tokens per side: 16 for 256, 24 for 384, 32 for 512 pixels.
        condition: "text" (``prefix`` T5 features of ``caption_dim`` channels) or "class" (one label of ``classes``).
        vocabulary: number of image tokens to choose from.
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
        """The configuration of a state dict.

        Args:
            grid: image tokens per side, which the weights do not show.
            heads: None: those of :data:`SIZES`.

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
        """Channels of a head."""
        return self.dim // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def ffn_width(self) -> int:
        """Width of the SwiGLU feed-forward."""
        return -(-int(2 * 4 * self.dim / 3) // 256) * 256 if self.hidden is None else self.hidden

    @property
    def num_tokens(self) -> int:
        """Image tokens, N."""
        return self.grid * self.grid
