"""The plan: one validated, lowered form of a call's modulations that every backend consumes.

``plan()`` does the host work (value checks, neutral modulations dropped, segments, scale buckets, tables) once;
applying it launches kernels and nothing else.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import require, require_finite, require_tensor
from ..device import on_device, widest_float
from ..modulations import MODULATIONS, Modulation
from ..rope import RoPE
from .flattening import map_tensors, tensors_of
from .lower import lower
from .lowered import Lowered
from .resolve import as_tuple, check_arguments, common_device, group_values, lengths, logit_bias, resolve
from .resolved import Resolved
from .rotations import turned
from .tables import alike


@dataclass(frozen=True, eq=False)
class Plan:
    """The arguments of a call, resolved for the reference and lowered for the other backends. Build it with
    :func:`fastrope.plan`; treat it as opaque.

    Args:
        resolved: what the user meant.
        lowered: the tables, on the device of the call.
        tensors, spec: the tables as ops carry them, see :meth:`Lowered.flatten`.
    """

    resolved: Resolved
    lowered: Lowered
    tensors: tuple[Tensor, ...]
    spec: str

    @staticmethod
    def of(resolved: Resolved, lowered: Lowered) -> Plan:
        """A plan of both."""
        tensors, spec = lowered.flatten()
        return Plan(resolved, lowered, tuple(tensors), spec)

    def _with(self, resolved: Resolved, lowered: Lowered) -> Plan:
        """Other numbers in the same tables: the spec stays."""
        return Plan(resolved, lowered, tuple(tensors_of(lowered)), self.spec)

    def _lowered_again(self, resolved: Resolved) -> Plan:
        """Of other arguments for the same tokens, on the same device."""
        device = self.device
        with torch.inference_mode(False), torch.device("cpu"):
            lowered = lower(resolved.to(torch.device("cpu")), self.lowered.num_queries, self.lowered.num_keys)
        return Plan.of(resolved, map_tensors(lowered, lambda t: _copy(on_device(t, device))))

    def __repr__(self) -> str:
        segments, buckets = len(self.lowered.segments), self.lowered.num_buckets
        return f"Plan(segments={segments}, scale_buckets={buckets}, nbytes={self.nbytes})"

    @property
    def device(self) -> torch.device | None:
        """Where the plan's tensors live; None for a plan that holds none."""
        return self.tensors[0].device if self.tensors else None

    @property
    def nbytes(self) -> int:
        """Memory the plan's tables hold, bytes."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def without_values(self) -> Plan:
        """This plan without what it does to values: its output shows the weights of attention."""
        if self.lowered.values is None:
            return self
        resolved = replace(self.resolved, groups=self.resolved.key_groups, value_gains=())
        return Plan.of(resolved, replace(self.lowered, values=None))

    def with_groups(self, numbers: Sequence[tuple[float | Tensor, float | Tensor]]) -> Plan:
        """This plan with other numbers in its BiasDelta groups. Everything else is shared, so that a schedule with a
        lambda and delta for every layer and step costs next to nothing.

        Args:
            numbers: ``(bias, delta)`` per group, in the order of the modulations the plan was made of; numbers or
                tensors, ``()`` or ``(B,)``. Neutral ones stay groups: the result is then that of none up to rounding.

        Raises:
            ValueError: not one pair per group of the plan (neutral modulations are no groups), values that are not
                finite, a batch that the plan does not have.
        """
        held = self.resolved.groups
        require(len(numbers) == len(held), "numbers", f"{len(held)} pairs, one per group", len(numbers))
        if not held:
            return self
        with torch.inference_mode(False), torch.device("cpu"):
            resolved = self.resolved.with_groups([group_values(bias, delta) for bias, delta in numbers])
            batch = max(len(x) for group in resolved.groups for x in (group.bias, group.delta))
            require(batch in (1, self.lowered.batch), "numbers", f"batch {self.lowered.batch or 1}", batch)
            return self._with(resolved, self.lowered.with_groups(resolved.groups))

    def with_biases(self, biases: Sequence[float | Tensor]) -> Plan:
        """This plan with other numbers in its logit biases; everything else is shared.

        Args:
            biases: one per LogitBias, in the order of the modulations the plan was made of, as of
                :class:`fastrope.LogitBias`. A neutral one stays: the result is then that of none up to rounding.

        Raises:
            ValueError: not one per LogitBias of the plan (neutral modulations are none), ``+inf`` or NaN, a batch that
                the plan does not have, a bias other than 0 at a query that the plan holds for unmodulated.
        """
        held = self.resolved.biases
        require(len(biases) == len(held), "biases", f"{len(held)} of them, one per LogitBias", len(biases))
        if not held:
            return self
        with torch.inference_mode(False), torch.device("cpu"):
            values = [logit_bias(b, held[0].b.shape[1]) for b in biases]
            batch = max(map(len, values))
            require(batch in (1, self.lowered.batch), "biases", f"batch {self.lowered.batch or 1}", batch)
            if self.lowered.unmodulated is not None:
                alone = self.lowered.unmodulated.rows.cpu()
                neutral = all(bool((b[:, alone] == 0).all()) for b in values)
                require(neutral, "biases", "0 at the queries where the plan has 0 (make a new plan)", "other numbers")
            resolved, constant = self.resolved.with_biases(values), alike(values)
            if constant != self.lowered.biases.constant:  # other work folds
                return self._lowered_again(resolved)
            return self._with(resolved, self.lowered.with_biases(resolved.biases, constant))

    def with_weight(self, weight: Tensor) -> Plan:
        """This plan with other values in its only BandWeight; everything else is shared, but for a rotation of the keys
        that has them in it.

        Args:
            weight: ``(D/2,)`` floating point, finite. A neutral one stays: the result is then that of none up to
                rounding.

        Raises:
            ValueError: a plan without exactly one BandWeight that is not neutral, a weight of another shape.
        """
        held, pairs = self.resolved.weights, self.lowered.pairs
        require(len(held) == 1, "plan", "exactly one BandWeight that is not neutral", len(held))
        hint = f"({pairs},)"
        require_tensor("weight", weight, (1,), hint)
        require(weight.shape[0] == pairs, "weight", hint, tuple(weight.shape))
        require_finite("weight", weight, ("pair",))
        with torch.inference_mode(False):
            resolved = self.resolved.with_weight(weight)
            return self._with(resolved, self.lowered.with_weight(resolved.weights[0].w))

    def with_rope(self, rope: RoPE, key_rope: RoPE | None = None) -> Plan:
        """This plan with other angles of the same tokens: a rescaling for every step costs a few operations on the
        device. Everything else is shared. A plan with per-query scales is lowered again.

        Args:
            rope, key_rope: as the plan was made of, with other angles. They are not read on the host, and must be
                finite. Axes are the plan's own.

        Raises:
            ValueError: a rope where the plan has none or none where it has one, other shapes, another pairing, or
                tensors rotated already where those of the plan are not.
        """
        held = self.resolved
        require(held.rope is not None, "rope", "None, as the plan has none", rope)
        for name, given, mine in (("rope", rope, held.rope), ("key_rope", key_rope, held.key_rope)):
            found, expected = (r and (tuple(r.angles.shape), r.pairing, r.applied) for r in (given, mine))
            require(found == expected, name, f"shape, pairing, applied: {expected}", found)
        device = self.device
        with torch.inference_mode(False):
            queries, keys = (None if r is None else _copy(r.angles) for r in (rope, key_rope))
            resolved = replace(
                held, rope=held.rope and replace(held.rope, angles=queries),
                key_rope=held.key_rope and replace(held.key_rope, angles=keys),
            )  # fmt: skip
            if self.lowered.axis_blocks is not None or widest_float(device) != torch.float64:
                return self._lowered_again(resolved)
            wide = [(x if x.ndim == 3 else x[None]).to(device, torch.float64) for x in (queries, keys) if x is not None]
            return self._with(resolved, turned(self.lowered, *wide))


def plan(
    *,
    rope: RoPE | None = None,
    key_rope: RoPE | None = None,
    modulations: Sequence[Modulation] = (),
    key_mask: Tensor | None = None,
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
        modulations: any of QueryScale (at most one), BandWeight, BiasDelta (disjoint groups), LogitGain, LogitBias,
            KeyBias, ValueGain, in any order.
        key_mask: ``(B, Sk)`` bool, True = attend.
        num_queries, num_keys: ``Sq`` and ``Sk``, needed only where neither ``rope`` nor a modulation tells them
            (``Sk`` with any modulation, ``Sq`` with a LogitBias).
        device: where to put the tables; by default where ``rope`` or the modulations are.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    modulations = as_tuple(modulations)
    # Plans outlive the mode and the default device they are made under.
    with torch.inference_mode(False), torch.device("cpu"):
        check_arguments(rope, key_rope, modulations, key_mask)
        device = common_device(rope, key_rope, modulations, key_mask, device)
        num_queries, num_keys = lengths(rope, key_rope, modulations, key_mask, num_queries, num_keys)
        resolved = resolve(rope, key_rope, modulations, key_mask, num_queries, num_keys)
        lowered = lower(resolved, num_queries, num_keys)
        lowered = map_tensors(lowered, lambda t: _copy(on_device(t, device)))
        rope, key_rope = (r and replace(r, angles=_copy(r.angles), axis=_copy(r.axis)) for r in (rope, key_rope))
        resolved = replace(resolved.to(device), rope=rope, key_rope=key_rope)
        return Plan.of(resolved, lowered)


def _copy(x: Tensor | None) -> Tensor | None:
    """A contiguous copy: kernels rely on the layout, and what the caller does to the original must not matter."""
    return None if x is None else x.detach().clone(memory_format=torch.contiguous_format)


# A cache for callers that build modulations anew on every call. It holds its keys alive, so identities stay valid;
# a tensor changed in place has another version and misses. Writes that torch does not see (numpy, `.data`, kernels of
# one's own) do not: such callers hold a plan.
_CACHE: OrderedDict[tuple, tuple[Plan, tuple]] = OrderedDict()
_CACHE_SIZE = 8
_CACHE_LOCK = threading.Lock()


def cached_plan(
    rope: RoPE | None,
    key_rope: RoPE | None,
    modulations: Sequence[Modulation],
    key_mask: Tensor | None,
    num_queries: int | None,
    num_keys: int | None,
    device: torch.device | str | None,
) -> Plan:
    """:func:`plan`, remembered by the identity and version of the tensors involved (the last 8 calls)."""
    arguments: dict[str, Any] = dict(
        rope=rope, key_rope=key_rope, modulations=modulations, key_mask=key_mask,
        num_queries=num_queries, num_keys=num_keys, device=device,
    )  # fmt: skip
    parts = [rope, key_rope, *modulations]
    known = all(isinstance(p, (RoPE, *MODULATIONS)) for p in parts if p is not None)
    if not known or not (key_mask is None or isinstance(key_mask, Tensor)):
        return plan(**arguments)  # which says what is wrong
    held: list[Tensor] = []
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


def _identity(value: Any, held: list[Tensor]):
    if isinstance(value, Tensor):
        base = value._base
        held.append(value if base is None else base)
        if base is None:
            return id(value), value._version
        # A view, which may be made anew for every call.
        at = value.dtype, value.shape, value.stride(), value.storage_offset(), value.is_neg()
        return id(base), value._version, *at
    if hasattr(value, "__dataclass_fields__"):
        return (type(value), *(_identity(getattr(value, name), held) for name in value.__dataclass_fields__))
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    return value
