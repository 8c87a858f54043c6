"""The part of a sequence that one of several processes has."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fastrope.sharing import Statistics

Places = slice | Tensor  # of tokens: a slice, or (n,) int64 indices


@dataclass(frozen=True, eq=False)
class Part:
    """Where several processes share the tokens of a sequence: those of one process, and what it gets from the others.

    A process has queries, keys and values of its own tokens. Keys and values of all tokens are gathered where they are
    needed; queries stay where they are.

    Args:
        name: of the choice of tokens, hashable.
        shards: the tokens of every process, in order, each ``(n,)`` int64 on the CPU.
        mine: which of them are here.
        holders: processes that have the tokens of one shard, each with some of the heads.
        collect: ``collect(x, lengths, what)``: the ``x (n, ...)`` of all these processes, one after the other, from the
            ``n`` of each.
        total: sums a tensor over the holders of the shard that is here.
    """

    name: Hashable
    shards: tuple[Tensor, ...]
    mine: int
    holders: int
    collect: Callable[[Tensor, Sequence[int], str], Tensor]
    total: Callable[[Tensor], Tensor]

    @property
    def queries(self) -> Tensor:
        """The tokens that are here."""
        return self.shards[self.mine]

    @cached_property
    def keys(self) -> Tensor:
        """All tokens, in the order of gathered keys."""
        return torch.cat(self.shards)

    def within(self, span: slice, device: torch.device, gathered: bool = False) -> tuple[Tensor, Tensor]:
        """Places of a span's tokens among the tokens here (or all, as ``gathered``), and these tokens."""
        return _within(self.keys if gathered else self.queries, span.start, span.stop, device)

    def lengths(self, tokens: int) -> list[int]:
        """How many of a picture's tokens each process has."""
        of_each = [len(x) for x in torch.arange(tokens, device="cpu").tensor_split(len(self.shards) * self.holders)]
        return [sum(of_each[n : n + self.holders]) for n in range(0, len(of_each), self.holders)]

    def gather(self, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, n, H, D)`` of all processes.

        Args:
            lengths: tokens of every process, if these are a cached reference's and not those of the sequence.
        """
        if len(self.shards) == 1:
            return k, v
        mine = torch.stack([k.transpose(0, 1), v.transpose(0, 1)], dim=1)  # (n, 2, B, H, D), contiguous
        what = "k, v" if lengths is None else "cached k, v"
        found = self.collect(mine, [len(shard) for shard in self.shards] if lengths is None else lengths, what)
        k, v = (x.transpose(0, 1) for x in found.unbind(1))
        return k, v

    def statistics(self, x: Tensor, span: slice) -> Statistics:
        """Over a span's tokens in all processes. ``x (B, n, H, D)`` are those that are here, or none."""
        if len(self.shards) == 1:
            return Statistics.of(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide if x.shape[1] else wide.new_zeros(len(x), 1, *x.shape[2:]), 1, correction=0,
                                   keepdim=True)  # fmt: skip
        each = self.collect(torch.stack([mean, var])[None], [1] * len(self.shards), "statistics")
        cpu = torch.device("cpu")
        counts = [len(_within(shard, span.start, span.stop, cpu)[0]) for shard in self.shards]
        parts = [(n / sum(counts), *moments) for n, moments in zip(counts, each, strict=True) if n]
        mean = torch.stack([share * m for share, m, _ in parts]).sum(dim=0)
        var = torch.stack([share * (v + (m - mean).square()) for share, m, v in parts]).sum(dim=0)
        return Statistics.from_moments(mean, var)


@lru_cache(maxsize=256)
def _within(tokens: Tensor, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cached, because every layer asks; a tensor is its own key."""
    places = ((tokens >= start) & (tokens < stop)).nonzero().flatten()
    return places.to(device), tokens[places].to(device)


def replaced(x: Tensor, places: Places, inner: Tensor) -> list[Tensor]:
    """Runs of tokens that make up ``x`` with other values in some places."""
    if isinstance(places, slice):
        return [x[:, : places.start], inner, x[:, places.stop :]]
    return [x.index_copy(1, places, inner)]


def joined(runs: list[Tensor]) -> Tensor:
    """Runs of tokens, one after the other."""
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)
