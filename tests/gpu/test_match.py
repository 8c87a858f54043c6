"""Anchor token matching on a device: parity with the reference on the CPU, graphs, no waiting."""

from __future__ import annotations

import pytest
import torch
from numerics import DEVICE

from fastrope import ISLock

pytestmark = pytest.mark.gpu
INF = float("inf")


def a_call(vocab=16384, image=16384, dim=8, batch=3, dtype=torch.float32, top_k=1000, seed=0):
    g = torch.Generator().manual_seed(seed)
    codebook = torch.randn(image, dim, generator=g)
    codebook = codebook / codebook.norm(dim=1, keepdim=True)
    ids = torch.randperm(vocab, generator=g)[:image]
    logits = (4 * torch.randn(batch, vocab, generator=g)).to(dtype)
    if top_k is not None:
        logits.masked_fill_(logits < logits.topk(min(top_k, vocab)).values[:, -1:], -INF)
    logits[:, :5] = torch.nan
    anchors = ids[torch.randint(image, (batch,), generator=g)]
    return codebook, ids, logits, anchors, torch.randint(2**63 - 1, (batch,), generator=g)


@pytest.mark.parametrize(
    ("options", "lock"),
    [
        ({}, ISLock()), ({"top_k": None}, ISLock(tau=INF)), ({"dtype": torch.bfloat16}, ISLock()),
        ({"dtype": torch.float16, "vocab": 16387}, ISLock(tau=0.2)), ({"batch": 64}, ISLock()),
        ({"vocab": 65536, "image": 8192, "dim": 4096, "top_k": 2000}, ISLock(100, tau=0.4, metric="cosine")),
        ({"vocab": 184622, "image": 32768, "dim": 4, "top_k": 2048}, ISLock(candidates=150)),
        ({"vocab": 65536, "image": 65536, "top_k": None}, ISLock(candidates=5000, tau=INF)),
        ({"vocab": 37, "image": 11, "dim": 3, "top_k": 5}, ISLock(candidates=1, tau=INF)),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_parity_with_the_reference_on_the_cpu(options, lock):
    """The same seeds choose the same tokens: noise is equal to the last bit between the CPU and the kernel."""
    codebook, ids, logits, anchors, seeds = a_call(**options)
    eager = lock.matcher(codebook, num_tokens=64, token_ids=ids, backend="eager")
    fused = lock.matcher(codebook.to(DEVICE), num_tokens=64, token_ids=ids, backend="triton")
    column = anchors[:, None].repeat(1, 2).to(DEVICE)[:, 0]  # as hosts pass them: anchors[:, i]
    for position in (0, 31, 63):
        expected = eager(logits, anchors, position, seeds=seeds)
        found = fused(logits.to(DEVICE), column, position, seeds=seeds.to(DEVICE))
        assert torch.equal(found.tokens.cpu(), expected.tokens)
        assert torch.equal(found.window.cpu(), expected.window)
        assert torch.equal(found.accepted.cpu(), expected.accepted)
        torch.testing.assert_close(found.distance.cpu(), expected.distance, rtol=1e-4, atol=1e-5)


def test_the_kernel_is_what_auto_runs():
    from fastrope.islock.op import choose

    x = torch.randn(1, 64, device=DEVICE)
    assert choose(x, x, "auto") == "triton"


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_a_graph_follows_its_position(backend):
    """Captured once, replayed at every position and with new logits; equal to calls outside the graph."""
    codebook, ids, logits, anchors, seeds = (x.to(DEVICE) for x in a_call(vocab=1000, image=1000))
    matcher = ISLock(candidates=60, tau=INF).matcher(codebook, num_tokens=64, token_ids=ids, backend=backend)
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    matcher(logits, anchors, position, seeds=seeds)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = matcher(logits, anchors, position, seeds=seeds)
        position.add_(1)
    position.zero_()
    windows = []
    for i in range(64):
        logits.copy_(logits.roll(7, 1))
        graph.replay()
        expected = matcher(logits, anchors, i, seeds=seeds)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
        windows.append(int(out.window[0]))
    assert windows == [matcher.lock.window(i, 64) for i in range(64)]


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_no_call_waits_for_the_device(backend):
    codebook, ids, logits, anchors, _ = (x.to(DEVICE) for x in a_call())
    matcher = ISLock().matcher(codebook, num_tokens=64, token_ids=ids, backend=backend)
    generator = torch.Generator(DEVICE).manual_seed(0)
    matcher(logits, anchors, 0, generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(4):
            matcher(logits, anchors, i, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_binary_for_all_sizes():
    """Vocabularies, batches, codebooks, windows and positions of any size share what was compiled."""
    from fastrope.kernels import match

    def run(vocab: int, image: int, batch: int, candidates: int) -> None:
        codebook, ids, logits, anchors, seeds = (x.to(DEVICE) for x in a_call(vocab, image, batch=batch))
        matcher = ISLock(candidates).matcher(codebook, num_tokens=9, token_ids=ids)
        for position in range(4):  # every second of these views is not 16-byte aligned
            matcher(logits, anchors, position, seeds=seeds)

    def compiled() -> int:
        return sum(len(entry[0]) for entry in match.match_kernel.device_caches.values())

    run(1000, 900, 1, 5)
    before = compiled()
    for sizes in ((1001, 64, 2, 150), (4096, 4096, 3, 17), (5003, 77, 5, 1), (16384, 16384, 1, 64)):
        run(*sizes)
    assert compiled() == before > 0
