"""torch's own function with our keywords, so that code written against torch changes one import."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .api import attention
from .checks import require, require_tensor
from .modulations import KeyBias


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`torch.nn.functional.scaled_dot_product_attention` with rotary embedding and modulations.

    Args:
        query: ``(B, H, Sq, D)``; key, value: ``(B, Hkv, Sk, D)``. Heads come before tokens, as torch has them and
            :func:`fastrope.attention` has not.
        attn_mask: one row for all heads and queries, broadcast from ``(B, 1, 1, Sk)``: bool, True = attend, or numbers
            that are added to the logits. Without a ``plan``, which has both already.
        dropout_p, is_causal: 0 and False.
        scale: factor of the logits, ``D ** -0.5`` by default.
        enable_gqa: allow fewer heads of keys than of queries.
        options: of :func:`fastrope.attention`: ``rope``, ``key_rope``, ``modulations``, ``plan``, ``return_lse``,
            ``backend``, ``plain``, ``debug``.

    Returns:
        ``(B, H, Sq, D)`` in the dtype of ``query``; with ``return_lse`` also ``lse (B, H, Sq)``.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: dropout, a causal mask, a mask that differs between queries or heads.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        require_tensor(name, x, (4,), "(B, H, S, D)")
    if dropout_p != 0 or is_causal:
        raise NotImplementedError(
            f"dropout_p, is_causal: expected 0.0 and False, received {dropout_p} and {is_causal}; take torch's function"
        )
    same = key.shape[1] == query.shape[1]
    require(same or enable_gqa, "key", f"{query.shape[1]} heads, as query (or enable_gqa=True)", key.shape[1])
    if attn_mask is not None:
        options |= _of_keys(attn_mask, key.shape[2], options)
    found = attention(*(x.transpose(1, 2) for x in (query, key, value)), scale=scale, **options)
    if isinstance(found, tuple):
        return found[0].transpose(1, 2), found[1]
    return found.transpose(1, 2)


def _of_keys(mask: Tensor, num_keys: int, options: dict[str, Any]) -> dict[str, Any]:
    """A mask of torch's as arguments of ours."""
    require(isinstance(mask, Tensor), "attn_mask", "a torch.Tensor or None", type(mask).__name__)
    require("key_mask" not in options, "key_mask", "None beside attn_mask", "both")
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(shape) != 4 or shape[1:3] != (1, 1):
        raise NotImplementedError(
            f"attn_mask: expected (B, 1, 1, {num_keys}), the same for all heads and queries, received "
            f"{tuple(mask.shape)}; say what differs between queries by fastrope.LogitBias on sets of keys"
        )
    rows = mask.reshape(shape[0], shape[3]).expand(-1, num_keys) if shape[3] == 1 else mask.reshape(shape[0], shape[3])
    if mask.dtype == torch.bool:
        return {"key_mask": rows}
    return {"modulations": [*options.get("modulations", ()), KeyBias(rows)]}
