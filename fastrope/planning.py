"""The plan: one validated, lowered form of a call's modulations that every backend consumes.

``plan()`` does the host work (value checks, neutral modulations dropped, segments, levels, tables) once; applying it
launches kernels and nothing else. A plan holds the modulations as the user meant them (``resolved``) for the
reference, and their lowered form (``spec``, ``tensors``) for the other backends.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch

from .checks import require, require_finite, require_tensor
from .device import on_device
from .lowering import Segment
from .modulations import MODULATIONS, Modulation
from .resolve import (
    Group,
    Resolved,
    Weight,
    as_tuple,
    check_arguments,
    common_device,
    group_values,
    lengths,
    resolve,
)
from .rope import RoPE


@dataclass(frozen=True)
class PlanSpec:
    """The static part of a plan: what a launch must know without looking at a device tensor.

    ``batch``, ``num_queries``, ``num_keys`` and ``pairs`` are None where the plan fits any. ``continuous`` counts the
    leading query slots that may hold queries with a scale of their own, and ``reach`` is the largest angle of the keys
    they meet, from the middle of all (0: no series). ``touched`` counts the leading slots before those of queries that
    nothing sets apart. ``level_counts`` has, per row of the scale, the number of queries with a scale of their own, at
    r = 1, and at each level. ``passes`` are runs of segments the fused kernels hold at once; ``gain_sets`` the gains
    that segments multiply.
    """

    batch: int | None = None
    num_queries: int | None = None
    num_keys: int | None = None
    pairs: int | None = None
    pairing: str = "interleaved"
    segments: tuple[Segment, ...] = ()
    scaled_keys: int = 0
    queries_applied: bool = False
    keys_applied: bool = False
    num_levels: int = 0
    level_counts: tuple[tuple[int, ...], ...] = ()
    num_groups: int = 0
    gain_sets: tuple[tuple[int, ...], ...] = ()
    continuous: int = 0
    reach: float = 0.0
    touched: int = 0
    passes: tuple[tuple[int, int], ...] = ()
    tensor_names: tuple[str, ...] = ()

    @property
    def modulated(self) -> bool:
        """True when some key is treated."""
        return any(s.treated for s in self.segments)

    def to_string(self) -> str:
        """A string that :meth:`from_string` reads back; ops carry it in their schema."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=256)
    def from_string(text: str) -> PlanSpec:
        """Inverse of :meth:`to_string`."""
        fields = json.loads(text)
        fields["segments"] = tuple(Segment(**s) for s in fields["segments"])
        for name in ("level_counts", "gain_sets", "passes"):
            fields[name] = tuple(tuple(row) for row in fields[name])
        fields["tensor_names"] = tuple(fields["tensor_names"])
        return PlanSpec(**fields)


def gain_products(gains: torch.Tensor, sets, segments) -> torch.Tensor | None:
    """``(Bg, n, Sq)`` float32: the product of each set of ``gains`` that one of ``segments`` uses, numbered as in their
    rows of the segment table. None where none is used."""
    used = [sets[n] for n in dict.fromkeys(s.gain for s in segments if s.gain >= 0)]
    return torch.stack([gains[:, list(members)].prod(dim=1) for members in used], dim=1).float() if used else None


def weighted_rotation(tensors: dict[str, torch.Tensor], segments: Sequence[Segment]) -> dict[str, torch.Tensor]:
    """``weighted_cos, weighted_sin (Bx, Sk, P)`` float32: the rotation of the keys at r = 1 with their band weights in
    it, so that both are rounded once. Keys of a group keep theirs for after the mean."""
    weights = tensors["kernel_weights"]
    if "key_cos" in tensors:
        cos, sin = (tensors[f"key_{name}"][:, : segments[-1].stop].clone() for name in ("cos", "sin"))
    else:  # rotated already
        cos = weights.new_ones(1, segments[-1].stop, weights.shape[1])
        sin = torch.zeros_like(cos)
    for s in segments:
        if s.weight >= 0 and s.group < 0:
            cos[:, s.start : s.stop] *= weights[s.weight]
            sin[:, s.start : s.stop] *= weights[s.weight]
    return {"weighted_cos": cos, "weighted_sin": sin}


@dataclass(frozen=True, eq=False)
class Plan:
    """A lowered call. Build it with :func:`fastrope.plan`; treat it as opaque.

    ``tensors`` lives on the device of the call: float64 entries serve ``sdpa``, float32 and int32 ones the kernels.
    """

    spec: PlanSpec
    spec_string: str
    tensors: dict[str, torch.Tensor]
    resolved: Resolved = Resolved()
    rope: RoPE | None = None
    key_rope: RoPE | None = None
    key_mask: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"Plan(segments={len(self.spec.segments)}, levels={self.spec.num_levels}, nbytes={self.nbytes})"

    @property
    def device(self) -> torch.device | None:
        """Where the plan's tensors live; None for a plan that holds none."""
        return next(iter(self.tensors.values())).device if self.tensors else None

    @property
    def nbytes(self) -> int:
        """Memory the plan holds, bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def with_groups(self, numbers: Sequence[tuple[float | torch.Tensor, float | torch.Tensor]]) -> Plan:
        """This plan with other numbers in its BiasDelta groups. Everything else is shared, so that a schedule with a
        lambda and delta of its own in every layer and step costs next to nothing.

        Args:
            numbers: ``(bias, delta)`` per group, in the order of the modulations the plan was made of; numbers or
                tensors, ``()`` or ``(B,)``. Neutral ones stay groups: the result is then that of none up to rounding.

        Raises:
            ValueError: not one pair per group of the plan (neutral modulations are no groups), values that are not
                finite, a batch that the plan does not have.
        """
        from .tables import group_table

        held = self.resolved.groups
        require(len(numbers) == len(held), "numbers", f"{len(held)} pairs, one per group", len(numbers))
        if not held:
            return self
        with torch.inference_mode(False), torch.device("cpu"):
            found = [group_values(bias, delta) for bias, delta in numbers]
            batch = max(len(x) for pair in found for x in pair)
            require(batch in (1, self.spec.batch), "numbers", f"batch {self.spec.batch or 1}", batch)
            groups = tuple(
                Group(bias.to(group.bias), delta.to(group.delta), group.keys)
                for group, (bias, delta) in zip(held, found, strict=True)
            )
            table = group_table(groups, self.tensors["groups"][..., 2])
            tensors = {**self.tensors, "groups": table, "kernel_groups": table.float()}
        return replace(self, tensors=tensors, resolved=replace(self.resolved, groups=groups))

    def with_weight(self, weight: torch.Tensor) -> Plan:
        """This plan with other values in its only BandWeight; everything else is shared, but for a rotation of the keys
        that has them in it.

        Args:
            weight: ``(D/2,)`` floating point, finite. A neutral one stays: the result is then that of none up to
                rounding.

        Raises:
            ValueError: a plan without exactly one BandWeight that is not neutral, a weight of another shape.
        """
        held = self.resolved.weights
        require(len(held) == 1, "plan", "exactly one BandWeight that is not neutral", len(held))
        hint = f"({self.spec.pairs},)"
        require_tensor("weight", weight, (1,), hint)
        require(weight.shape[0] == self.spec.pairs, "weight", hint, tuple(weight.shape))
        require_finite("weight", weight, ("pair",))
        with torch.inference_mode(False):
            w = weight.detach().to(held[0].w, copy=True)
            tensors = {**self.tensors, "weights": w[None], "kernel_weights": w[None].float()}
            if "weighted_cos" in tensors:
                tensors |= weighted_rotation(tensors, self.spec.segments)
        return replace(self, tensors=tensors, resolved=replace(self.resolved, weights=(Weight(w, held[0].keys),)))


def plan(
    *,
    rope: RoPE | None = None,
    key_rope: RoPE | None = None,
    modulations: Sequence[Modulation] = (),
    key_mask: torch.Tensor | None = None,
    num_queries: int | None = None,
    num_keys: int | None = None,
    device: torch.device | str | None = None,
) -> Plan:
    """Validate and lower modulations once, for many calls of :func:`fastrope.attention`.

    Copies the values it needs to the host (a device synchronisation) and precomputes tables; apply it as often as you
    like without either. Neutral modulations vanish here. Under ``torch.compile`` build the plan outside.

    Args:
        rope: angles of the queries, and of the keys unless ``key_rope`` is given.
        key_rope: angles of the keys when they are other tokens than the queries. Same pairing and axes as ``rope``.
        modulations: any of QueryScale (at most one), BandWeight, BiasDelta (disjoint groups), LogitGain, in any order.
        key_mask: ``(B, Sk)`` bool, True = attend.
        num_queries, num_keys: ``Sq`` and ``Sk``, needed only where neither ``rope`` nor a modulation tells them.
        device: where to put the tables; by default where ``rope`` or the modulations are.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    modulations = as_tuple(modulations)
    # Plans outlive the mode and the default device they are made under.
    with torch.inference_mode(False), torch.device("cpu"):
        return _build(rope, key_rope, modulations, key_mask, num_queries, num_keys, device)


def _build(rope, key_rope, modulations, key_mask, num_queries, num_keys, device) -> Plan:
    from .tables import lower  # numpy is only needed once a plan is built

    check_arguments(rope, key_rope, modulations, key_mask)
    device = common_device(rope, key_rope, modulations, key_mask, device)
    num_queries, num_keys = lengths(rope, key_rope, modulations, key_mask, num_queries, num_keys)
    resolved = resolve(rope, key_rope or rope, modulations, num_keys)
    if key_mask is not None and bool(key_mask.all()):
        key_mask = None
    spec, tensors = lower(rope, key_rope or rope, resolved, key_mask, num_queries, num_keys)
    tensors = {k: _own(on_device(t, device)) for k, t in tensors.items()}
    rope, key_rope = (r and replace(r, angles=_own(r.angles), axis=_own(r.axis)) for r in (rope, key_rope))
    return Plan(spec, spec.to_string(), tensors, resolved.to(device), rope, key_rope, _own(key_mask))


def _own(x: torch.Tensor | None) -> torch.Tensor | None:
    """A contiguous copy: kernels rely on the layout, and what the caller does to the original must not matter."""
    return None if x is None else x.detach().clone(memory_format=torch.contiguous_format)


# A cache for callers that build modulations anew on every call. It holds its keys alive, so identities stay valid;
# a tensor changed in place has another version and misses. Writes that torch does not see (numpy, `.data`, kernels of
# one's own) do not: such callers hold a plan.
_CACHE: OrderedDict[tuple, tuple[Plan, tuple]] = OrderedDict()
_CACHE_SIZE = 8
_CACHE_LOCK = threading.Lock()


def cached_plan(rope, key_rope, modulations, key_mask, num_queries, num_keys, device) -> Plan:
    """:func:`plan`, remembered by the identity and version of the tensors involved (the last 8 calls)."""
    arguments = dict(
        rope=rope, key_rope=key_rope, modulations=modulations, key_mask=key_mask,
        num_queries=num_queries, num_keys=num_keys, device=device,
    )  # fmt: skip
    parts = [rope, key_rope, *modulations]
    known = all(isinstance(p, (RoPE, *MODULATIONS)) for p in parts if p is not None)
    if not known or not (key_mask is None or isinstance(key_mask, torch.Tensor)):
        return plan(**arguments)  # which says what is wrong
    held: list[torch.Tensor] = []
    try:
        key = (
            tuple(_identity(p, held) for p in parts),
            _identity(key_mask, held), num_queries, num_keys, str(device),
        )  # fmt: skip
    except RuntimeError:  # inference tensors have no version
        return plan(**arguments)
    with _CACHE_LOCK:
        if key in _CACHE:
            _CACHE.move_to_end(key)
            return _CACHE[key][0]
    built = plan(**arguments)
    with _CACHE_LOCK:
        _CACHE[key] = built, tuple(held)
        while len(_CACHE) > _CACHE_SIZE:
            _CACHE.popitem(last=False)
    return built


def _identity(value, held: list[torch.Tensor]):
    if isinstance(value, torch.Tensor):
        held.append(value)
        return id(value), value._version
    if hasattr(value, "__dataclass_fields__"):
        return (type(value), *(_identity(getattr(value, name), held) for name in value.__dataclass_fields__))
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    return value
