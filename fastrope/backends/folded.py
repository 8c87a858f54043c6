"""Modulations folded into the keys by the kernels, then torch's ``scaled_dot_product_attention``.

``sdpa`` runs so where the kernels run, forward, for plans of rotation, BandWeight and BiasDelta: nothing is left for a
loop over keys but plain attention. That is also so for the unmodulated queries of any plan (``split_rows.py``). One
pass over q and one over k gather, join, normalise, rotate and weigh. Keys of groups take two more, one for the mean and
one for ``kt = (lambda - delta) mu + delta khat``.

Under a mask, the plan knows which keys each batch row keeps. These are gathered, and every row is a call of its own
over as many keys as it has: a mask in the call would send torch to a slower kernel.
"""

from __future__ import annotations

import contextlib
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import device as devices
from .. import kernels
from ..kernels.streams import Projected
from ..planning.lowered import Lowered
from .fused import configs, key_bias, launching_on, pack_values
from .plain import Attend, each_row

CUDNN_ARCHS = ("sm_90", "sm_100")  # where torch itself prefers cuDNN's kernel, if cuDNN is new; measured on sm_90
NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN", SDPBackend.FLASH_ATTENTION: "FlashAttention",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient", SDPBackend.MATH: "logits materialised",
}  # fmt: skip
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
    prepares: tuple[str, ...],
    packed: tuple[Tensor | None, Tensor | None] = (None, None),
    plain: Attend | None = None,
) -> Tensor:
    """``out (B, Sq, H, D)`` of a plan that :func:`folds`, or of the unmodulated queries of any plan; forward only.

    Arguments as of :func:`fastrope.backends.fused.run`. ``prepares`` as of :func:`prepares`; ``packed`` has keys and
    values ``(B, Hkv, Sk, D)`` that are prepared already; ``plain`` is the attention that takes the work, torch's by
    default. Extra memory: one copy each of k, of q where it is rotated, and of v where it is joined, sorted or
    modulated; under a mask, one more of k and of v, and one of the output.
    """
    heads, key_heads = q.shape[2], k.shape[2]

    def prepared(name: str, x: Projected, tokens_first: bool = False) -> Tensor:
        """``(B, H, R, D)``."""
        if name not in prepares:
            return cast(Tensor, x).transpose(1, 2)  # streams are prepared
        if name == "v":
            return pack_values(x, _rows(lowered)["v"][0], lowered)
        config, interleaved = configs(x)("pack"), lowered.pairing == "interleaved"
        return kernels.pack_rows(x, *_rows(lowered)[name], interleaved, config, tokens_first)

    with launching_on(q.device):
        # The output lies as the queries do: tokens first, so that it is not copied. Grouped heads, which become more
        # rows of the same key head, lie together the other way.
        queries = prepared("q", q, tokens_first=heads == key_heads)
        keys, values = (
            prepared(name, x) if done is None or not kernels.describable(done) else done
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
    if heads != key_heads:
        queries = queries.unflatten(1, (key_heads, heads // key_heads)).flatten(2, 3)
    if dim % 8:  # as many channels as CUDA's kernels want
        queries, keys, values = (F.pad(x, (0, -dim % 8)) for x in (queries, keys, values))
    with _pinned(queries, keys, values, scale):
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
    if dim % 8:
        out = out[..., :dim]
    return _tokens(out if heads == key_heads else out.unflatten(2, (heads // key_heads, -1)).flatten(1, 2))


def _tokens(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _gathered(x: Tensor, places: Tensor) -> Tensor:
    """Rows ``places`` of ``x (B, S, H, D)``, ``(B, n, H, D)``."""
    return _tokens(kernels.pack_rows(x, places, None, None, False, configs(x)("pack")))


def _pinned(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> contextlib.AbstractContextManager:
    """A context in which torch takes cuDNN's kernel, where it is what ``auto`` rests on and torch would not: among the
    kernels that the caller has enabled, and where it can."""
    wanted = queries.dtype.itemsize == 2 and queries.device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled()
    if not (wanted and devices.architecture(queries.device) in CUDNN_ARCHS):
        return contextlib.nullcontext()
    if _choice(queries, keys, values, scale) == SDPBackend.CUDNN_ATTENTION:  # asked first: a pin takes the host longer
        return contextlib.nullcontext()
    of = torch.backends.cuda
    enabled = (
        (SDPBackend.FLASH_ATTENTION, of.flash_sdp_enabled()), (SDPBackend.EFFICIENT_ATTENTION,
        of.mem_efficient_sdp_enabled()), (SDPBackend.MATH, of.math_sdp_enabled()),
    )  # fmt: skip
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *(x for x, on in enabled if on)], set_priority=True)


def _choice(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> SDPBackend:
    """The kernel that torch would run."""
    choose = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]
    return SDPBackend(choose(queries, keys, values, scale=scale))


def kernel_name(q: Tensor, k: Tensor) -> str:
    """The kernel of torch's that :func:`run` ends in for tensors like these, as :func:`fastrope.explain` says it."""
    queries = torch.empty((1, 1, q.shape[1], q.shape[3]), dtype=q.dtype, device=q.device)
    keys = torch.empty((1, 1, k.shape[1], k.shape[3]), dtype=q.dtype, device=q.device)
    queries, keys = (F.pad(x, (0, -q.shape[3] % 8)) for x in (queries, keys))
    with _pinned(queries, keys, keys, 1.0):
        chosen = _choice(queries, keys, keys, 1.0)
    return NAMES.get(chosen, chosen.name)


def prepares(q: Projected, k: Projected, v: Projected, lowered: Lowered) -> tuple[str, ...]:
    """Those of ``"q"``, ``"k"``, ``"v"`` whose rows change, or lie where not all of torch's kernels read them: what a
    descriptor cannot describe may go to the one that materialises the logits. They take a pass of the kernels."""
    rows = _rows(lowered)

    def needs(name: str, x: Projected) -> bool:
        source, cos, _ = rows[name]
        moved = name == "k" and lowered.groups is not None  # in place, so not the caller's
        moved = moved or (name == "v" and lowered.values is not None)
        changed = source is not None or cos is not None or moved
        return changed or isinstance(x, kernels.Streams) or not kernels.describable(cast(Tensor, x).transpose(1, 2))

    return tuple(name for name, x in (("q", q), ("k", k), ("v", v)) if needs(name, x))


def _rows(lowered: Lowered) -> dict[str, tuple]:
    """Of q, k and v: the token each row is made from, its cosines and its sines; None where it stays as it is."""
    return lowered.once("rows", lambda: _find_rows(lowered))


def _find_rows(lowered: Lowered) -> dict[str, tuple]:
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
