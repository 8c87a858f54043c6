"""One process of four: hosts under diffusers' context parallelism on gloo, against the same model in one process.

Run as ``parallel_worker.py RANK STORE OUT``; writes what it found as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from unittest import mock

import diffusers
import torch
import torch.distributed as dist
from diffusers_hosts import TINY_HOSTS, grag_like, loose_like, run
from untwisting_calls import DIALS, STEP, STEPS, call_of, source_of

import fastrope as fr
from fastrope.bindings.diffusers import parallel

WORLD = 4
ALL_GATHER = dist.all_gather
EVEN = {"kontext": fr.TokenLayout(8, (4, 3), [(2, 4)]), "flux2": fr.TokenLayout(4, (4, 4), [(2, 2), (2, 4)]),
        "qwen-edit-plus": fr.TokenLayout(8, (4, 4), [(2, 2), (2, 4)])}  # fmt: skip
CASES = {
    "ulysses": dict(ulysses_degree=2), "ring": dict(ring_degree=2), "both": dict(ring_degree=2, ulysses_degree=2),
    "ulysses, odd": dict(ulysses_degree=2, ulysses_anything=True),
    "ring, odd": dict(ring_degree=2, ring_anything=True),
}  # fmt: skip


def mesh_of(ring_degree: int = 1, ulysses_degree: int = 1, **_):
    """Of this process and those that share its sequence; where these are two, the other two do the same."""
    copies = WORLD // (ring_degree * ulysses_degree)
    names = ("copy", "ring", "ulysses")
    return dist.init_device_mesh("cpu", (copies, ring_degree, ulysses_degree), mesh_dim_names=names)["ring", "ulysses"]


def enable(model, **degrees) -> None:
    config = diffusers.ContextParallelConfig(**degrees, mesh=mesh_of(**degrees))
    with mock.patch("torch.accelerator.device_count", return_value=1):  # diffusers divides by it, and CPUs have none
        model.enable_parallelism(config=config)


class Sent:
    """Counts the bytes that this process hands to others."""

    def __init__(self):
        self.bytes = 0
        self._all_to_all, self._all_gather = dist.all_to_all_single, dist.all_gather

    def __enter__(self):
        def all_to_all(out, x, outs, ins, group):
            mine = dist.get_rank(group)
            self.bytes += (sum(ins) - ins[mine]) * x[0].numel() * x.element_size()
            return self._all_to_all(out, x, outs, ins, group)

        def all_gather(outs, x, group):
            self.bytes += (len(outs) - 1) * x.nbytes
            return self._all_gather(outs, x, group)

        self._patches = [mock.patch.object(parallel.dist, "all_to_all_single", all_to_all),
                         mock.patch.object(parallel.dist, "all_gather", all_gather)]  # fmt: skip
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self._patches:
            patch.stop()


def unshard(x: torch.Tensor, dim: int, mesh) -> torch.Tensor:
    """What diffusers' own gathers parts of different lengths for; gloo takes parts of one length."""
    group = mesh.get_group()
    lengths = [None] * dist.get_world_size(group)
    dist.all_gather_object(lengths, x.shape[dim], group)
    padded = torch.cat([x, x.new_zeros([max(lengths) - n if d == dim else n for d, n in enumerate(x.shape)])], dim)
    parts = [torch.empty_like(padded) for _ in lengths]
    ALL_GATHER(parts, padded, group)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, lengths, strict=True)], dim)


def gap(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out - expected).abs().max() / expected.abs().max())


def hosts(found: dict) -> None:
    for name in EVEN:
        for case, degrees in CASES.items():
            torch.manual_seed(0)
            host = TINY_HOSTS[name]
            layout = host.layout if "odd" in case else EVEN[name]
            model, call = host.build(), host.call(layout, dtype=torch.float32)
            if name.startswith("qwen"):
                mask = torch.ones(2, layout.text_tokens, dtype=torch.bool)
                mask[1, 3:] = False
                call["encoder_hidden_states_mask"] = mask
            mods = grag_like(layout) + loose_like(layout)
            late = name == "flux2"  # parallel before, or after it is bound
            with fr.apply(model, mods):
                expected = run(model, call)
            if not late:
                enable(model, **degrees)
            with fr.apply(model, mods) as handle:
                if late:
                    enable(model, **degrees)
                with Sent() as sent:
                    out = run(model, call)
                again = torch.equal(run(model, call), out)
                formula = [
                    parallel.communication(parallel.Split.of(model._parallel_config.context_parallel_config), layout,
                                           len(out), model.config.num_attention_heads, 16, 4)
                ]  # fmt: skip
                layers = len(handle._state.layers)
            checks = (len(dist.get_process_group_ranks(model._parallel_config.context_parallel_config._flattened_mesh
                                                       .get_group())) - 1) * 32  # fmt: skip
            expected_bytes = layers * sum(formula[0].values()) + checks
            found[f"{name}, {case}"] = dict(
                gap=gap(out, expected), again=again, sent=sent.bytes, formula=expected_bytes
            )


def others(found: dict) -> None:
    """What works on spans of the sequence: a shared reference, in the batch or from a cache, and NAG. The cache was
    filled by one process; with some of the heads, the keys are others."""
    host = TINY_HOSTS["flux"]
    for carried in ("batched", "kept"):
        torch.manual_seed(0)
        model = host.build()
        call = {n: x.float() for n, x in call_of(host, 4, 2, (2, 4)).items()}
        source = source_of(host, {n: x.float() for n, x in call_of(host, 4, 1, (2, 4)).items()})
        method = fr.UntwistingRoPE(**DIALS)
        reference = source if carried == "batched" else fr.ReferenceCache(source)
        with fr.apply(model, method, reference=reference) as handle:
            handle.set_step(STEP, STEPS)
            expected = run(model, call)
        enable(model, ulysses_degree=2)
        with fr.apply(model, method, reference=reference) as handle:
            handle.set_step(STEP, STEPS)
            found[f"shared reference, {carried}"] = dict(gap=gap(run(model, call), expected))
    torch.manual_seed(0)
    model = host.build()
    layout = fr.TokenLayout(8, (2, 4))
    call = host.call(layout, dtype=torch.float32)
    with fr.apply(model, fr.NAG(scale=3.0)):
        expected = run(model, call)
    enable(model, ulysses_degree=2)
    with fr.apply(model, fr.NAG(scale=3.0)):
        found["NAG"] = dict(gap=gap(run(model, call), expected))


def layers(found: dict) -> None:
    """Layers that are compiled, one of them without a modulation, and one whose work folds into plain attention."""
    torch.manual_seed(0)
    host, layout, asked = TINY_HOSTS["kontext"], EVEN["kontext"], []
    model, call = host.build(), host.call(layout, dtype=torch.float32)
    method = fr.At(grag_like(layout), layers=[1])

    def plain(query, key, value, scale=None, **_):
        asked.append(query.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), scale=scale
        ).transpose(1, 2)

    with fr.apply(model, method):
        expected = run(model, call)
    enable(model, ulysses_degree=2)
    with fr.apply(model, method, plain=plain):
        found["a plain attention"] = dict(gap=gap(run(model, call), expected), heads=asked)
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    with fr.apply(model, method):
        found["compiled"] = dict(gap=gap(run(model, call), expected))


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
    enable(model, ulysses_degree=2)

    def error(methods, call=call) -> str:
        with fr.apply(model, methods):
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
    with fr.apply(model, grag_like(layout)) as handle:
        found["after"] = dict(gap=gap(run(model, call), expected))
        handle.inspect(layers=[0])
        try:
            run(model, call)
        except NotImplementedError as problem:
            found["inspect"] = str(problem)


def lost(rank: int) -> str:
    """What a call says when another process of the group is gone."""
    host, layout = TINY_HOSTS["kontext"], EVEN["kontext"]
    model, call = host.build(), host.call(layout, dtype=torch.float32)
    enable(model, **CASES["both"])
    if rank == WORLD - 1:
        return "this one"
    with fr.apply(model, grag_like(layout)):
        try:
            run(model, call)
        except RuntimeError as problem:
            return str(problem)
    return ""


def main() -> None:
    rank, store, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD,
                            timeout=timedelta(seconds=60))  # fmt: skip
    found: dict = {}
    with mock.patch("diffusers.hooks.context_parallel.PartitionAnythingSharder.unshard_anything", unshard):
        for part in (hosts, others, layers, lambda found: mistakes(found, rank)):
            part(found)
    found["a process that died"] = lost(rank)
    out.with_suffix(f".{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
