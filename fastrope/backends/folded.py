"""Modulations folded into the keys by the kernels, then one call of torch's ``scaled_dot_product_attention``.

The form in which backend ``sdpa`` runs where the kernels do, forward, for plans of rotation, BandWeight and BiasDelta
without a mask: nothing is left for a loop over keys to do but plain attention. That is also so for the queries of any
plan that nothing sets apart (``divided.py``). One pass over q and one over k gather, join, normalise, rotate and weigh;
keys of groups take two more, one for the mean and one for ``kt = (lambda - delta) mu + delta khat``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..planning import Plan
from . import triton


def folds(plan: Plan) -> bool:
    """Whether all that a plan says of the logits can be said of the keys: no QueryScale, no LogitGain, no mask."""
    spec = plan.spec
    return not spec.level_counts and not spec.gain_sets and "key_mask" not in plan.tensors


def takes(q: torch.Tensor, plan: Plan) -> bool:
    """Whether :func:`run` is for tensors like ``q`` under this plan."""
    return folds(plan) and q.device.type == "cuda" and triton.unsupported(q) is None


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float,
    packed: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:  # fmt: skip
    """``out (B, Sq, H, D)`` of a plan that :func:`folds`, or of the queries that a plan leaves untouched; forward only.
    Arguments as for :func:`fastrope.backends.triton.run`; ``packed`` has keys and values ``(B, Hkv, Sk, D)`` that are
    prepared already. Extra memory: one copy each of k, of q where it is rotated, and of v where it is joined or
    sorted."""
    from .. import kernels

    rows, heads, key_heads = _rows(plan), q.shape[2], k.shape[2]
    with triton.launching_on(q.device):
        # The output lies as the queries do: tokens first, so that it is not copied. Grouped heads, which become more
        # rows of the same key head, lie together the other way.
        queries = _prepared("q", q, plan, rows, tokens_first=heads == key_heads)
        keys, values = (
            _prepared(name, x, plan, rows) if done is None or not kernels.describable(done) else done
            for name, x, done in zip("kv", (k, v), packed, strict=True)
        )
        if plan.spec.num_groups:
            _move_groups(keys, plan)
    queries = queries.unflatten(1, (key_heads, heads // key_heads)).flatten(2, 3)
    out = F.scaled_dot_product_attention(*map(_in_eights, (queries, keys, values)), scale=scale)[..., : q.shape[3]]
    return out.unflatten(2, (heads // key_heads, -1)).flatten(1, 2).transpose(1, 2)


def _in_eights(x: torch.Tensor) -> torch.Tensor:
    """``x`` with as many channels as CUDA's kernels want."""
    return F.pad(x, (0, -x.shape[3] % 8)) if x.shape[3] % 8 else x


def prepared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> str:
    """The tensors that take a pass of the kernels before attention, such as ``"q, k"``."""
    rows = _rows(plan)
    return ", ".join(name for name, x in (("q", q), ("k", k), ("v", v)) if _needs_pass(name, x, plan, rows))


def _rows(plan: Plan) -> dict[str, tuple]:
    """Of q, k and v: the token each row is made from, its cosines and its sines; None where it stays as it is."""
    t, tokens = plan.tensors, plan.spec.num_keys
    query = "untouched" if "untouched" in t else "query"
    key = "weighted" if "weighted_cos" in t else "key"
    cos, sin = (t[name][:, 0] if name in t else None for name in (f"{query}_cos", f"{query}_sin"))
    source, *turn = (t.get(name) for name in ("key_source", f"{key}_cos", f"{key}_sin"))
    source = None if source is None else source[:tokens]  # without the copies of levels
    return {
        "q": (t.get("untouched_source"), cos, sin),
        "k": (source, *(None if x is None else x[:, :tokens] for x in turn)),
        "v": (source if "key_order" in t else None, None, None),
    }  # fmt: skip


def _needs_pass(name: str, x, plan: Plan, rows: dict[str, tuple]) -> bool:
    """Whether rows change, or lie where not all of torch's kernels read them: what a descriptor cannot describe may go
    to the one that materialises the logits."""
    from .. import kernels

    source, cos, _ = rows[name]
    moved = name == "k" and plan.spec.num_groups > 0  # in place, so not the caller's
    changed = source is not None or cos is not None or moved
    return changed or isinstance(x, kernels.Streams) or not kernels.describable(x.transpose(1, 2))


def _prepared(name: str, x, plan: Plan, rows: dict[str, tuple], tokens_first: bool = False) -> torch.Tensor:
    """``(B, H, R, D)``."""
    from .. import kernels

    if not _needs_pass(name, x, plan, rows):
        return x.transpose(1, 2)
    return kernels.pack_rows(x, *rows[name], plan.spec.pairing == "half", triton.configs(x)("pack"), tokens_first)


def _move_groups(keys: torch.Tensor, plan: Plan) -> None:
    """``w ((lambda - delta) mu + delta khat)`` in the place of ``khat``, keys ``(B, Hkv, Sk, D)``; in float32, rounded
    once. The mean is one of keys that may have different weights, so these come after it."""
    from .. import kernels

    t, spec = plan.tensors, plan.spec
    groups = t["kernel_groups"]
    means = kernels.group_means(
        keys, t["segments"], groups, t["group_members"], t["group_bounds"], None, 0, 0, triton.configs(keys)("means")
    )
    bias, delta = groups[:, None, :, :2, None].unbind(3)  # (Bg, 1, G, 1)
    shift = (bias - delta) * means[:, :, :, 0]  # (B, Hkv, G, D)
    for s in spec.segments:
        if s.group < 0:
            continue
        added, factor = shift[:, :, s.group, None], delta[:, :, s.group, None]
        if s.weight >= 0:
            w = t["kernel_weights"][s.weight]
            w = w.repeat_interleave(2) if spec.pairing == "interleaved" else torch.cat((w, w))
            added, factor = added * w, factor * w
        part = keys[:, :, s.start : s.stop]
        torch.addcmul(added, part, factor, out=part)
