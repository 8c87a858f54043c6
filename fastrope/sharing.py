"""Shared attention: a target also attends to the image keys and values of a reference outside of its sequence.

The reference runs its own plain attention and never sees the target. So its keys and values depend on the step alone,
and a :class:`ReferenceCache` can hold them for any number of targets. Its text is not shared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .checks import require

SHARED = "shared"
EPS = 1e-6  # added to variances


@dataclass(frozen=True)
class Sharing:
    """What a method requests for one attention layer.

    Args:
        reference: ``"shared"``, or the index of a reference in the sequence itself.
        adain: strength of :func:`adain` on queries and keys of the target's image tokens, 0..1.
    """

    reference: str | int = SHARED
    adain: float = 0.0


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference for shared attention. Any object with these two attributes will do.

    Args:
        latents: ``latents(step, sigma)``: the reference at noise level ``sigma`` of step ``step``, as the transformer
            takes its input: packed ``(R, tokens, C)``; for Z-Image ``(R, C, 1, rows, columns)``. Every target attends
            to all R reference images.
        arguments: further arguments of the transformer for the reference, by the names of its ``forward``: its own text
            (``encoder_hidden_states (R, text, C)`` and related ones; for Z-Image ``cap_feats``, a list), and
            ``img_ids``, ``txt_ids``, ``img_shapes`` or ``guidance`` if they differ from the target's.

    Raises:
        ValueError: latents that cannot be called, arguments that are no mapping.
    """

    latents: Callable[[int, float], torch.Tensor]
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_reference(self)


def check_reference(source: object) -> None:
    """Require ``latents(step, sigma)`` and a mapping ``arguments``.

    Raises:
        ValueError: naming the attribute that is missing or wrong.
    """
    latents, arguments = getattr(source, "latents", None), getattr(source, "arguments", None)
    expected = "a function (step, sigma) -> latents, as fastrope.prepare_reference makes of one or several pictures"
    received = f"nothing, of a {type(source).__name__}" if latents is None else repr(latents)
    require(callable(latents), "reference.latents", expected, received)
    named = isinstance(arguments, Mapping) and all(isinstance(name, str) for name in arguments)
    require(named, "reference.arguments", "a mapping from names of the transformer's arguments", repr(arguments))


# ---- statistics ------------------------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """Per head and channel, ``mean`` and ``std``, ``(B or 1, 1, H, D)``, float32 or float64."""

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> Statistics:
        """Over the tokens of ``x (B, S, H, D)``: population variance, ``std = sqrt(var + 1e-6)``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, dim=1, correction=0, keepdim=True)
        return cls.from_moments(mean, var)

    @classmethod
    def from_moments(cls, mean: torch.Tensor, var: torch.Tensor) -> Statistics:
        """Of means and population variances."""
        return cls(mean, (var + EPS).sqrt())


def adain(x: torch.Tensor, reference: Statistics, strength: float, own: Statistics | None = None) -> torch.Tensor:
    """``x <- (1 - a) x + a ((x - mean) / std * std_r + mean_r)``, statistics per head and channel over tokens
    (StyleAligned, arXiv 2312.02133).

    Args:
        x: ``(B, S, H, D)``, queries or keys after QK norm, before rotation.
        reference: ``mean_r`` and ``std_r``.
        strength: a, 0..1.
        own: ``mean`` and ``std``, if ``x`` has some of the tokens only; None: those of ``x``.

    Returns:
        ``(B, S, H, D)`` in the dtype of ``x``; computed in float32 (float64 for float64).
    """
    mean, std = Statistics.of(x) if own is None else own
    ratio = reference.std / std
    return torch.addcmul(strength * (reference.mean - mean * ratio), x, 1 + strength * (ratio - 1)).to(x.dtype)


# ---- shared keys and their cache -------------------------------------------------------------------------------------


class SharedKeys(NamedTuple):
    """Keys and values of all reference images in one layer, ``k, v (1, tokens, Hkv, D)`` after QK norm; ``k`` is
    rotated already if ``applied``. Statistics of their queries and unrotated keys; None if no method needs them."""

    k: torch.Tensor
    v: torch.Tensor
    applied: bool
    queries: Statistics | None
    keys: Statistics | None

    def tensors(self) -> list[torch.Tensor]:
        """All stored tensors."""
        return [self.k, self.v, *(self.queries or ()), *(self.keys or ())]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> SharedKeys:
        """The same with ``change`` applied to every tensor."""
        queries, keys = (s and Statistics(*map(change, s)) for s in (self.queries, self.keys))
        return SharedKeys(change(self.k), change(self.v), self.applied, queries, keys)


@dataclass(eq=False)
class Snapshot:
    """The reference at one step: ``angles (tokens, D/2)`` of its image tokens, their grids, and the shared keys of each
    layer, by index."""

    angles: torch.Tensor
    grids: tuple[tuple[int, int], ...]
    layers: dict[int, SharedKeys] = field(default_factory=dict)


class ReferenceCache:
    """Keys and values of a reference per step and layer. The reference runs alone when a step first needs them.

    ``fr.apply(pipe, method, reference=ReferenceCache(source))``: the first run costs one more call of the transformer
    per step. Further targets, seeds, prompts, batch sizes, branches of guidance and dials cost no call. The grid and
    the length of the text may differ from the target's. An entry is used for the same step, sigma, guidance, dtype and
    LoRAs. Weights that change in place are not noticed: call :meth:`clear` then.

    A layer and step takes ``2 * R * tokens * heads * D`` numbers: 48 MiB for FLUX.1 at 1024 px in bfloat16. Under
    diffusers' context parallelism each process has its part of them. :attr:`nbytes` says how many bytes are in use.

    Args:
        source: a :class:`Reference`, or an object like one.
        device: that stores them; ``"cpu"`` is page-locked host memory of a GPU. None: the device that computes them.

    Raises:
        ValueError: a source without ``latents`` or ``arguments``.
    """

    def __init__(self, source: Any, device: torch.device | str | None = None) -> None:
        check_reference(source)
        self.source = source
        self.device = None if device is None else torch.device(device)
        self._snapshots: dict[Hashable, Snapshot] = {}
        self._model: Callable[[], object | None] = lambda: None

    @property
    def nbytes(self) -> int:
        """Bytes in use, on any device."""
        snapshots = list(self._snapshots.values())  # a copy, because another thread may fill the cache meanwhile
        return sum(t.nbytes for s in snapshots for keys in list(s.layers.values()) for t in keys.tensors())

    def __len__(self) -> int:
        return len(self._snapshots)

    def __bool__(self) -> bool:
        """True, also for an empty cache, so that ``cache or source`` means the cache."""
        return True

    def __repr__(self) -> str:
        place = "where it is computed" if self.device is None else self.device
        return f"<fastrope.ReferenceCache: {len(self)} steps, {self.nbytes / 2**20:.1f} MiB, {place}>"

    def clear(self) -> None:
        """Drop all entries."""
        self._snapshots.clear()
        self._model = lambda: None

    def claim(self, model: object) -> None:
        """Bind the cache to a model.

        Raises:
            ValueError: the cache holds keys of another model.
        """
        require(not self._snapshots or self._model() is model, "reference", "a cache of this very transformer, or an "
                "empty one", "one that another transformer filled; call clear() first")  # fmt: skip
        self._model = weakref.ref(model)

    def find(self, key: Hashable) -> Snapshot | None:
        """The snapshot of a step, if there is one."""
        return self._snapshots.get(key)

    def put(self, key: Hashable, snapshot: Snapshot) -> Snapshot:
        """Add a snapshot. If there is one under the same key, add the layers to it."""
        known = self._snapshots.setdefault(key, snapshot)
        if known is not snapshot:
            known.layers.update(snapshot.layers)
        return known

    def store(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of ``x`` on the device of the cache. It is no inference tensor, so that later runs in any mode can use
        it."""
        with torch.inference_mode(False), torch.no_grad():
            if self.device is None or self.device == x.device:
                return x.clone(memory_format=torch.contiguous_format)
            pin = self.device.type == "cpu" and x.device.type == "cuda"
            copy = torch.empty(x.shape, dtype=x.dtype, device=self.device, pin_memory=pin)
            return copy.copy_(x, non_blocking=True)
