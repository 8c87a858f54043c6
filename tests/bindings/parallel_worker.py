"""Hosts under diffusers' context parallelism in four processes on gloo, against the same model in one process.

Run as ``parallel_worker.py STORE OUT``; every process writes what it found as JSON. They are forks, because imports
take longer than what they do.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import peft
import torch
import torch._dynamo
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers_hosts import TINY_HOSTS, grag_like, loose_like, run
from parallel_group import CASES, EVEN, UNSHARDED, WORLD, Sent, enable, gap, sends, split_of
from parallel_mistakes import lost, mistakes, stuck
from tiny_transformers import DIM, HEADS
from untwisting_calls import DIALS, STEP, STEPS, call_of, source_of
from watch import Live

import fastrope as fr
from fastrope.bindings.diffusers import parallel
from fastrope.bindings.image.sequence import JointSequence
from fastrope.bindings.image.work import Work

OWN_PLAN = {
    "": {"hidden_states": ContextParallelInput(1, 3), "encoder_hidden_states": ContextParallelInput(1, 3),
         "img_ids": ContextParallelInput(0, 2), "txt_ids": ContextParallelInput(0, 2)},
    "proj_out": ContextParallelOutput(1, 3),
}  # fmt: skip

# ---- hosts and modulations ------------------------------------------------------------------------------------------


def buckets(layout: fr.TokenLayout) -> list:
    """Two scales that queries share."""
    scale = torch.ones(len(layout))
    scale[layout.target] = 0.5
    scale[layout.target.start + 2 : layout.target.start + 7] = 0.3
    return [fr.QueryScale(scale, keys=layout.reference(0), axes=(1, 2))]


def biases(layout: fr.TokenLayout) -> list:
    """All that adds to logits or weighs values: regions with text, references and a soft edge; strengths of references
    and words."""
    left = torch.tensor([[1.0, 0.4, 0.0]])
    last = len(layout.reference_grids) - 1
    regions = [fr.Region(left, slice(0, 2), [0]), fr.Region(1 - left, slice(2, 4), [last] if last else ())]
    return [fr.Regions(regions, local=True), fr.ReferenceStrength(0.4), fr.PromptWeights({0: 3.0, 3: 0.2}),
            fr.PromptWeights({1: -1.0}, on="values")]  # fmt: skip


METHODS = {
    "groups and scales": lambda layout: grag_like(layout) + loose_like(layout),
    "buckets": buckets,
    "biases": biases,
}


def calls_of(name: str, layout: fr.TokenLayout) -> list[tuple[fr.TokenLayout, dict]]:
    """A call; of Qwen-Image with a text mask, and a second one with a longer text, as guidance has."""
    qwen, calls = name.startswith("qwen"), []
    for more in (0, 4) if qwen else (0,):
        tokens = fr.TokenLayout(layout.text_tokens + more, layout.target_grid, layout.reference_grids)
        call = TINY_HOSTS[name].call(tokens, dtype=torch.float32)
        if name == "flux2":  # as its pipeline passes them; diffusers splits no others
            call |= {ids: call[ids].expand(2, -1, -1) for ids in ("txt_ids", "img_ids")}
        if qwen:
            mask = call["encoder_hidden_states_mask"] = torch.ones(2, tokens.text_tokens, dtype=torch.bool)
            mask[1, 3:] = False
        calls.append((tokens, call))
    return calls


def hosts(found: dict) -> None:
    for name in EVEN:
        expected: dict = {}
        for case in CASES:
            layout = TINY_HOSTS[name].layout if "odd" in case else EVEN[name]
            torch.manual_seed(0)
            model = TINY_HOSTS[name].build()
            calls = calls_of(name, layout)
            asked = [
                (what, methods(tokens), tokens, call) for what, methods in METHODS.items() for tokens, call in calls
            ]
            for what, methods, tokens, call in asked:
                if (what, tokens) not in expected:
                    with fr.apply(model, *methods):
                        expected[what, tokens] = run(model, call)
                    differs = gap(expected[what, tokens], run(model, call))
                    found["least that methods do"] = min(differs, found.get("least that methods do", 1.0))
            late = name == "flux2"  # parallel before, or after it is bound; there the host rotates
            rotation = "host" if late else "op"
            if not late:
                enable(model, case)
            for what, methods, tokens, call in asked:
                with fr.apply(model, *methods, rotation=rotation) as handle:
                    if late:
                        enable(model, case)
                        late = False
                    with Sent() as sent:
                        out = run(model, call)
                    again = what != "buckets" or torch.equal(run(model, call), out)
                    result = dict(what=what, gap=gap(out, expected[what, tokens]), again=again)
                    result |= sends(handle, tokens, len(out), sent)
                found.setdefault(f"{name}, {case}", []).append(result)


# ---- what knows spans of the sequence -------------------------------------------------------------------------------


def shared(found: dict, case: str) -> None:
    """A reference of two pictures, in the batch, or from a cache and then on a grid of its own."""
    host, odd, method = TINY_HOSTS["flux"], "odd" in case, fr.UntwistingRoPE(**DIALS)
    text, grid, other = (5, (3, 3), (3, 5)) if odd else (4, (2, 4), (3, 4))
    torch.manual_seed(0)
    model, expected = host.build(), {}
    call, own, apart = ({n: x.float() for n, x in call_of(host, text, 2, g).items()} for g in (grid, grid, other))
    alone = fr.Reference(
        lambda *_: apart["hidden_states"], source_of(host, apart).arguments | {"img_ids": apart["img_ids"]}
    )
    carried = {"batched": lambda: source_of(host, own), "kept": lambda: fr.ReferenceCache(alone)}
    for how, reference in carried.items():
        with fr.apply(model, method, reference=reference()) as handle:
            handle.set_step(STEP, STEPS)
            expected[how] = run(model, call)
    enable(model, case)
    split, (tokens, theirs) = split_of(model), (fr.TokenLayout(text, g) for g in (grid, other))
    for how, make in carried.items():
        reference = make()
        with fr.apply(model, method, reference=reference, rotation="host" if odd else "op") as handle:
            handle.set_step(STEP, STEPS)
            with Sent() as sent:
                out = run(model, call)
            if how == "batched":
                result = sends(handle, tokens, 4, sent, statistics=2 * (2 + 1))
            else:  # the reference ran alone before
                size = other[0] * other[1]
                ran = sends(handle, theirs, 2, sent, statistics=2)
                result = sends(handle, tokens, 2, sent, ran["formula"], statistics=4, cached=[size] * 2)
                held = split.part(theirs).lengths(size)[split.rank // split.ulysses] * 2 + 2  # tokens, and statistics
                share = len(handle.sent) * 2 * held * HEADS // split.ulysses * DIM * 4
                found[f"cache, {case}"] = dict(cache=reference.nbytes, share=share)
            found[f"shared reference, {how}, {case}"] = result | dict(gap=gap(out, expected[how]))


def spans(found: dict, case: str) -> None:
    """A reference of the sequence whose statistics the target takes; NAG."""
    host, layout = TINY_HOSTS["kontext"], TINY_HOSTS["kontext"].layout if "odd" in case else EVEN["kontext"]
    torch.manual_seed(0)
    model, call, expected = host.build(), host.call(layout, dtype=torch.float32), {}
    methods = {
        "statistics of a reference": ([fr.UntwistingRoPE(**DIALS, reference=0)], dict(statistics=8)),
        "NAG": ([fr.NAG(scale=3.0, negative=2), *grag_like(layout)], dict(guided=True)),
    }
    for what, (each, _) in methods.items():
        with fr.apply(model, *each) as handle:
            handle.set_step(STEP, STEPS)
            expected[what] = run(model, call)
    enable(model, case)
    for what, (each, more) in methods.items():
        with fr.apply(model, *each, rotation="host" if "odd" in case else "op") as handle, Sent() as sent:
            handle.set_step(STEP, STEPS)
            out = run(model, call)
            result = sends(handle, layout, 2, sent, **more)
        found[f"{what}, {case}"] = result | dict(gap=gap(out, expected[what]))


def positions(found: dict, case: str) -> None:
    """Rescaled ones, of the first layer's tokens and of the tables that diffusers splits for the others. On a CPU,
    diffusers has no attention of a ring for these. And a host with a plan of one's own."""
    for name in ("kontext", "qwen", "ovis"):
        host = TINY_HOSTS[name]
        grids = [(2, 4)] if host.layout.reference_grids else []
        layout = host.layout if "odd" in case else fr.TokenLayout(8, (4, 3), grids)
        torch.manual_seed(0)
        model, call = host.build(), host.call(layout, dtype=torch.float32)
        somewhere = fr.At(grag_like(layout), layers=None if "ring_degree" in CASES[case] else [0])
        methods = fr.HighResolution("yarn", trained=(2, 3)), somewhere
        with fr.apply(model, *methods) as handle:
            handle.set_step(STEP, STEPS)
            expected = run(model, call)
        enable(model, case, OWN_PLAN if name == "ovis" else None)
        with fr.apply(model, *methods) as handle:
            handle.set_step(STEP, STEPS)
            found[f"positions, {name}, {case}"] = dict(gap=gap(run(model, call), expected))


def others(found: dict) -> None:
    for case in CASES:
        shared(found, case)
        spans(found, case)
        positions(found, case)


# ---- layers ---------------------------------------------------------------------------------------------------------


def layers(found: dict) -> None:
    """Layers that are compiled, one of them without a modulation, and one whose work folds into plain attention; with a
    LoRA. A removed handle leaves the parallel model as it was."""
    torch.manual_seed(0)
    host, layout, asked = TINY_HOSTS["kontext"], EVEN["kontext"], []
    model, call = host.build(layers=(1, 1)), host.call(layout, dtype=torch.float32)
    method = fr.At(grag_like(layout), layers=[1])
    bare = run(model, call)
    with_lora(model)

    def plain(query, key, value, scale=None, **_):
        asked.append(query.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), scale=scale
        ).transpose(1, 2)

    with fr.apply(model, method):
        expected = run(model, call)
    found["a LoRA counts"] = gap(expected, bare)
    handle = fr.apply(model, method, plain=plain)
    enable(model, "ulysses")
    found["a plain attention"] = dict(gap=gap(run(model, call), expected), heads=asked)
    handle.remove()
    stock, processors = run(model, call), list(model.attn_processors.values())
    configured = [processor._parallel_config is model._parallel_config for processor in processors]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    handle = fr.apply(model, method)
    found["compiled"] = dict(gap=gap(run(model, call), expected))
    handle.remove()
    same = all(a is b for a, b in zip(model.attn_processors.values(), processors, strict=True))
    found["removed"] = dict(configured=all(configured), same=same, equal=torch.equal(run(model, call), stock))


def with_lora(model) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    model.add_adapter(config)


def grouped(found: dict) -> None:
    """Fewer heads of keys and values than of queries; heads that do not divide by the processes."""
    layout, found["heads"] = fr.TokenLayout(3, (2, 3), [(1, 2)]), []
    for case in CASES:
        torch.manual_seed(0)
        model = TINY_HOSTS["kontext"].build()
        enable(model, case)
        split = split_of(model)
        rope = fr.RoPE.axial(layout.positions("flux"), (4, 4, 8))
        sequence = JointSequence(layout.positions("flux"), lambda: layout)
        work = Work(sequence, rope, tuple(grag_like(layout)))
        mine = parallel.shards_of(split.ring * split.ulysses, layout)[split.rank]
        for heads, kv_heads in ((4, 2), (3, 3)):
            q, k, v = (torch.randn(2, len(layout), n, DIM) for n in (heads, kv_heads, kv_heads))
            here, sent = [x[:, mine] for x in (q, k, v)], {}
            out = parallel.attend(work, split, layout, sent, *here, False, "auto")
            planned = parallel.communication(split, layout, 2, heads, DIM, 4, kv_heads=kv_heads)
            told = sent == {what: n for what, n in planned.items() if n}
            found["heads"].append(dict(gap=gap(out, work.attend(q, k, v, False)[:, mine]), told=told))
        if split.ulysses > 1:
            try:
                parallel.attend(work, split, layout, {}, here[0], *(x[:, :, :1] for x in here[1:]), False, "auto")
            except NotImplementedError as problem:
                found["heads that do not divide"] = str(problem)


def memory(found: dict) -> None:
    """The most bytes that tensors of a call take at one time, beside weights and plans."""
    host, layout = TINY_HOSTS["kontext"], fr.TokenLayout(16, (16, 16), [(8, 16)])
    torch.manual_seed(0)
    call = host.call(layout, batch=1, dtype=torch.float32)
    for case in ("alone", "ulysses", "ring", "both"):
        model = host.build()
        if case != "alone":
            enable(model, case)
        with fr.apply(model, grag_like(layout)):
            run(model, call)
            peaks = []
            for _ in range(3):  # gloo's thread may let go of a buffer a moment after the exchange
                with Live() as live:
                    run(model, call)
                peaks.append(live.peak)
        found[f"memory, {case}"] = min(peaks)
    found["memory, all tokens"] = len(layout) * HEADS * DIM * 4


def work(rank: int, store: str, out: Path) -> None:
    """What one process does."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD,
                            timeout=timedelta(seconds=60))  # fmt: skip
    found: dict = {}

    def write(last: str) -> None:
        found["a process that died"] = last
        out.with_suffix(f".{rank}.json").write_text(json.dumps(found))

    def end() -> None:
        write("this one")
        os._exit(0)

    with UNSHARDED:
        for part in (hosts, others, layers, grouped, memory, lambda found: mistakes(found, rank)):
            part(found)
    found["an error within a layer"] = stuck(rank)
    write(lost(rank, end))


def main() -> None:
    torch.set_num_threads(1)  # before the forks: threads of a pool would be missing in them
    warnings.simplefilter("ignore")
    processes = []
    for rank in range(WORLD):
        processes.append(os.fork())
        if not processes[-1]:
            try:
                work(rank, sys.argv[1], Path(sys.argv[2]))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    for process in processes:
        os.waitpid(process, 0)


if __name__ == "__main__":
    main()
