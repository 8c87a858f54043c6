"""The modulations: what may be done to an attention call, each a frozen description that computes nothing.

The formulas and their names (``phi'``, ``mu``, ``kt``, ``ktt``, ``s``, ``vt``) are those of ``docs/mathematics.md``.
Every modulation but KeyBias names the keys it covers: a ``slice``, a 1-D bool mask over ``Sk`` or a 1-D integer index
tensor (``slice(None)``, all keys, by default).
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
    indices = (torch.bool, torch.int16, torch.int32, torch.int64)  # uint8 is how masks are stored elsewhere
    require(keys.dtype in indices, name, "a bool mask or int16, int32 or int64 indices", keys.dtype)


def _check_values(name: str, values: Any, ndim: tuple[int, ...], hint: str) -> None:
    require_tensor(name, values, ndim, hint)
    require(values.is_floating_point(), name, "a floating-point tensor", values.dtype)


@dataclass(frozen=True, eq=False)
class QueryScale:
    """Positions multiplied per query: ``phi'[i] = r_i phi[i]`` and ``phi'[j] = r_i phi[j]`` (LooseRoPE,
    arXiv 2601.05127). Both sides turn, so the score depends on ``r_i (p_i - p_j)`` and the origin does not matter.

    Args:
        scale: ``r``, ``(Sq,)`` or ``(B, Sq)``, dimensionless; 1 is neutral, 0 forgets position.
        keys: the keys covered.
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
    """Pairs of the covered keys weighted: ``ktt = w_c kt`` (Untwisting RoPE, arXiv 2602.05013). Both members of a
    pair share the weight, so it commutes with the rotation.

    Args:
        weight: ``w``, ``(D/2,)``, dimensionless, in the order of the RoPE pairs; 1 is neutral.
        keys: the keys covered.
    """

    weight: torch.Tensor
    keys: Keys = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        _check_values("BandWeight.weight", self.weight, (1,), "(D/2,)")
        _take_keys(self)


@dataclass(frozen=True, eq=False)
class BiasDelta:
    """Keys re-weighted around their group mean: ``kt = lambda mu + delta (khat - mu)`` (GRAG, arXiv 2510.24657).

    ``bias`` (lambda) trades the group against the other keys, ``delta`` is a temperature inside it. The mean runs over
    the unmasked keys of the group, per batch row, key head and channel, after rotation. On values it is the same of the
    values: ``vt = lambda nu + delta (v - nu)`` (DCAG, arXiv 2602.18022), with no effect on the weights of attention.

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
    """Scaled logits multiplied per query: ``s_ij <- g_i s_ij``, sign included (the crop factor of LooseRoPE).

    Args:
        gain: ``g``, ``(Sq,)`` or ``(B, Sq)``, dimensionless; 1 is neutral.
        keys: the keys covered.
    """

    gain: torch.Tensor
    keys: Keys = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        _check_values("LogitGain.gain", self.gain, (1, 2), "(Sq,) or (B, Sq)")
        _take_keys(self)


@dataclass(frozen=True, eq=False)
class LogitBias:
    """A number added to logits, per query: ``s_ij <- s_ij + b_i``, after any gain. A log-weight: ``log 2`` lets every
    covered key count twice, ``-inf`` hides the covered keys from the query. Means are left alone.

    Args:
        bias: ``b``, natural log units: a number, or a tensor ``()``, ``(Sq,)``, ``(B, Sq)``, or ``(B, 1)`` for all
            queries of a batch row; 0 is neutral, ``-inf`` hides.
        keys: the keys covered.

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
    """A number added to the logits of each key, for all queries: ``s_ij <- s_ij + beta_j``. ``log n`` is worth n copies
    of the key; ``-inf`` equals its absence, also from means, as ``key_mask`` does.

    Args:
        bias: ``beta``, natural log units, ``(Sk,)`` or ``(B, Sk)``; 0 is neutral.
    """

    bias: torch.Tensor

    def __post_init__(self) -> None:
        _check_values("KeyBias.bias", self.bias, (1, 2), "(Sk,) or (B, Sk)")


@dataclass(frozen=True, eq=False)
class ValueGain:
    """Values multiplied: ``vt_j = u_j v_j``, after BiasDelta on values. The weights of attention and the log-sum-exp
    stay. Negative gains turn what a key adds into its opposite (NegPiP).

    Args:
        gain: ``u``, dimensionless; 1 is neutral. A number or ``()``; one per covered key, ``(n,)`` or ``(B, n)``, in
            the order in which ``keys`` names them; or one per batch row, ``(B, 1)`` or ``(B,)``. Where ``(B,)`` and
            ``(n,)`` are the same shape, it is read as one per key.
        keys: the keys covered.
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
PARAMETERS = ("scale", "weight", "bias", "delta", "gain")  # fields of modulations that may hold tensors, beside keys
