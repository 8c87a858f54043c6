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
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fastrope as fr
from fastrope.checks import require

from ..image.guided import GuidedWork
from ..image.work import Work


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
    def size(self) -> int:
        """Number of processes."""
        return self.ring * self.ulysses

    @property
    def place(self) -> tuple[int, int, int]:
        """The degrees, and the rank."""
        return self.ring, self.ulysses, self.rank


class Held(NamedTuple):
    """Which tokens of a sequence are where; indices ``(n,)`` int64 on the CPU.

    Args:
        shards: of every process, in order: its part of the text, then its part of the image.
        queries: those of this process during attention: of all processes that exchange heads with it.
        keys: all tokens, in the order in which their keys arrive.
    """

    shards: tuple[Tensor, ...]
    queries: Tensor
    keys: Tensor


@lru_cache(maxsize=64)
def held(place: tuple[int, int, int], tokens: fr.TokenLayout) -> Held:
    """Of the process at a :attr:`Split.place`."""
    ring, ulysses, rank = place
    spans = torch.arange(len(tokens), device="cpu").split([tokens.text_tokens, len(tokens) - tokens.text_tokens])
    parts = [span.tensor_split(ring * ulysses) for span in spans]
    shards = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    first = rank // ulysses * ulysses
    return Held(shards, torch.cat(shards[first : first + ulysses]), torch.cat(shards))


def communication(
    split: Split, tokens: fr.TokenLayout, batch: int, heads: int, dim: int, itemsize: int
) -> dict[str, int]:
    """Bytes that this process sends to others for one modulated layer, by collective. An all-gather counts what each of
    the others receives from it.

    Args:
        batch, heads, dim: of the model's queries, keys and values, before anything is exchanged.
        itemsize: bytes per number.
    """
    found = held(split.place, tokens)
    mine, group = len(found.shards[split.rank]), len(found.queries)
    longest = max(len(held((split.ring, split.ulysses, n * split.ulysses), tokens).queries) for n in range(split.ring))
    token = batch * dim * itemsize
    inner = heads // split.ulysses
    return {
        "all-to-all of q, k, v": 3 * mine * inner * (split.ulysses - 1) * token,
        "all-gather of k, v": 2 * longest * inner * (split.ring - 1) * token,
        "all-to-all of the output": (group - mine) * inner * token,
    }


def attend(work: Any, split: Split, tokens: fr.TokenLayout, q: Tensor, k: Tensor, v: Tensor, applied: bool,
           backend: str) -> Tensor:  # fmt: skip
    """Modulated attention of the part of a sequence that this process holds.

    Args:
        work: of the whole sequence.
        q, k, v: ``(B, S_local, H, D)``.

    Returns:
        ``(B, S_local, H, D)``.

    Raises:
        NotImplementedError: heads that do not divide, tensors that require grad, or a shared reference or negative
            prompt under ring.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError("context parallelism: expected torch.no_grad() in a modulated layer, received "
                                  "tensors that require grad")  # fmt: skip
    if q.shape[2] % split.ulysses:
        raise NotImplementedError(f"context parallelism: expected heads that divide by {split.ulysses} processes, "
                                  f"received {q.shape[2]}")  # fmt: skip
    found = held(split.place, tokens)
    local = len(found.shards[split.rank])
    require(q.shape[1] == local, "context parallelism", f"{local} of {len(tokens)} tokens in process {split.rank}",
            q.shape[1])  # fmt: skip
    of_ranks = [len(shard) for shard in found.shards]
    by_group = [of_ranks[n : n + split.ulysses] for n in range(0, split.size, split.ulysses)]
    lengths = by_group[split.rank // split.ulysses]
    if split.ulysses > 1:
        q, k, v = _tokens_for_heads(q, k, v, lengths, split.ulysses_group)
    if split.ring > 1:
        k, v = _gathered(k, v, list(map(sum, by_group)), split.ring_group)
    if type(work) is Work:
        out = work.subset(split.place, found.queries, found.keys).attend(q, k, v, applied, backend)
    else:
        out = _in_order(work, split, found, q, k, v, applied, backend)
    if split.ulysses > 1:
        out = _heads_for_tokens(out, lengths, split.rank % split.ulysses, split.ulysses_group)
    return out


def _in_order(work: Any, split: Split, found: Held, q: Tensor, k: Tensor, v: Tensor, applied: bool,
              backend: str) -> Tensor:  # fmt: skip
    """Work that knows spans of the sequence gets it in its own order."""
    if split.ring > 1:
        raise NotImplementedError("context parallelism: expected ring_degree 1 beside a shared reference or NAG, "
                                  f"received {split.ring}; use ulysses_degree")  # fmt: skip
    keys = found.keys.to(q.device)
    back = torch.argsort(keys)
    q, k, v = q[:, back], k[:, back], v[:, back]
    if isinstance(work, GuidedWork):
        out = work.attend(q, k, v, applied, backend, lambda x: _summed(x, split.ulysses_group))
    else:
        out = work.attend(q, k, v, applied, backend)
    return out[:, keys]


def _summed(x: Tensor, group: Any) -> Tensor:
    """Over all processes of a group."""
    dist.all_reduce(x, group=group)
    return x


def _tokens_for_heads(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``3 x (B, S_local, H, D)`` to ``3 x (B, S_group, H / U, D)``."""
    degree, (batch, local, heads, dim) = len(lengths), q.shape
    parts = torch.stack([x.unflatten(2, (degree, -1)) for x in (q, k, v)])  # (3, B, S_local, U, H / U, D)
    sent = parts.permute(3, 2, 0, 1, 4, 5).reshape(degree * local, -1)
    got = sent.new_empty(sum(lengths), sent.shape[1])
    dist.all_to_all_single(got, sent, lengths, [local] * degree, group)
    got = got.view(-1, 3, batch, heads // degree, dim)
    q, k, v = got.permute(1, 2, 0, 3, 4)
    return q, k, v


def _heads_for_tokens(out: Tensor, lengths: list[int], rank: int, group: Any) -> Tensor:
    """``(B, S_group, H / U, D)`` to ``(B, S_local, H, D)``."""
    degree, (batch, total, heads, dim) = len(lengths), out.shape
    sent = out.transpose(0, 1).reshape(total, -1)
    local = lengths[rank]
    got = sent.new_empty(degree * local, sent.shape[1])
    dist.all_to_all_single(got, sent, [local] * degree, lengths, group)
    return got.view(degree, local, batch, heads, dim).permute(2, 1, 0, 3, 4).reshape(batch, local, degree * heads, dim)


def _gathered(k: Tensor, v: Tensor, lengths: list[int], group: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of all processes of the ring, one after the other."""
    mine = torch.stack([k, v]).transpose(0, 2).contiguous()  # (S, B, 2, H, D)
    got = [mine.new_empty(n, *mine.shape[1:]) for n in lengths]
    if len(set(lengths)) == 1:
        dist.all_gather(got, mine, group)
    else:  # of one length, since not every backend of torch.distributed knows others
        longest = max(lengths)
        padded = torch.cat([mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])])
        wide = [mine.new_empty(longest, *mine.shape[1:]) for _ in lengths]
        dist.all_gather(wide, padded, group)
        got = [x[:n] for x, n in zip(wide, lengths, strict=True)]
    k, v = torch.cat(got).transpose(0, 2)
    return k, v


_TOLD = "_fastrope_told"


class Disagreement(ValueError):
    """Processes that do not do the same."""


@contextlib.contextmanager
def agreeing(config: Any) -> Iterator[None]:
    """What ends with :func:`require_alike`. An error before it, in this process alone, is told to the others, which
    would wait for this one.

    Args:
        config: diffusers' configuration; None where nothing is split.
    """
    try:
        yield
    except Exception as error:
        # One call may hold another one, a reference's: the inner one has told.
        if config is not None and not isinstance(error, Disagreement) and not hasattr(error, _TOLD):
            setattr(error, _TOLD, True)
            _of_everyone(config, [1.0, 0.0, 0.0])
        raise


def require_alike(config: Any, digest: int, call: Mapping[str, Any]) -> None:
    """Every process must do the same to the same call: another method, step, prompt or noise would give a picture of
    both.

    Args:
        digest: of what all layers are to do.
        call: the transformer's arguments, of the whole sequence.

    Raises:
        ValueError: in every process, where one differs.
    """
    halves = float(digest >> 32 & 0xFFFFFFFF), float(digest & 0xFFFFFFFF)
    found = _of_everyone(config, [0.0, *halves], [x for x in call.values() if isinstance(x, Tensor)])
    broken = found[:, 0].nonzero().flatten().tolist()
    methods, inputs = (bool((part == part[:1]).all()) for part in (found[:, 1:3], found[:, 3:]))
    for fits, expected, received in (
        (not broken, "a call that every process can make", f"an error in process {broken}, which says what it is"),
        (methods, "the same methods, step and sequence in every process", "different ones"),
        (inputs, "the same latents, prompt and timestep in every process (one seed for all)", "different ones"),
    ):
        if not fits:
            raise Disagreement(f"context parallelism: expected {expected}, received {received}")


def _of_everyone(config: Any, mine: list[float], tensors: Sequence[Tensor] = ()) -> Tensor:
    """``(processes, numbers + 1)`` float64 on the CPU: some numbers of every process, and the sum of its tensors."""
    mesh = config._flattened_mesh
    device = config._device if config._device.type == mesh.device_type else torch.device(mesh.device_type)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for x in tensors:
        total += x.double().sum().to(device)
    sent = torch.cat([torch.tensor(mine, dtype=torch.float64, device="cpu").to(device), torch.nan_to_num(total)[None]])
    everyone = [torch.empty_like(sent) for _ in range(dist.get_world_size(mesh.get_group()))]
    try:
        dist.all_gather(everyone, sent, mesh.get_group())
    except Exception as error:  # nobody is left to tell
        setattr(error, _TOLD, True)
        raise
    return torch.stack(everyone).cpu()


def digest_of(value: Any) -> int:
    """64 bits of a value that prints the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big")
