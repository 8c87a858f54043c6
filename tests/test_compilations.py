"""How many binaries calls compile: none more for another length, batch or number of heads."""

from __future__ import annotations

import pytest
import torch
from pages import page
from running import interpreted

import fastrope as fr
from fastrope.backends import folded, fused

pytest.importorskip("triton")
from fastrope.kernels import attention, axis_blocks, launch, means, order, pack, polynomial, query_means

BACKENDS = " ".join(page("backends.md").split())  # what compilation costs


class Recorder:
    """Stands in for a jitted kernel and keeps what triton compiles anew for: types, constants, and for the arguments it
    specializes whether an integer is 1, divides by 16 or leaves int32, and whether a pointer is aligned."""

    def __init__(self, kernel):
        self.names = self.arg_names = kernel.arg_names
        self.plain = {self.names[p.num] for p in kernel.params if p.do_not_specialize}
        self.run_time = [self.names[p.num] for p in kernel.params if not p.is_constexpr]
        self.keys = set()

    def __getitem__(self, grid):
        def launch(*args, **named):
            given = {**dict(zip(self.names, args, strict=False)), **named}
            key = [tuple(sorted((k, str(v)) for k, v in given.items() if k not in self.run_time))]
            for name in self.run_time:
                value = given[name]
                if isinstance(value, torch.Tensor):
                    key.append((name, value.dtype, value.data_ptr() % 16 == 0))
                elif isinstance(value, int):
                    small = -(2**31) <= value < 2**31
                    key.append((name, small) if name in self.plain else (name, small, value == 1, value % 16 == 0))
            self.keys.add(tuple(key))

        return launch


@pytest.fixture
def recorders(monkeypatch):
    found = {}
    monkeypatch.setattr(launch, "_PREPARED", {})  # launches prepared before know the kernel itself
    for module, name in ((attention, "attention_kernel"), (axis_blocks, "axis_block_kernel"), (pack, "pack_kernel"),
                         (pack, "queries_kernel"), (means, "means_kernel"), (polynomial, "terms_kernel"),
                         (polynomial, "polynomial_kernel"), (order, "order_kernel"), (means, "reweight_kernel"),
                         (pack, "scatter_kernel"),
                         (query_means, "run_sums_kernel"), (query_means, "per_query_means_kernel")):  # fmt: skip
        kernel = getattr(module, name)
        original = getattr(kernel, "fn", kernel)
        jitted = kernel if hasattr(kernel, "params") else __import__("triton").JITFunction(
            original, do_not_specialize=getattr(module, COUNTS[name]))  # fmt: skip
        found[name] = Recorder(jitted)
        monkeypatch.setattr(module, name, found[name])
    return found


COUNTS = {
    "attention_kernel": "ATTENTION_COUNTS", "axis_block_kernel": "AXIS_BLOCK_COUNTS", "pack_kernel": "PACK_COUNTS",
    "queries_kernel": "QUERIES_COUNTS", "means_kernel": "MEANS_COUNTS", "terms_kernel": "TERMS_COUNTS",
    "polynomial_kernel": "POLYNOMIAL_COUNTS", "order_kernel": "ORDER_COUNTS",
    "reweight_kernel": "REWEIGHT_COUNTS", "scatter_kernel": "SCATTER_COUNTS",
    "run_sums_kernel": "RUN_SUMS_COUNTS", "per_query_means_kernel": "PER_QUERY_MEANS_COUNTS",
}  # fmt: skip


def launch_all(lengths, scale_of=None, batch=1, heads=2, scattered=False, dtype=torch.float32) -> None:
    for length in lengths:
        x = torch.randn(batch, length, heads, 16).to(dtype)
        rope = fr.RoPE.axial(torch.arange(length)[:, None], (16,))
        mods = []
        if scale_of is not None:
            keys = slice(None, None, 2) if scattered else slice(length // 2, length)
            mods = [
                fr.QueryScale(scale_of(length), keys=keys), fr.BandWeight(torch.linspace(0.5, 1.5, 8), keys=keys),
                fr.BiasDelta(1, 1.1, keys=keys), fr.LogitGain(torch.linspace(0.5, 1, length), keys=keys),
            ]  # fmt: skip
        lowered = fr.plan(rope=rope, modulations=mods).lowered
        fused.run(x, x, x, lowered, 0.25, fused.Launch.of(x, x, x, lowered))


@interpreted
def test_compilations_do_not_grow_with_lengths(recorders):
    """Nine lengths, odd and round, batch 1 to 3, any number of heads: one binary each of what a plain call launches."""
    launch_all((1, 16, 113, 128, 239, 256, 1000, 1023, 1024))
    launch_all((7, 64), batch=3, heads=5)
    counts = {name: len(r.keys) for name, r in recorders.items() if r.keys}
    assert counts == {"attention_kernel": 1, "pack_kernel": 2}  # keys are gathered, queries are not


@interpreted
def test_compilations_of_a_call_that_folds(recorders):
    """Before torch's attention: one binary for queries and one for keys, whichever heads are grouped; one of the means
    and one that re-weights keys where there is a group."""

    def launch(length, batch=1, heads=2, modulations=()):
        q, x = torch.randn(batch, length, heads, 16), torch.randn(batch, length, 2, 16)
        rope = fr.RoPE.axial(torch.arange(length)[:, None], (16,))
        lowered = fr.plan(rope=rope, modulations=modulations).lowered
        folded.run(q, x, x, lowered, 0.25, folded.prepares(q, x, x, lowered))
        return {name: len(r.keys) for name, r in recorders.items() if r.keys}

    for length in (1, 16, 113, 128, 239, 256, 1000, 1023, 1024):
        counts = launch(length)
    counts = launch(7, batch=3, heads=4)
    assert counts == {"pack_kernel": 2}
    assert f"A first plain call compiles {sum(counts.values())} kernels, " in BACKENDS
    for length in (24, 113, 600):
        tail = slice(length // 2, None)
        counts = launch(length, modulations=[fr.BandWeight(torch.full((8,), 0.5), tail), fr.BiasDelta(1, 1.1, tail)])
    assert counts == {"pack_kernel": 2, "means_kernel": 1, "reweight_kernel": 1}


@interpreted
@pytest.mark.parametrize(
    ("dtype", "more"),
    [(torch.float32, ["axis_block_kernel"]), (torch.float16, ["terms_kernel", "polynomial_kernel", "order_kernel"])],
)
def test_compilations_of_a_modulated_call(recorders, dtype, more):
    """Scale buckets and per-query scales, many lengths: one binary of each kernel, one more of that which packs keys
    where it sorts values too."""
    scales = (lambda n: torch.where(torch.arange(n) % 3 == 0, 0.5, 1.0), lambda n: torch.linspace(0.9, 0.901, n))
    lengths = (70, 113, 128, 239, 256, 600)
    more = [*more, "run_sums_kernel", "per_query_means_kernel"]
    expected = dict.fromkeys(["attention_kernel", "pack_kernel", "queries_kernel", "means_kernel", *more], 1)
    for scale_of in scales:
        launch_all(lengths, scale_of, dtype=dtype)
    counts = {name: len(r.keys) for name, r in recorders.items() if r.keys}
    assert counts == {**expected, "pack_kernel": counts["pack_kernel"]}
    for scale_of in scales:
        launch_all(lengths[::2], scale_of, scattered=True, dtype=dtype)
    counts = {name: len(r.keys) for name, r in recorders.items() if r.keys}
    assert counts == {**expected, "pack_kernel": 2}
    if dtype == torch.float16:
        most = sum(counts.values())
        assert f", a modulated one {most} at most, whatever lengths, batches and numbers of heads follow" in BACKENDS


@interpreted
def test_compilations_of_streams(recorders):
    """However tokens are shared out between two streams, with norms of either kind: one binary of each kernel, two of
    the one that joins keys, which it rotates, and values."""
    for text, image in ((1, 15), (8, 8), (77, 36), (16, 240), (255, 1)):
        for weight, eps in ((None, 1e-6), (torch.rand(16), 0)):
            norm = fr.Norm(weight, eps)
            streams = [fr.Stream(*torch.randn(3, 1, n, 2, 16), norm, norm) for n in (text, image)]
            mods = [fr.BiasDelta(1, 1.1, keys=slice(1, None))]
            rope = fr.RoPE.axial(torch.arange(text + image)[:, None], (16,))
            fr.joint_attention(streams, plan=fr.plan(rope=rope, modulations=mods), backend="triton")
    counts = {name: len(r.keys) for name, r in recorders.items() if r.keys}
    assert counts == {"attention_kernel": 1, "pack_kernel": 2, "queries_kernel": 1, "means_kernel": 1}
