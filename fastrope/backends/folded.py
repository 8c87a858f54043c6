"""Modulations folded into the keys by the kernels, then torch's ``scaled_dot_product_attention``.

``sdpa`` runs so where the kernels run, forward, for plans of rotation, BandWeight and BiasDelta: nothing is left for a
loop over keys but plain attention. That is also so for the unmodulated queries of any plan (``split_rows.py``). One
pass over q and one over k gather, join, normalise, rotate and weigh. Keys of groups take two more, one for the mean and
one for ``kt = (lambda - delta) mu + delta khat``.

Under a mask, the plan knows which keys each batch row keeps. These are gathered, and every row is a call of its own
over as many keys as it has: a mask in the call would send torch to a slower kernel.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from .. import device as devices
from .. import kernels
from ..kernels.streams import Projected
from ..planning.lowered import Lowered
from .fused import configs, key_bias, launching_on, pack_values
from .plain import Plain, each_row

MOST_ROWS = 16  # of a mask: a call each; two are measured, more are predicted to pay


def folds(lowered: Lowered) -> bool:
    """Whether all that a plan says can be said of keys and values: no QueryScale, no LogitGain, no bias, and no mask of
    so many rows that a call for each would cost more than our loop."""
    keys = lowered.keys
    apart = lowered.scales is not None or lowered.gains is not None or lowered.biases is not None
    return not apart and not keys.biased and len(keys.unmasked) <= MOST_ROWS


def takes(q: Projected, lowered: Lowered) -> bool:
    """Whether :func:`run` is for tensors like ``q`` under this plan."""
    return folds(lowered) and devices.on_gpu(q) and devices.kernel_obstacle(q) is None


def run(
    q: Projected,
    k: Projected,
    v: Projected,
    lowered: Lowered,
    scale: float,
    packed: tuple[Tensor | None, Tensor | None] = (None, None),
    plain: Plain | None = None,
) -> Tensor:
    """``out (B, Sq, H, D)`` of a plan that :func:`folds`, or of the unmodulated queries of any plan; forward only.

    Arguments as of :func:`fastrope.backends.fused.run`. ``packed`` has keys and values ``(B, Hkv, Sk, D)`` that are
    prepared already, ``plain`` the attention that takes the work, torch's by default. Extra memory: one copy each of k,
    of q where it is rotated, and of v where it is joined, sorted or modulated; under a mask, one more of k and of v,
    and one of the output.
    """
    rows, heads, key_heads = _rows(lowered), q.shape[2], k.shape[2]
    with launching_on(q.device):
        # The output lies as the queries do: tokens first, so that it is not copied. Grouped heads, which become more
        # rows of the same key head, lie together the other way.
        queries = _prepared("q", q, lowered, rows, tokens_first=heads == key_heads)
        keys, values = (
            _prepared(name, x, lowered, rows) if done is None or not kernels.describable(done) else done
            for name, x, done in zip("kv", (k, v), packed, strict=True)
        )
        if lowered.groups is not None:
            _move_groups(keys, lowered)
        queries, keys, values = map(_tokens, (queries, keys, values))
        return each_row(queries, keys, values, scale, lowered.keys.unmasked, plain or _plain, _gathered)


def _plain(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Torch's attention of ``(B, Sq, H, D)`` and ``(B, Sk, Hkv, D)``, whose heads come first in memory."""
    queries, keys, values = map(_tokens, (queries, keys, values))
    (heads, key_heads), dim = (queries.shape[1], keys.shape[1]), queries.shape[3]
    queries = queries.unflatten(1, (key_heads, heads // key_heads)).flatten(2, 3)
    queries, keys, values = map(_in_eights, (queries, keys, values))
    out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)[..., :dim]
    return _tokens(out.unflatten(2, (heads // key_heads, -1)).flatten(1, 2))


def _tokens(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _gathered(x: Tensor, places: Tensor) -> Tensor:
    """Rows ``places`` of ``x (B, S, H, D)``, ``(B, n, H, D)``."""
    return _tokens(kernels.pack_rows(x, places, None, None, False, configs(x)("pack")))


def _in_eights(x: Tensor) -> Tensor:
    """``x`` with as many channels as CUDA's kernels want."""
    return F.pad(x, (0, -x.shape[3] % 8)) if x.shape[3] % 8 else x


def packs(q: Projected, k: Projected, v: Projected, lowered: Lowered) -> tuple[str, ...]:
    """Those of ``"q"``, ``"k"``, ``"v"`` that take a pass of the kernels before attention."""
    rows, gathered = _rows(lowered), () if lowered.keys.masked is None else ("k", "v")
    named = ("q", q), ("k", k), ("v", v)
    return tuple(name for name, x in named if name in gathered or _needs_pass(name, x, lowered, rows))


def _rows(lowered: Lowered) -> dict[str, tuple]:
    """Of q, k and v: the token each row is made from, its cosines and its sines; None where it stays as it is."""
    keys, alone, tokens = lowered.keys, lowered.unmodulated, lowered.num_keys
    rotation = alone.rotation if alone is not None else lowered.queries and lowered.queries.rotation
    query = (rotation.cos[:, 0], rotation.sin[:, 0]) if rotation else (None, None)
    turn = keys.weighted or keys.rotation
    key = (turn.cos[:, :tokens], turn.sin[:, :tokens]) if turn else (None, None)
    source = None if keys.source is None else keys.source[:tokens]  # without the copies of scale buckets
    return {
        "q": (alone and alone.source, *query),
        "k": (source, *key),
        "v": (source if keys.order is not None else None, None, None),
    }


def _needs_pass(name: str, x: Projected, lowered: Lowered, rows: dict[str, tuple]) -> bool:
    """Whether rows change, or lie where not all of torch's kernels read them: what a descriptor cannot describe may go
    to the one that materialises the logits."""
    source, cos, _ = rows[name]
    moved = name == "k" and lowered.groups is not None  # in place, so not the caller's
    moved = moved or (name == "v" and lowered.values is not None)
    changed = source is not None or cos is not None or moved
    return changed or isinstance(x, kernels.Streams) or not kernels.describable(cast(Tensor, x).transpose(1, 2))


def _prepared(name: str, x: Projected, lowered: Lowered, rows: dict[str, tuple], tokens_first: bool = False) -> Tensor:
    """``(B, H, R, D)``."""
    if not _needs_pass(name, x, lowered, rows):
        return cast(Tensor, x).transpose(1, 2)  # streams take a pass
    if name == "v":
        return pack_values(x, rows[name][0], lowered)
    return kernels.pack_rows(x, *rows[name], lowered.pairing == "interleaved", configs(x)("pack"), tokens_first)


def _move_groups(keys: Tensor, lowered: Lowered) -> None:
    """``w ((lambda - delta) mu + delta khat)`` in the place of ``khat``, keys ``(B, Hkv, Sk, D)``. The mean is one of
    keys that may have different weights, so these come after it."""
    groups = lowered.groups
    means = kernels.group_means(
        keys.transpose(1, 2), lowered.keys.segments, groups.for_kernels, groups.members, groups.bounds,
        key_bias(lowered), 0, 0, configs(keys)("means"),
    )  # fmt: skip
    kernels.reweight_keys(
        keys, lowered.keys.segments, groups.for_kernels, means, lowered.bands and lowered.bands.for_kernels,
        lowered.pairing == "interleaved", configs(keys)("reweight"),
    )  # fmt: skip
