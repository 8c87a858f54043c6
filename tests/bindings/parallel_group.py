"""A group of processes on gloo: diffusers' context parallelism in it, and what a process sends."""

from __future__ import annotations

from unittest import mock

import diffusers
import torch
import torch.distributed as dist
from tiny_transformers import DIM, HEADS

import fastrope as fr
from fastrope.bindings.diffusers import parallel

WORLD = 4
ALL_GATHER = dist.all_gather
CASES = {
    "ulysses": dict(ulysses_degree=2), "ring": dict(ring_degree=2), "both": dict(ring_degree=2, ulysses_degree=2),
    "ulysses, odd": dict(ulysses_degree=2, ulysses_anything=True),
    "ring, odd": dict(ring_degree=2, ring_anything=True),
}  # fmt: skip
EVEN = {"kontext": fr.TokenLayout(8, (4, 3), [(2, 4)]), "flux2": fr.TokenLayout(4, (4, 4), [(2, 2), (2, 4)]),
        "qwen-edit-plus": fr.TokenLayout(8, (4, 4), [(2, 2), (2, 4)])}  # fmt: skip


def mesh_of(ring_degree: int = 1, ulysses_degree: int = 1, **_):
    """Of this process and those that share its sequence; where these are two, the other two do the same."""
    copies = WORLD // (ring_degree * ulysses_degree)
    names = ("copy", "ring", "ulysses")
    return dist.init_device_mesh("cpu", (copies, ring_degree, ulysses_degree), mesh_dim_names=names)["ring", "ulysses"]


def enable(model, case: str, plan: dict | None = None) -> None:
    """Split the model's sequence as a case says, by the model's own plan or another one."""
    config = diffusers.ContextParallelConfig(**CASES[case], mesh=mesh_of(**CASES[case]))
    with mock.patch("torch.accelerator.device_count", return_value=1):  # diffusers divides by it, and CPUs have none
        model.enable_parallelism(config=config, cp_plan=plan)


def split_of(model) -> parallel.Split:
    """How this process takes part."""
    return parallel.Split.of(parallel.context_parallel(model))


def gap(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Between two outputs, as a share of the largest value."""
    return float((out - expected).abs().max() / expected.abs().max())


def sends(handle, layout: fr.TokenLayout, batch: int, sent: Sent, before: int = 0, **more) -> dict:
    """What this process sent in a call whose layers are all modulated, and what the formula and the handle say.

    Args:
        before: bytes of another call, which ran first.
    """
    model = handle._state.model
    split = split_of(model)
    each = {what: n for what, n in parallel.communication(split, layout, batch, HEADS, DIM, 4, **more).items() if n}
    checks = 32 * (split.ring * split.ulysses - 1)
    told = all(layer == each for layer in handle.sent)
    return dict(sent=sent.bytes - before, formula=len(handle.sent) * sum(each.values()) + checks, told=told)


class Sent:
    """Counts the bytes that this process hands to others."""

    def __enter__(self):
        self.bytes, rank, size = 0, dist.get_rank, dist.get_world_size
        counts = {
            "all_to_all_single": lambda out, x, outs, ins, group: (sum(ins) - ins[rank(group)]) * x.itemsize,
            "all_gather": lambda outs, x, group: (len(outs) - 1) * x.nbytes,
            "all_gather_into_tensor": lambda out, x, group: out.nbytes - x.nbytes,
            "broadcast": lambda x, source, group, async_op: (source == rank()) * (size(group) - 1) * x.nbytes,
            "all_reduce": lambda x, group: 2 * x.nbytes * (size(group) - 1) // size(group),
        }  # fmt: skip
        self._patches = [mock.patch.object(dist, name, self._counting(name, count)) for name, count in counts.items()]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self._patches:
            patch.stop()

    def _counting(self, name, count):
        collective = getattr(dist, name)

        def call(*args, **kwargs):
            self.bytes += count(*args, **kwargs)
            return collective(*args, **kwargs)

        return call


def unshard(x: torch.Tensor, dim: int, mesh) -> torch.Tensor:
    """What diffusers' own gathers parts of different lengths for; gloo takes parts of one length."""
    group = mesh.get_group()
    lengths = [None] * dist.get_world_size(group)
    dist.all_gather_object(lengths, x.shape[dim], group)
    padded = torch.cat([x, x.new_zeros([max(lengths) - n if d == dim else n for d, n in enumerate(x.shape)])], dim)
    parts = [torch.empty_like(padded) for _ in lengths]
    ALL_GATHER(parts, padded, group)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, lengths, strict=True)], dim)


UNSHARDED = mock.patch("diffusers.hooks.context_parallel.PartitionAnythingSharder.unshard_anything", unshard)
