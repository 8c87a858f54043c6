"""The fused kernels of ``fastrope.kernels``, driven by a plan.

A call packs the keys once (rotated, per level), takes the means of BiasDelta groups, lets the series or the patch
kernel do queries with a scale of their own against the scaled keys, and runs the fused loop.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from functools import lru_cache, partial

import torch

from ..device import switched_on
from ..planning import Plan, gain_products
from ..series import DTYPES as SERIES_DTYPES
from .merging import merge

ROW_MEAN_BLOCK = 2**21  # elements of the float64 tables of one block of row means
INTERPRETED_ARCH = "sm_89"  # whose configuration the interpreter uses: small tiles


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """True when triton runs kernels in numpy (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unsupported(q: torch.Tensor) -> str | None:
    """Why the kernels cannot run on tensors like ``q``, or None."""
    if q.dtype == torch.float64:
        return "float64 inputs (use sdpa or eager)"
    if not _installed():
        return "triton is not installed"
    if interpreted():
        return "triton's interpreter computes bfloat16 wrongly" if q.dtype == torch.bfloat16 else None
    if q.device.type != "cuda":
        return f"no kernel for device {q.device.type} (set TRITON_INTERPRET=1 before importing triton to interpret)"
    return _unsupported_arch(q.device)


@lru_cache(maxsize=64)
def _unsupported_arch(device: torch.device) -> str | None:
    from ..kernels import config

    return config.unsupported(config.current_arch(device))


@lru_cache(maxsize=64)
def _arch(device: torch.device) -> str:
    from ..kernels import current_arch

    return INTERPRETED_ARCH if interpreted() else current_arch(device)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    scale: float,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`fastrope.backends.eager.run`; forward only. q and k may be :class:`fastrope.kernels.Streams` where the
    plan rotates both (q: and :func:`patched` is false), v wherever. Extra memory: the packed keys, at most
    ``1 + MAX_LEVELS`` times k, at most ``MAX_VIEWS`` copies of q, a copy of v where it is joined, sorted or masked; for
    queries with a scale of their own float32 state, and for a series up to three copies of the scaled keys and seven of
    these queries, per view (two and four at a head dim of 128)."""
    with launching_on(q.device):
        out, lse = attend(q, k, *pack(q, k, v, plan), plan, scale)
    return out, lse if return_lse else None


def launching_on(device: torch.device):
    """A context for launches: triton's go to the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def pack(q, k, v, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``(B, Hkv, R, D)`` and values ``(B, Hkv, Sk, D)`` as the loop reads them: joined, in key order, the keys
    rotated, and the scaled ones once more per level."""
    from .. import kernels

    t = plan.tensors
    half, mask, config = plan.spec.pairing == "half", t.get("key_mask"), configs(q)
    if "key_source" in t:
        keys = kernels.pack_rows(k, t["key_source"], t.get("key_cos"), t.get("key_sin"), half, config("pack"))
    elif _far_apart(k):
        keys = kernels.pack_rows(k, None, None, None, half, config("pack"))
    else:
        keys = k.transpose(1, 2)
    if "key_order" in t or isinstance(v, kernels.Streams) or _far_apart(v):
        order = t["key_source"][: k.shape[1]] if "key_order" in t else None
        values = kernels.pack_rows(v, order, None, None, half, config("pack"))
    else:
        values = v.transpose(1, 2)
    if mask is not None and len(plan.spec.passes) < 2 and _descriptors(q):
        # A descriptor reads masked values too, and 0 x NaN of theirs would poison the sum: one pass over v (masked_fill
        # would copy first and fill the copy).
        values = torch.where(mask[:, None, :, None], values, values.new_zeros(()))
    return keys, values


def attend(q, k, keys, values, plan: Plan, scale: float, touched: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """``out (B, Sq, H, D)`` and ``lse (B, H, Sq)`` over what :func:`pack` made of keys and values; ``touched`` leaves
    those of queries that nothing sets apart undefined."""
    from .. import kernels

    t, spec = plan.tensors, plan.spec
    half, mask, config = spec.pairing == "half", t.get("key_mask"), configs(q)
    if patched(q, plan) and _far_apart(q):
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    if not spec.modulated:
        if "query_cos" in t or _far_apart(q):
            cos, sin = (t[name][:, 0] if name in t else None for name in ("query_cos", "query_sin"))
            queries = kernels.pack_rows(q, None, cos, sin, half, config("pack"))
        else:
            queries = q.transpose(1, 2)
        return kernels.fused_attention(
            queries.unsqueeze(2), keys, values, q.shape[1], k.shape[1], mask, None, None, None, scale, q.dtype,
            config(_loop("attention", q, keys, values), mask is not None),
        )  # fmt: skip
    means = None
    if spec.num_groups:
        means = kernels.group_means(
            keys,
            t["segments"],
            t["kernel_groups"],
            t["group_members"],
            t["group_bounds"],
            mask,
            spec.num_levels,
            spec.scaled_keys,
            config("means"),
        )
    scaled = _series_keys(k, keys, plan, config) if serial(q, plan) else None
    tables = partial(_tables, keys, plan, means, spec.touched if touched else None)
    if len(spec.passes) == 1:
        return _attend(q, keys, values, scaled, tables(spec.passes[0]), plan, scale, q.dtype)
    result = None
    for bounds in spec.passes:
        part = _attend(q, keys, values, scaled, tables(bounds), plan, scale, torch.float32)
        result = part if result is None else merge(result, part)
    return result[0].to(q.dtype), result[1]


def configs(q: torch.Tensor):
    """Launch configurations for tensors like ``q``, by kernel."""
    from .. import kernels

    arch = _arch(q.device)
    return lambda kernel, masked=False: kernels.select(kernel, arch, q.dtype, q.shape[3], masked)


def _attend(q, keys, values, scaled, tables, plan: Plan, scale: float, dtype: torch.dtype):
    """Attention over the segments of ``tables``: ``(B, Sq, H, D)`` in ``dtype``, ``(B, H, Sq)``.

    Args:
        q: ``(B, Sq, H, D)``; keys ``(B, Hkv, R, D)`` packed; values ``(B, Hkv, Sk, D)``.
        scaled: keys of the series, or None.
    """
    from .. import kernels

    t, spec, config = plan.tensors, plan.spec, configs(q)
    half, mask = spec.pairing == "half", t.get("key_mask")
    rotation = (t["query_cos"], t["query_sin"]) if "query_cos" in t else None
    queries, bias, rest = kernels.prepare_queries(q, rotation, half, tables, scaled is not None, config("queries"))
    state, whole = None, dtype == q.dtype
    if scaled is not None:
        series = {name: t[f"series_{name}"] for name in _SERIES_TABLES}
        series |= {name: t[f"series_{name}_{SERIES_DTYPES[q.dtype]}"] for name in ("tiles", "middle")}
        loop = _loop("series", q, keys, values) if whole else "series"
        state = kernels.series_attention(
            queries, rest, scaled, values, half, mask, tables, bias, series, spec.reach, q.shape[1], scale,
            config(loop), config("terms"),
        )  # fmt: skip
    elif spec.continuous:
        patches = {name: t[f"patch_{name}"] for name in _PATCH_TABLES}
        state = kernels.patch_attention(
            q, keys, values, rotation, half, mask, tables, bias, patches, scale, config("patches")
        )
    loop = _loop("attention_modulated", q, keys, values) if whole else "attention_parts"
    return kernels.fused_attention(
        queries, keys, values, q.shape[1], values.shape[2], mask, tables, bias, state, scale, dtype,
        config(loop, mask is not None),
    )  # fmt: skip


def serial(q: torch.Tensor, plan: Plan) -> bool:
    """Whether queries with a scale of their own go through the series."""
    return plan.spec.continuous > 0 and _against_a_series(q, plan) is None


def patched(q: torch.Tensor, plan: Plan) -> bool:
    """Whether queries with a scale of their own go through patches, exact in any dtype."""
    return plan.spec.continuous > 0 and not serial(q, plan)


def _against_a_series(q: torch.Tensor, plan: Plan) -> str | None:
    """Why queries with a scale of their own meet patches instead, or None."""
    from .. import kernels

    if q.dtype not in SERIES_DTYPES:
        return str(q.dtype).removeprefix("torch.")
    if not switched_on("FASTROPE_SERIES", default=True):
        return "FASTROPE_SERIES=0"
    if not kernels.ships("series", _arch(q.device), q.dtype, q.shape[3]):
        return "a series of more than 128 channels spills"
    if f"series_tiles_{SERIES_DTYPES[q.dtype]}" not in plan.tensors:
        return "too few queries of similar scales to fill tiles, or keys too far apart"
    return None


def _series_keys(k, keys: torch.Tensor, plan: Plan, config) -> torch.Tensor:
    """The scaled keys with their channels in the order of the series, ``(B, 2 Hkv, n, channels)``: as they arrive, but
    for pairs that no scale turns, so that a key is rounded once, after its turn."""
    from .. import kernels

    t = plan.tensors
    rows, channels = t["series_rows"], t["series_channels"]
    if "series_source" in t:
        keys = kernels.pack_rows(
            k, t["series_source"], t["series_cos"], t["series_sin"], plan.spec.pairing == "half", config("pack")
        )
    return keys[:, :, rows[None, :, None], channels[:, None, :]].flatten(1, 2)


def _loop(kernel: str, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> str:
    """The form of a loop that these tensors can have: tensor descriptors where the architecture has them."""
    from .. import kernels

    described = _descriptors(q) and kernels.describable(keys) and kernels.describable(values)
    return f"{kernel}_tma" if described else kernel


def _descriptors(q: torch.Tensor) -> bool:
    """Whether loops with tensor descriptors ship for tensors like ``q``, and are not switched off."""
    from .. import kernels

    return switched_on("FASTROPE_TMA", default=True) and kernels.ships(
        "attention_tma", _arch(q.device), q.dtype, q.shape[3]
    )


def explain_loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> str:
    """How the fused loop would read keys and values, and why not through tensor descriptors."""
    from .. import kernels

    t, arch = plan.tensors, _arch(q.device)
    if kernels.ships("attention_tma", arch, q.dtype, q.shape[3]) and not _descriptors(q):
        return "pointers (FASTROPE_TMA=0)"
    if not _descriptors(q):
        return f"pointers (no descriptors on {arch} in {str(q.dtype).removeprefix('torch.')})"
    if len(plan.spec.passes) > 1:
        return "pointers (parts of several passes are merged)"
    packed = {"k": "key_source" in t or _far_apart(k), "v": "key_order" in t or _far_apart(v)}
    for name, x in (("k", k), ("v", v)):
        x = x.transpose(1, 2)
        if packed[name]:
            x = torch.empty(x.shape, dtype=x.dtype, device="meta")
        elif name == "v" and "key_mask" in t:  # a copy in the order of its axes
            x = torch.empty_like(x, device="meta")
        if not kernels.describable(x):
            return (
                f"pointers ({name}: a descriptor wants adjacent channels, rows in steps of 16 bytes, nothing expanded)"
            )
    return "tensor descriptors"


def explain_own(q: torch.Tensor, plan: Plan) -> str | None:
    """What would compute queries with a scale of their own against the scaled keys; None where there are none."""
    if not plan.spec.continuous:
        return None
    why = _against_a_series(q, plan)
    if why is not None:
        return f"patches, exact ({why})"
    tiles = plan.tensors[f"series_tiles_{SERIES_DTYPES[q.dtype]}"]
    return f"a series, in {tiles.shape[1] - 1} tiles of similar scales"


def _far_apart(x: torch.Tensor) -> bool:
    """Whether the rows of one head of ``(B, S, H, D)`` span more elements than the loops' int32 offsets reach."""
    return (x.shape[1] - 1) * x.stride(1) + (x.shape[3] - 1) * x.stride(3) >= 2**31


def _tables(keys, plan: Plan, means, slots: int | None, bounds: tuple[int, int]):
    """The plan's own tables and the means of its groups, for the segments of one pass and the leading ``slots`` (None:
    all)."""
    from .. import kernels

    t, spec, here = plan.tensors, plan.spec, slice(*bounds)
    segments = spec.segments[here]
    gains = t.get("kernel_gains")
    if gains is None and "gains" in t:
        gains = gain_products(t["gains"], spec.gain_sets, segments)
    row_means = None
    groups = list(dict.fromkeys(s.group for s in segments if s.group >= 0))
    if groups and spec.continuous:
        row_means = _row_means(keys, plan, means, groups)
    queries, levels = t.get("slots"), t.get("slot_level")
    if slots is not None:
        queries, levels = queries[:, :slots], levels[:, : slots // kernels.SLOT_TILE]
    return kernels.SegmentTables(
        t["segments"][here], t.get("kernel_weights"), t.get("kernel_groups"), gains, means, row_means,
        queries, levels, keys.shape[1], len({s.view for s in segments}), spec.num_levels,
        spec.scaled_keys, spec.continuous,
    )  # fmt: skip


_SERIES_TABLES = ("columns", "factor", "origin", "share", "phase")
_PATCH_TABLES = (
    "keys", "a", "b", "c", "columns_a", "columns_b", "columns_c", "phase", "factor",
)  # fmt: skip


def _row_means(keys, plan: Plan, means, groups: list[int]) -> torch.Tensor:
    """``mu_i`` of queries that each turn the scaled keys by their own scale: ``(B, Hkv, groups, C, D)`` float32.

    ``mu_i = mu + sum_j (R((r_i - 1) phi_j) - 1) k_j / count`` over the group's scaled keys. Keys that share ``phi_j``
    on a pair class are summed first, so the work is (queries x coordinates), not (queries x keys). In float64, which no
    TF32 setting touches, and in blocks of queries, so that memory does not grow with both.
    """
    t, spec = plan.tensors, plan.spec
    slots = t["slots"][:, : spec.continuous].long()
    scale = t["scale"].expand(slots.shape[0], -1)
    r = torch.where(slots >= 0, scale.gather(1, slots.clamp(min=0)), 1.0)  # (Bs, C)
    channels = _channels(spec.pairing, spec.pairs, keys.device)
    out = means[:, :, groups, :1].repeat(1, 1, 1, spec.continuous, 1)
    rows, mask = t["scaled_rows"], t.get("key_mask")
    scaled = keys[:, :, rows]  # (B, Hkv, n, D)
    if mask is not None:  # zero rather than multiply: a masked key may hold NaN
        scaled = scaled.masked_fill(~mask[:, None, rows, None], 0.0)
    count = t["groups"][:, :, 2].clamp(min=1)
    for name in ("a", "b", "c"):
        pairs, order, lengths, angles = (
            t[f"class_{name}_{field}"] for field in ("pairs", "order", "lengths", "angles")
        )
        if not len(pairs):
            continue
        first, second = (x[pairs] for x in channels)
        for n, g in enumerate(groups):
            member = (t["scaled_group"] == g)[order, None, None, None]
            x, y = (
                torch.segment_reduce(
                    torch.where(member, scaled[:, :, order][..., part].permute(2, 0, 1, 3).double(), 0.0),
                    "sum", lengths=lengths, axis=0, unsafe=True,
                ).permute(1, 2, 0, 3) / count[:, g, None, None, None]
                for part in (first, second)
            )  # (B, Hkv, U, pairs)  # fmt: skip
            for i in range(0, spec.continuous, step := max(1, ROW_MEAN_BLOCK // angles.shape[1:].numel())):
                turn = (r[:, i : i + step, None, None] - 1) * angles[:, None]  # (Bx, queries, U, pairs)
                turn = turn.expand(len(x), -1, -1, -1)
                cos, sin = turn.cos() - 1, turn.sin()
                turned_x = torch.einsum("biuc,bhuc->bhic", cos, x) - torch.einsum("biuc,bhuc->bhic", sin, y)
                turned_y = torch.einsum("biuc,bhuc->bhic", cos, y) + torch.einsum("biuc,bhuc->bhic", sin, x)
                out[:, :, n, i : i + step, first] += turned_x.float()
                out[:, :, n, i : i + step, second] += turned_y.float()
    return out


def _channels(pairing: str, pairs: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second channel of every pair."""
    pair = torch.arange(pairs, device=device)
    return (2 * pair, 2 * pair + 1) if pairing == "interleaved" else (pair, pair + pairs)
