"""The modulations of an attention call. Each is a frozen description that computes nothing.

The formulas and their names (``phi'``, ``mu``, ``kt``, ``ktt``, ``s``, ``vt``) are those of ``docs/mathematics.md``.
Every modulation except KeyBias has ``keys``, the keys that it covers: a ``slice``, a 1-D bool mask over ``Sk`` or a 1-D
integer index tensor (by default ``slice(None)``, all keys).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .checks import is_number, require, require_tensor, whole_slice

Keys = slice | torch.Tensor


def _take_keys(m: Any) -> None:
    """Check the keys of a modulation; the bounds of a slice become Python integers."""
    keys, name = m.keys, f"{type(m).__name__}.keys"
    if isinstance(keys, slice):
        object.__setattr__(m, "keys", whole_slice(name, keys))
        return
    require(isinstance(keys, torch.Tensor), name, "a slice, bool mask or index tensor", type(keys).__name__)
    require(keys.ndim == 1, name, "a 1-D mask or index tensor", tuple(keys.shape))
    indices = (torch.bool, torch.int16, torch.int32, torch.int64)  # uint8 could be a mask of another library
    require(keys.dtype in indices, name, "a bool mask or int16, int32 or int64 indices", keys.dtype)


def _check_values(name: str, values: Any, ndim: tuple[int, ...], hint: str) -> None:
    require_tensor(name, values, ndim, hint)
    require(values.is_floating_point(), name, "a floating-point tensor", values.dtype)


@dataclass(frozen=True, eq=False)
class QueryScale:
    """Multiplies positions, per query: ``phi'[i] = r_i phi[i]`` and ``phi'[j] = r_i phi[j]`` (LooseRoPE,
    arXiv 2601.05127). Query and key both turn, so the score depends on ``r_i (p_i - p_j)`` and not on the origin.

    Args:
        scale: ``r``, ``(Sq,)`` or ``(B, Sq)``, dimensionless; 1 is neutral, 0 ignores position.
        keys: the covered keys.
        axes: position axes whose pairs are scaled; None scales every pair.

    Raises:
        ValueError: wrong rank or dtype, or axes that are not distinct non-negative integers.
    """

    scale: torch.Tensor
    keys: Keys = field(default_factory=lambda: slice(None))
    axes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_values("QueryScale.scale", self.scale, (1, 2), "(Sq,) or (B, Sq)")
        _take_keys(self)
        if self.axes is not None:
            axes = self.axes
            ok = isinstance(axes, (tuple, list)) and len(axes) > 0 and all(isinstance(a, int) and a >= 0 for a in axes)
            require(ok and len(set(axes)) == len(axes), "QueryScale.axes", "distinct axis numbers or None", repr(axes))
            object.__setattr__(self, "axes", tuple(axes))


@dataclass(frozen=True, eq=False)
class BandWeight:
    """Multiplies RoPE pairs of the covered keys: ``ktt = w_c kt`` (Untwisting RoPE, arXiv 2602.05013). Both channels of
    a pair have one weight, so weighting and rotation can be exchanged.

    Args:
        weight: ``w``, ``(D/2,)``, dimensionless, in the order of the RoPE pairs; 1 is neutral.
        keys: the covered keys.
    """

    weight: torch.Tensor
    keys: Keys = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        _check_values("BandWeight.weight", self.weight, (1,), "(D/2,)")
        _take_keys(self)


@dataclass(frozen=True, eq=False)
class BiasDelta:
    """Moves keys away from their group mean, or towards it: ``kt = lambda mu + delta (khat - mu)`` (GRAG,
    arXiv 2510.24657).

    ``bias`` (lambda) weighs the group against the other keys, ``delta`` is a temperature inside the group. The mean is
    over the unmasked keys of the group, per batch row, key head and channel, after rotation. ``on="values"`` does the
    same to values: ``vt = lambda nu + delta (v - nu)`` (DCAG, arXiv 2602.18022). The weights of attention do not
    change.

    Args:
        bias: lambda, a number or a tensor ``()`` or ``(B,)``; 1 is neutral.
        delta: a number or a tensor ``()`` or ``(B,)``; 1 is neutral.
        keys: the group. Two groups of one kind may not share a key.
        on: ``"keys"``, or ``"values"`` of these keys.
    """

    bias: float | torch.Tensor = 1.0
    delta: float | torch.Tensor = 1.0
    keys: Keys = field(default_factory=lambda: slice(None))
    on: Literal["keys", "values"] = "keys"

    def __post_init__(self) -> None:
        for name, value in (("BiasDelta.bias", self.bias), ("BiasDelta.delta", self.delta)):
            if isinstance(value, torch.Tensor):
                _check_values(name, value, (0, 1), "() or (B,)")
            else:
                require(is_number(value), name, "a number or a tensor () or (B,)", repr(value))
        require(self.on in ("keys", "values"), "BiasDelta.on", '"keys" or "values"', repr(self.on))
        _take_keys(self)


@dataclass(frozen=True, eq=False)
class LogitGain:
    """Multiplies scaled logits, per query: ``s_ij <- g_i s_ij`` (the crop factor of LooseRoPE). Negative logits become
    more negative with a gain above 1.

    Args:
        gain: ``g``, ``(Sq,)`` or ``(B, Sq)``, dimensionless; 1 is neutral.
        keys: the covered keys.
    """

    gain: torch.Tensor
    keys: Keys = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        _check_values("LogitGain.gain", self.gain, (1, 2), "(Sq,) or (B, Sq)")
        _take_keys(self)


@dataclass(frozen=True, eq=False)
class LogitBias:
    """Adds a number to logits, per query: ``s_ij <- s_ij + b_i``, after any gain. It is a log-weight: with ``log 2``
    every covered key counts twice, and ``-inf`` hides the covered keys from the query. Group means do not change.

    Args:
        bias: ``b``, natural log units: a number, or a tensor ``()``, ``(Sq,)``, ``(B, Sq)``, or ``(B, 1)`` for all
            queries of a batch row; 0 is neutral, ``-inf`` hides.
        keys: the covered keys.

    Raises:
        ValueError: ``+inf``, NaN, wrong rank or dtype.
    """

    bias: float | torch.Tensor
    keys: Keys = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        shapes = "(), (Sq,), (B, Sq) or (B, 1)"
        if isinstance(self.bias, torch.Tensor):
            _check_values("LogitBias.bias", self.bias, (0, 1, 2), shapes)
        else:
            ok = is_number(self.bias) and self.bias < float("inf")  # which NaN is not
            require(ok, "LogitBias.bias", f"a number below inf, or a tensor {shapes}", repr(self.bias))
        _take_keys(self)


@dataclass(frozen=True, eq=False)
class KeyBias:
    """Adds a number to the logits of each key, for all queries: ``s_ij <- s_ij + beta_j``. ``log n`` equals n copies of
    the key. ``-inf`` removes it, also from group means, as ``key_mask`` does.

    Args:
        bias: ``beta``, natural log units, ``(Sk,)`` or ``(B, Sk)``; 0 is neutral.
    """

    bias: torch.Tensor

    def __post_init__(self) -> None:
        _check_values("KeyBias.bias", self.bias, (1, 2), "(Sk,) or (B, Sk)")


@dataclass(frozen=True, eq=False)
class ValueGain:
    """Multiplies values: ``vt_j = u_j v_j``, after BiasDelta on values. The weights of attention and the log-sum-exp do
    not change. With a negative gain, a key subtracts its value (NegPiP).

    Args:
        gain: ``u``, dimensionless; 1 is neutral. A number or ``()``; one per covered key, ``(n,)`` or ``(B, n)``, in
            the order of ``keys``; or one per batch row, ``(B, 1)`` or ``(B,)``. If ``(B,)`` and ``(n,)`` are the same
            shape, it means one per key.
        keys: the covered keys.
    """

    gain: float | torch.Tensor
    keys: Keys = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        shapes = "(), (n,) or (B, n) for n covered keys, (B, 1) or (B,)"
        if isinstance(self.gain, torch.Tensor):
            _check_values("ValueGain.gain", self.gain, (0, 1, 2), shapes)
        else:
            require(is_number(self.gain), "ValueGain.gain", f"a number or a tensor {shapes}", repr(self.gain))
        _take_keys(self)


Modulation = QueryScale | BandWeight | BiasDelta | LogitGain | LogitBias | KeyBias | ValueGain
MODULATIONS = (QueryScale, BandWeight, BiasDelta, LogitGain, LogitBias, KeyBias, ValueGain)
PARAMETERS = ("scale", "weight", "bias", "delta", "gain")  # fields of modulations, besides keys, that may be tensors
