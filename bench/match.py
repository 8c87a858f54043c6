"""The suite of anchor token matching, per token: the fused kernel against the reference.

A contestant whose tokens differ from the reference's is not timed. The vocabularies and codebooks have the sizes of the
hosts; logits are random, with all but the top k masked. Both contestants also run as CUDA graphs, which take the host's
launches out of the comparison. Where the model itself is at hand (LlamaGen XL in bfloat16, random weights), its decode
step is timed beside them, and ``share`` is matching's part of step and matching.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from fastrope import ISLock
from fastrope.bindings.anchors import guide
from fastrope.bindings.llamagen import LlamaGen, LlamaGenConfig
from fastrope.bindings.llamagen.generate import warp
from fastrope.bindings.llamagen.model import Cache
from fastrope.islock import Match

from . import timing
from .frame import Selection, Session, Task

SUITE, ROUNDS = "match", 50
T = TypeVar("T")
NUM_TOKENS = 1024


@dataclass(frozen=True)
class MatchCase:
    """One host's matching problem: vocabulary, image tokens, codebook channels, sampling; its model, where at hand."""

    name: str
    batch: int
    vocab: int
    image: int
    dim: int
    top_k: int | None
    lock: ISLock
    model: LlamaGenConfig | None = None
    small: bool = False

    @property
    def label(self) -> str:
        """The case of its rows."""
        return f"islock {self.lock.metric} K={self.lock.candidates}"


STEP, GRAPH = "decode step", ", graph"
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}  # of the step
XL = LlamaGenConfig.published("XL")
LLAMAGEN, LUMINA = ISLock(), ISLock(candidates=100, tau=0.4, metric="cosine")
HOSTS = (
    MatchCase("llamagen", 1, 16384, 16384, 8, 1000, LLAMAGEN, XL),
    MatchCase("llamagen-b8", 8, 16384, 16384, 8, 1000, LLAMAGEN, XL),
    MatchCase("llamagen-no-top-k", 1, 16384, 16384, 8, None, LLAMAGEN, XL),
    MatchCase("lumina-mgpt", 1, 65536, 8192, 4096, 2000, LUMINA),
    MatchCase("emu3", 1, 184622, 32768, 4, 2048, LLAMAGEN),
)
TINY = LlamaGenConfig(dim=32, layers=1, heads=2, grid=4, vocabulary=1000, prefix=3, caption_dim=4, hidden=32)
SMALL = (MatchCase("smoke", 2, 1000, 800, 8, 100, ISLock(candidates=20), TINY, small=True),)
WORKLOADS = {case.name: case for case in HOSTS + SMALL}
CASES = tuple(dict.fromkeys(case.label for case in WORKLOADS.values()))


def tasks(selection: Selection) -> list[Task]:
    """One for each host."""
    return [
        Task(SUITE, case.name, case.label, partial(measure, case=case))
        for case in selection.of(WORKLOADS)
        if selection.cases_of([case.label])
    ]


def problem(case: MatchCase, device: torch.device) -> dict[str, Callable[[], object]]:
    """Contestants by name: :func:`matchers`; on a GPU each also as a graph."""
    return with_graphs(matchers(case, device), device)


def matchers(case: MatchCase, device: torch.device) -> dict[str, Callable[[], Match]]:
    """The reference and the kernel by name; each matches at position 0."""
    g = torch.Generator(device).manual_seed(0)
    codebook = torch.randn(case.image, case.dim, generator=g, device=device)
    codebook = codebook / codebook.norm(dim=1, keepdim=True)
    if case.lock.metric == "cosine":  # token embeddings, kept as the model has them
        codebook = codebook.to(torch.bfloat16 if device.type == "cuda" else torch.float16)
    logits = 4 * torch.randn(case.batch, case.vocab, generator=g, device=device)
    ids = torch.arange(case.vocab - case.image, case.vocab, device=device)
    logits[:, : case.vocab - case.image] = -torch.inf
    if case.top_k is not None:
        logits.masked_fill_(logits < logits.topk(case.top_k).values[:, -1:], -torch.inf)
    anchors = ids[torch.randint(case.image, (case.batch,), generator=g, device=device)]
    runs = {}
    for name in ("eager", "triton"):
        matcher = case.lock.matcher(codebook, num_tokens=NUM_TOKENS, token_ids=ids, backend=name)
        seeds = matcher.seeds(case.batch, torch.Generator(device).manual_seed(1))
        runs[name] = lambda matcher=matcher, seeds=seeds: matcher(logits, anchors, 0, seeds=seeds)
    return runs


def decode_step(case: MatchCase, device: torch.device) -> Callable[[], object]:
    """A step of the case's model in the middle of an image: both halves of guidance, then guidance and top-k."""
    config, batch = case.model, 2 * case.batch
    with device:
        model = LlamaGen(config).to(getattr(torch, DTYPES[device.type])).eval()
        x = model.tok_embeddings(torch.zeros(batch, 1, dtype=torch.long)).detach()
        visible = torch.ones(batch, config.prefix + config.num_tokens, dtype=torch.bool)
    cache = Cache(config, batch, config.prefix + config.num_tokens - 1, x)
    for part in (cache.keys, cache.values):
        part.normal_()
    start = config.prefix + config.num_tokens // 2

    @torch.no_grad()
    def run():
        logits = model.run(x, start, visible, cache)[:, -1]
        return warp(guide(logits, 7.5), 1.0, case.top_k or 0, 1.0)

    return run


def with_graphs(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Callable[[], object]]:
    """``runs``, and each once more as a CUDA graph where there is a GPU."""
    return {**runs, **{name + GRAPH: captured(run) for name, run in runs.items() if device.type == "cuda"}}


def captured(run: Callable[[], T]) -> Callable[[], T]:
    """``run`` as a CUDA graph that is replayed."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    held = run, out  # what the graph reads and writes must live as long as it

    def replay():
        graph.replay()
        return held[1]

    return replay


def measure(session: Session, case: MatchCase) -> None:
    """Rows of one host."""
    device = session.device
    runs = problem(case, device)
    expected = runs["eager"]()
    for name, run in list(runs.items()):
        try:
            found = run()
        except NotImplementedError as reason:
            print(f"  {name:<20}unsupported: {reason}", flush=True)
            del runs[name]
            continue
        if not (torch.equal(found.tokens, expected.tokens) and torch.equal(found.window, expected.window)):
            session.problem(f"{SUITE} / {case.name} / {name}", "other tokens than the reference's")
            del runs[name]
    if case.model is not None:
        runs |= with_graphs({STEP: decode_step(case, device)}, device)
    times = timing.interleaved(runs, device, session.rounds(ROUNDS))
    for name, t in times.items():
        step = times.get(STEP + GRAPH if name.endswith(GRAPH) else STEP)
        share = None if step is None or name.startswith(STEP) else t.median / (t.median + step.median)
        kernel, launches = timing.kernels(runs[name], device)
        session.emit(SUITE, [{
            "workload": case.name, "case": case.label, "impl": name,
            **t.fields,
            "peak_mem_mib": timing.peak_memory_mib(runs[name], device), "kernel": kernel, "launches": launches,
            "share": share, "dtype": DTYPES[device.type] if name.startswith(STEP) else "float32", "batch": case.batch,
            "vocab": case.vocab, "image_tokens": case.image, "dim": case.dim, "top_k": case.top_k,
        }])  # fmt: skip
        part = "" if share is None else f"  {share:.1%} of a step"
        print(f"  {name:<20}{t.median:9.4f} ms [{t.p20:.4f}, {t.p80:.4f}]  launches {launches}{part}", flush=True)
