"""Shared attention: a target that also attends to the image keys and values of a reference it is no sequence with.

The reference runs its own plain attention and never sees the target, so what a layer makes of it depends on the step
alone and can be kept (:class:`ReferenceCache`) for any number of targets. Its text is not shared.
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
    """What a method asks of one attention layer.

    Args:
        reference: ``"shared"``, or the index of a reference in the sequence itself.
        adain: strength of :func:`adain` on queries and keys of the target's image tokens, 0..1.
    """

    reference: str | int = SHARED
    adain: float = 0.0


@dataclass(frozen=True, eq=False)
class Reference:
    """What the reference is at each step. Any object with these two attributes will do.

    Args:
        latents: ``latents(step, sigma)``: the reference at noise level ``sigma`` of step ``step``, as the transformer
            takes its input: packed ``(R, tokens, C)``; for Z-Image ``(R, C, 1, rows, columns)``. R reference images are
            all seen by every target.
        arguments: what else the transformer is told of the reference, by the names of its ``forward``: its own text
            (``encoder_hidden_states (R, text, C)`` and what goes with it; for Z-Image ``cap_feats``, a list), and where
            it differs from the target's ``img_ids``, ``txt_ids``, ``img_shapes`` or ``guidance``.

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
        ValueError: naming what is missing.
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
        return cls(mean, (var + EPS).sqrt())


def adain(x: torch.Tensor, reference: Statistics, strength: float) -> torch.Tensor:
    """``x <- (1 - a) x + a ((x - mean) / std * std_r + mean_r)``, statistics per head and channel over tokens
    (StyleAligned, arXiv 2312.02133).

    Args:
        x: ``(B, S, H, D)``, queries or keys after QK norm, before rotation.
        reference: ``mean_r`` and ``std_r``.
        strength: a, 0..1.

    Returns:
        ``(B, S, H, D)`` in the dtype of ``x``; computed in float32 (float64 for float64).
    """
    mean, std = Statistics.of(x)
    ratio = reference.std / std
    return torch.addcmul(strength * (reference.mean - mean * ratio), x, 1 + strength * (ratio - 1)).to(x.dtype)


# ---- what a layer shares ---------------------------------------------------------------------------------------------


class SharedKeys(NamedTuple):
    """Of one layer: the keys and values of all reference images, ``k, v (1, tokens, Hkv, D)`` after QK norm, ``k``
    rotated already if ``applied``; statistics of their queries and unrotated keys, where they were asked for."""

    k: torch.Tensor
    v: torch.Tensor
    applied: bool
    queries: Statistics | None
    keys: Statistics | None

    def tensors(self) -> list[torch.Tensor]:
        """All that is stored."""
        return [self.k, self.v, *(self.queries or ()), *(self.keys or ())]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> SharedKeys:
        """The same with every tensor changed."""
        queries, keys = (s and Statistics(*map(change, s)) for s in (self.queries, self.keys))
        return SharedKeys(change(self.k), change(self.v), self.applied, queries, keys)


@dataclass(eq=False)
class Snapshot:
    """The reference at one step: ``angles (tokens, D/2)`` of its image tokens, their grids, and what each layer shares,
    by index."""

    angles: torch.Tensor
    grids: tuple[tuple[int, int], ...]
    layers: dict[int, SharedKeys] = field(default_factory=dict)


class ReferenceCache:
    """Keys and values of a reference per step and layer, made by running it alone when a step first needs them.

    ``fr.apply(pipe, method, reference=ReferenceCache(source))``: the first run costs a call of the transformer more per
    step, every further target, seed, prompt, batch size, branch of guidance and set of dials costs none. The grid and
    the length of text may differ from the target's. What is kept depends on the step, its sigma, the guidance given to
    the transformer, and on the model itself: :meth:`clear` it when weights or LoRAs change.

    A layer and step takes ``2 * R * tokens * heads * D`` numbers: 48 MiB for FLUX.1 at 1024 px in bfloat16.
    :attr:`nbytes` says how many bytes are held.

    Args:
        source: a :class:`Reference`, or what behaves like one.
        device: where to keep them, ``"cpu"`` for a GPU's host memory (page-locked); None where they are computed.

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
        """Bytes held, on whatever device."""
        snapshots = list(self._snapshots.values())  # of this moment: another thread may be filling the cache
        return sum(t.nbytes for s in snapshots for keys in list(s.layers.values()) for t in keys.tensors())

    def __len__(self) -> int:
        return len(self._snapshots)

    def __bool__(self) -> bool:
        """True, also while nothing is held: ``cache or source`` means the cache."""
        return True

    def __repr__(self) -> str:
        place = "where it is computed" if self.device is None else self.device
        return f"<fastrope.ReferenceCache: {len(self)} steps, {self.nbytes / 2**20:.1f} MiB, {place}>"

    def clear(self) -> None:
        """Forget everything."""
        self._snapshots.clear()
        self._model = lambda: None

    def claim(self, model: object) -> None:
        """Say whose keys these are.

        Raises:
            ValueError: another model's are held.
        """
        require(not self._snapshots or self._model() is model, "reference", "a cache of this very transformer, or an "
                "empty one", "one that another transformer filled; clear() it")  # fmt: skip
        self._model = weakref.ref(model)

    def find(self, key: Hashable) -> Snapshot | None:
        """The snapshot of a step, if there is one."""
        return self._snapshots.get(key)

    def put(self, key: Hashable, snapshot: Snapshot) -> Snapshot:
        """Add a snapshot; layers of one that is there already under the same key are kept."""
        known = self._snapshots.setdefault(key, snapshot)
        if known is not snapshot:
            known.layers.update(snapshot.layers)
        return known

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of ``x`` where this cache keeps things, for runs in any mode."""
        with torch.inference_mode(False), torch.no_grad():
            if self.device is None or self.device == x.device:
                return x.clone(memory_format=torch.contiguous_format)
            pin = self.device.type == "cpu" and x.device.type == "cuda"
            kept = torch.empty(x.shape, dtype=x.dtype, device=self.device, pin_memory=pin)
            return kept.copy_(x, non_blocking=True)
