"""Modulated attention of a model whose sequence is split over several processes (diffusers' context parallelism).

Every process holds a part of the text and a part of each row's image tokens, with all heads. For a modulated layer

* *Ulysses* exchanges heads for tokens (one all-to-all), so that each process of the group holds all tokens of the group
  and some heads, and changes them back after attention (a second one);
* *ring* gathers the keys and values of all processes of its group (one all-gather); the queries stay where they are.

With both, Ulysses comes first. Tokens stay in the order in which the processes hold them: plans are made for that
order, and for the queries that a process has. Group means are exact, since a process sees every key of its heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastrope as fr
from fastrope.checks import require

from ..image.part import Part
from ..image.work import LayerWork


def context_parallel(holder: Any) -> Any:
    """diffusers' configuration of context parallelism, of a model or a processor; None where there is none."""
    config = getattr(holder, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None)


@dataclass(frozen=True)
class Split:
    """How one process takes part.

    Args:
        ring, ulysses: the degrees.
        rank: of this process among ``ring * ulysses``; ranks that follow one another exchange heads.
        ulysses_group, ring_group: of torch.distributed.
    """

    ring: int
    ulysses: int
    rank: int
    ulysses_group: Any = None
    ring_group: Any = None

    @staticmethod
    def of(config: Any) -> Split:
        """From diffusers' configuration."""
        return Split(
            config.ring_degree, config.ulysses_degree, dist.get_rank(config._flattened_mesh.get_group()),
            config._ulysses_mesh.get_group(), config._ring_mesh.get_group(),
        )  # fmt: skip

    @property
    def place(self) -> tuple[int, int, int]:
        """The degrees, and the rank."""
        return self.ring, self.ulysses, self.rank

    def lengths(self, tokens: fr.TokenLayout) -> list[int]:
        """Tokens of the processes that exchange heads with this one."""
        first = self.rank // self.ulysses * self.ulysses
        return [len(x) for x in shards_of(self.ring * self.ulysses, tokens)[first : first + self.ulysses]]

    def share(self, tokens: Tensor) -> Tensor:
        """This process's part of the text or of the image."""
        return tokens.tensor_split(self.ring * self.ulysses)[self.rank]

    def part(self, tokens: fr.TokenLayout) -> Part:
        """What this process has of a sequence during attention."""
        return _part_of(self, tokens)


def require_shares(config: Any, tokens: fr.TokenLayout) -> None:
    """Text and image must have a part for every process, of one length unless diffusers takes others.

    Raises:
        NotImplementedError: they have not.
    """
    processes = config.ring_degree * config.ulysses_degree
    uneven = getattr(config, "ulysses_anything", False) or getattr(config, "ring_anything", False)
    for name, count in (("text", tokens.text_tokens), ("image", len(tokens) - tokens.text_tokens)):
        if count < processes if uneven else count % processes:
            expected = f"at least {processes}" if uneven else f"a number that divides by {processes} processes"
            raise NotImplementedError(
                f"context parallelism: expected {expected} as {name} tokens, received {count}; use another size or "
                "max_sequence_length, or diffusers' ulysses_anything or ring_anything, which take one degree alone"
            )


def shares(heads: int, processes: int) -> list[int]:
    """Heads of each process."""
    return [heads // processes + (n < heads % processes) for n in range(processes)]


@lru_cache(maxsize=64)
def shards_of(processes: int, tokens: fr.TokenLayout) -> tuple[Tensor, ...]:
    """Tokens of every process ``(n,)`` int64 on the CPU: its part of the text, then its part of the image."""
    spans = torch.arange(len(tokens), device="cpu").split([tokens.text_tokens, len(tokens) - tokens.text_tokens])
    return tuple(torch.cat(part) for part in zip(*(span.tensor_split(processes) for span in spans), strict=True))


@lru_cache(maxsize=64)
def _part_of(split: Split, tokens: fr.TokenLayout) -> Part:
    each, ulysses = shards_of(split.ring * split.ulysses, tokens), split.ulysses
    shards = tuple(torch.cat(each[n : n + ulysses]) for n in range(0, len(each), ulysses))
    collect, total = partial(_collected, group=split.ring_group), partial(_summed, group=split.ulysses_group)
    return Part(split.place, shards, split.rank // ulysses, ulysses, collect, total if ulysses > 1 else lambda x: x)


def communication(
    split: Split,
    tokens: fr.TokenLayout,
    batch: int,
    heads: int,
    dim: int,
    itemsize: int,
    *,
    kv_heads: int | None = None,
    cached: Sequence[int] = (),
    statistics: int = 0,
    guided: bool = False,
) -> dict[str, int]:
    """Bytes that this process sends to others for one modulated layer, by collective. Of an all-gather counts what each
    of the others receives from it, of an all-reduce over ``n`` processes ``2 (n - 1) / n`` of the tensor.

    Args:
        batch, heads, dim: of the model's queries, keys and values, before anything is exchanged; a reference in the
            batch counts as rows.
        itemsize: bytes per number.
        kv_heads: of keys and values; None: as many as of queries.
        cached: tokens of each picture of a reference cache.
        statistics: rows whose mean and deviation AdaIN takes, for queries and for keys: ``2 (B + R)`` with ``R``
            pictures in the batch, ``2 B`` with a cache, ``4 B`` with a reference of the sequence itself.
        guided: with NAG.
    """
    part, lengths, place = split.part(tokens), split.lengths(tokens), split.rank % split.ulysses
    mine, others, around, token = lengths[place], split.ulysses - 1, split.ring - 1, batch * dim * itemsize
    kv_heads = heads if kv_heads is None else kv_heads
    inner, keys = shares(heads, split.ulysses)[place], 2 * shares(kv_heads, split.ulysses)[place]  # keys and values
    image = len(part.within(slice(tokens.text_tokens, len(tokens)), torch.device("cpu"))[0])
    return {
        "all-to-all of q, k, v": mine * (heads + 2 * kv_heads - inner - keys) * token,
        "all-gather of k, v": sum(lengths) * keys * around * token,
        "all-gather of cached k, v": sum(part.lengths(n)[part.mine] for n in cached) * keys * around * dim * itemsize,
        "all-gather of statistics": statistics * 2 * inner * dim * around * 4,
        "all-reduce of norms": guided * 2 * batch * image * 4 * 2 * others // split.ulysses,
        "all-to-all of the output": (sum(lengths) - mine) * inner * token,
    }


_COUNTED: ContextVar[dict[str, int] | None] = ContextVar("counted", default=None)


def attend(work: LayerWork, split: Split, tokens: fr.TokenLayout, sent: dict[str, int], q: Tensor, k: Tensor, v: Tensor,
           applied: bool, backend: str) -> Tensor:  # fmt: skip
    """Modulated attention of the part of a sequence that this process holds.

    Args:
        work: of the whole sequence.
        sent: where to write what this process sends, as :func:`communication`.
        q, k, v: ``(B, S_local, H, D)``; keys and values may have fewer heads.

    Returns:
        ``(B, S_local, H, D)``.

    Raises:
        NotImplementedError: heads that do not divide, or tensors that require grad.
        RuntimeError: another process is gone.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError("context parallelism: expected torch.no_grad() in a modulated layer, received "
                                  "tensors that require grad")  # fmt: skip
    heads = q.shape[2], k.shape[2]
    if heads[0] < split.ulysses or (heads[0] != heads[1] and any(n % split.ulysses for n in heads)):
        raise NotImplementedError(f"context parallelism: expected heads for {split.ulysses} processes, and grouped "
                                  f"ones that divide by it, received {heads}; use ring_degree")  # fmt: skip
    lengths, place = split.lengths(tokens), split.rank % split.ulysses
    require(q.shape[1] == lengths[place], "context parallelism",
            f"{lengths[place]} of {len(tokens)} tokens in process {split.rank}", q.shape[1])  # fmt: skip
    counted = _COUNTED.set(sent)
    try:
        if split.ulysses > 1:
            q, k, v = _tokens_for_heads(q, k, v, lengths, place, split.ulysses_group)
        out = work.attend(q, k, v, applied, backend, split.part(tokens))
        return out if split.ulysses == 1 else _heads_for_tokens(out, lengths, heads[0], place, split.ulysses_group)
    finally:
        _COUNTED.reset(counted)


# ---- collectives ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def collective(what: str, sent: int = 0) -> Iterator[None]:
    """A collective in which this process sends some bytes. Errors of torch say only that a connection closed, or that
    time is up."""
    counted = _COUNTED.get()
    if counted is not None:
        counted[what] = counted.get(what, 0) + sent
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"context parallelism: expected every process to take part in the {what}, received {error}; "
                           "another process ended or waits elsewhere, see its own error") from error  # fmt: skip


def _tokens_for_heads(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], place: int,
                      group: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(B, S_local, H, D)`` each to ``(B, S_group, H / U, D)``."""
    batch, local, _, dim = q.shape
    of_each = [shares(x.shape[2], len(lengths)) for x in (q, k, v)]
    widths = [sum(heads) for heads in zip(*of_each, strict=True)]  # of q, k, v together, by process
    sizes = [local * batch * width * dim for width in widths]
    sent = q.new_empty(sum(sizes))
    parts = zip(
        *(x.transpose(0, 1).split(heads, dim=2) for x, heads in zip((q, k, v), of_each, strict=True)), strict=True
    )
    for part, there, width in zip(parts, sent.split(sizes), widths, strict=True):
        torch.cat(part, dim=2, out=there.view(local, batch, width, dim))
    token = batch * widths[place] * dim
    got = sent.new_empty(sum(lengths) * token)
    with collective("all-to-all of q, k, v", (len(sent) - sizes[place]) * sent.itemsize):
        dist.all_to_all_single(got, sent, [n * token for n in lengths], sizes, group)
    found = got.view(-1, batch, widths[place], dim).transpose(0, 1)
    q, k, v = found.split([heads[place] for heads in of_each], dim=2)
    return q, k, v


def _heads_for_tokens(out: Tensor, lengths: list[int], heads: int, place: int, group: Any) -> Tensor:
    """``(B, S_group, H / U, D)`` to ``(B, S_local, H, D)``."""
    (batch, _, own, dim), local, of_each = out.shape, lengths[place], shares(heads, len(lengths))
    sent, token = out.transpose(0, 1).flatten(), batch * own * dim
    sizes = [local * batch * n * dim for n in of_each]
    got = sent.new_empty(sum(sizes))
    with collective("all-to-all of the output", (len(sent) - local * token) * sent.itemsize):
        dist.all_to_all_single(got, sent, sizes, [n * token for n in lengths], group)
    parts = zip(got.split(sizes), of_each, strict=True)
    return torch.cat([x.view(local, batch, n, dim).transpose(0, 1) for x, n in parts], dim=2)


def _collected(x: Tensor, lengths: Sequence[int], what: str, group: Any) -> Tensor:
    """``x (n, ...)`` of all processes of a group, one after the other, in one piece of memory."""
    found = x.new_empty(sum(lengths), *x.shape[1:])
    with collective(f"all-gather of {what}", x.nbytes * (len(lengths) - 1)):
        if len(set(lengths)) == 1:
            dist.all_gather_into_tensor(found, x, group)
            return found
        parts = found.split(list(lengths))  # broadcasts, since not every backend gathers parts of different lengths
        parts[dist.get_rank(group)].copy_(x)
        sources = [dist.get_global_rank(group, n) for n in range(len(parts))]
        for waiting in [dist.broadcast(y, n, group, async_op=True) for y, n in zip(parts, sources, strict=True)]:
            waiting.wait()
    return found


def _summed(x: Tensor, group: Any) -> Tensor:
    size = dist.get_world_size(group)
    with collective("all-reduce of norms", 2 * x.nbytes * (size - 1) // size):
        dist.all_reduce(x, group=group)
    return x
