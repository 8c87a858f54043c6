"""Processes that share a sequence must do the same: what one of them is about to do is compared with the others."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .parallel import collective

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
        with collective("check before a call"):
            dist.all_gather(everyone, sent, mesh.get_group())
    except Exception as error:  # nobody is left to tell
        setattr(error, _TOLD, True)
        raise
    return torch.stack(everyone).cpu()


def digest_of(value: Any) -> int:
    """64 bits of a value that prints the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big")
