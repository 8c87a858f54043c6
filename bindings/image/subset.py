"""Modulations of a sequence, for a call over some of its queries and keys, in another order if need be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import fastrope as fr
from fastrope.modulations import Modulation

from .part import Places

PER_QUERY: dict[type, str] = {fr.QueryScale: "scale", fr.LogitGain: "gain", fr.LogitBias: "bias"}


def subset_of(modulations: tuple, queries: Places, keys: Places, length: int) -> list[Modulation]:
    """What modulations over a sequence of ``length`` tokens say of some of its queries and keys.

    Args:
        queries, keys: the places of those that are left, in the order of the new call; indices on the CPU.

    Raises:
        NotImplementedError: a BiasDelta group of which some keys are left and some are not: its mean would change.
    """
    found = (_one(m, queries, keys, length) for m in modulations)
    return [m for m in found if m is not None]


def _one(m: Modulation, queries: Places, keys: Places, length: int) -> Modulation | None:
    if isinstance(m, fr.KeyBias):
        return replace(m, bias=m.bias[..., _on(keys, m.bias)])
    covered = torch.zeros(length, dtype=torch.bool, device="cpu")
    covered[m.keys if isinstance(m.keys, slice) else m.keys.cpu()] = True
    left = covered[keys]
    if not left.any():
        return None
    if isinstance(m, fr.BiasDelta) and int(left.sum()) < int(covered.sum()):
        raise NotImplementedError("BiasDelta.keys: expected a group within the image or within one prompt beside NAG, "
                                  "which attends to them apart, received one with keys of several")  # fmt: skip
    if isinstance(m, fr.ValueGain) and isinstance(m.gain, Tensor) and m.gain.ndim:
        if _per_key(m.gain, covered):
            return replace(m, keys=left, gain=_of_keys(m, m.gain, keys, left, length))
        gain = m.gain[:, None] if m.gain.ndim == 1 else m.gain  # per row, also where as many keys are left
        return replace(m, keys=left, gain=gain)
    name = PER_QUERY.get(type(m), "")
    value = getattr(m, name, None)
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[-1] > 1:
        return replace(m, keys=left, **{name: value[..., _on(queries, value)]})
    return replace(m, keys=left)


def _per_key(gain: Tensor, covered: Tensor) -> bool:
    return gain.shape[-1] == int(covered.sum())


def _of_keys(m: fr.ValueGain, gain: Tensor, keys: Places, left: Tensor, length: int) -> Tensor:
    """The gains of the keys that are left, in the order of the new call."""
    place = torch.arange(length, device="cpu")
    named = place[m.keys if isinstance(m.keys, slice) else m.keys.cpu()]
    where = torch.empty(length, dtype=torch.int64, device="cpu")
    where[named] = torch.arange(len(named), device="cpu")
    return gain[..., where[place[keys][left]].to(gain.device)]


def _on(places: Places, x: Tensor) -> Places:
    return places if isinstance(places, slice) else places.to(x.device)
