"""What goes wrong in a group of processes: those that do not do the same, and one that ends."""

from __future__ import annotations

from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from diffusers_hosts import TINY_HOSTS, grag_like, run
from parallel_group import EVEN, enable, gap, split_of

import fastrope as fr


class Fails:
    """A method that cannot say what it asks for, in some processes."""

    def __init__(self, here: int):
        self.here = here

    def modulations(self, site):
        if self.here:
            raise ValueError("context parallelism: expected this one")
        return []


def mistakes(found: dict, rank: int) -> None:
    """Processes that do not do the same, and what is refused: an error in each, and the next call goes on."""
    torch.manual_seed(0)
    host, layout = TINY_HOSTS["kontext"], EVEN["kontext"]
    model, call = host.build(), host.call(layout, dtype=torch.float32)
    with fr.apply(model, grag_like(layout)):
        expected = run(model, call)
    enable(model, "ulysses")

    def error(methods, call=call, before=lambda: None) -> str:
        with fr.apply(model, methods):
            before()
            try:
                run(model, call)
            except (ValueError, NotImplementedError) as problem:
                return str(problem)
        return ""

    found["other methods"] = error(grag_like(layout, delta=0.6 if rank % 2 else 0.7))
    found["no method in one"] = error(grag_like(layout) if rank % 2 else [])
    other = call | {"hidden_states": call["hidden_states"] + rank % 2}
    found["other noise"] = error(grag_like(layout), other)
    other = call | {"encoder_hidden_states": call["encoder_hidden_states"] + rank % 2}
    found["other prompt"] = error(grag_like(layout), other)
    found["an error in some"] = error(Fails(rank % 2))
    attn = model.transformer_blocks[0].attn
    own = attn.processor
    found["another processor in some"] = error(
        grag_like(layout), before=lambda: setattr(attn, "processor", own) if rank % 2 else None
    )
    odd = fr.TokenLayout(8, (3, 5), [(2, 4)])
    found["an odd length"] = error(grag_like(odd), host.call(odd, dtype=torch.float32))
    with fr.apply(model, grag_like(layout)) as handle:
        found["after"] = dict(gap=gap(run(model, call), expected))
        handle.inspect(layers=[0])
        try:
            run(model, call)
        except NotImplementedError as problem:
            found["inspect"] = str(problem)


def stuck(rank: int) -> str:
    """What a call says when every second process raises an error within a layer: that error, or that time is up."""
    host, layout = TINY_HOSTS["kontext"], EVEN["kontext"]
    model, call = host.build(), host.call(layout, dtype=torch.float32)
    enable(model, "ring")
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), split_of(model).ring_group)

    def plain(query, key, value, scale=None, **_):
        if rank % 2:
            raise ValueError("an error of this process")
        return torch.zeros_like(query)

    with fr.apply(model, grag_like(layout), plain=plain):
        try:
            run(model, call)
        except (RuntimeError, ValueError) as problem:
            return str(problem)
    return ""


def lost(rank: int, end) -> str:
    """What a call says when another process of the group ends inside a collective of the third layer."""
    host, layout = TINY_HOSTS["kontext"], EVEN["kontext"]
    model, call = host.build(), host.call(layout, dtype=torch.float32)
    enable(model, "both")
    exchanges, exchange = [], dist.all_to_all_single

    def dying(*args):
        exchanges.append(args)
        if len(exchanges) == 5:
            end()
        return exchange(*args)

    with (
        fr.apply(model, grag_like(layout)),
        mock.patch.object(dist, "all_to_all_single", dying if rank == 3 else exchange),
    ):
        try:
            run(model, call)
        except RuntimeError as problem:
            return str(problem)
    return ""
