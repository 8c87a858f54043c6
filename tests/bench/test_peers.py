"""The careful user's algebra, held against the reference on a CPU through torch's flash kernel there."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import fastrope as fr
from fastrope.bench import fused_calls, peers, prologue
from fastrope.bench.cases import CASES, chosen
from fastrope.bench.peers import PEERS
from fastrope.bench.problem import Problem, Unsupported
from fastrope.bench.workloads import WORKLOADS

CPU = torch.device("cpu")
SMALL = [(name, case.name) for name, w in WORKLOADS.items() if w.small for case in chosen(w, list(CASES))]


def problem(workload: str, case: str, dtype=torch.float32) -> Problem:
    return Problem.make(WORKLOADS[workload], CASES[case], CPU, dtype)


def careful(some: Problem, attend=fused_calls.flash, stacked=False, wrap=peers.as_is):
    return prologue.careful(some, attend, stacked, wrap)()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---- the careful user ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("workload", "case"), SMALL)
def test_calls_merged_are_the_reference(workload, case, dtype):
    some = problem(workload, case, dtype)
    errors = some.check(careful(some))
    assert errors.passed, str(errors)
    if "loose" in case or "all" in case:
        errors = some.check(careful(some, stacked=True))
        assert errors.passed, str(errors)
    else:
        with pytest.raises(Unsupported, match="no levels to stack"):
            careful(some, stacked=True)


@pytest.mark.parametrize("workload", ["tiny", "tiny-masked"])
@pytest.mark.parametrize("part", ["lse", "scale", "gain", "mean"])
def test_it_is_refused_when_it_is_wrong(part, workload, monkeypatch):
    some = problem(workload, "all")

    def attend(*args, **options):
        out, lse = fused_calls.flash(*args, **options)
        return out, lse + torch.linspace(0, 0.1, lse.shape[2]) if part == "lse" else lse

    if part == "scale":
        monkeypatch.setattr(prologue._Lowering, "_at", lambda self, angles, r: angles * 1.001)
    if part == "gain":
        monkeypatch.setattr(prologue, "_gained", lambda x, gain, like: x.to(like.dtype))
    if part == "mean":
        monkeypatch.setattr(
            prologue.Keys, "__call__",
            lambda self, k: (self.turn(k) * (1 if self.weight is None else self.weight[:, None])).to(k.dtype),
        )  # fmt: skip
    assert not some.check(careful(some, attend)).passed


@pytest.mark.parametrize(
    ("workload", "case", "stacked"), [("tiny", "loose-levels", False), ("tiny-masked", "all", True)]
)
def test_prologue_and_epilogue_are_one_graph_each(workload, case, stacked):
    """Which torch.compile needs; its code generator is left out here."""
    torch.compiler.reset()
    some, graphs = problem(workload, case), []

    def wrap(function):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    assert some.check(careful(some, stacked=stacked, wrap=wrap)).passed
    assert len(graphs) == 2 * (1 if some.key_mask is None else 2)


def test_calls_are_as_few_as_can_be():
    """Levels cost a call each, or one for all; other signatures one for each set of keys."""
    counts = {}
    for case, stacked in (("plain", False), ("grag", False), ("crop-gain", False), ("loose-levels", False),
                          ("loose-levels", True), ("all", False), ("all", True)):  # fmt: skip
        calls = []

        def attend(*args, calls=calls, **options):
            calls.append(options["lse"])
            return fused_calls.flash(*args, **options)

        careful(problem("tiny", case), attend, stacked)
        counts[case, stacked] = calls
    assert [len(calls) for calls in counts.values()] == [1, 1, 3, 7, 3, 12, 4]
    assert all(calls[0] is False and all(calls[1:]) for calls in counts.values())


def test_sets_of_keys_are_views():
    """Of the keys as they stand, or sorted where they are scattered."""
    ((_, lowered),) = prologue.lower(problem("tiny", "loose-levels"))
    assert [keyset.rows for keyset in lowered.sets] == [slice(0, 72), slice(72, 136)]
    assert lowered.left == slice(0, 136)
    ((_, lowered),) = prologue.lower(problem("tiny", "all"))
    assert [keyset.rows for keyset in lowered.sets] == [slice(0, 72), slice(72, 120), slice(120, 136)]
    assert [keyset.places for keyset in lowered.sets] == [None, slice(0, 48), slice(48, 64)]
    assert sorted(lowered.left.tolist()) == list(range(136))
    for row in prologue.lower(problem("tiny-masked", "all")):
        assert all(isinstance(keyset.rows, slice) for keyset in row[1].sets)


@pytest.mark.parametrize(
    ("modulations", "why"),
    [
        ([fr.QueryScale(torch.linspace(0.5, 0.9, 136).where(torch.arange(136) > 8, 1.0))], "127 distinct scales"),
        ([fr.QueryScale(torch.full((136,), 0.5))], "every query is modulated"),
        ([fr.LogitGain(torch.full((1, 136), 0.5))], "per batch row"),
        ([fr.BiasDelta(torch.ones(1), 1.1)], "per batch row"),
        ([fr.QueryScale(torch.ones(136), keys=slice(0, 9)), fr.BiasDelta(1, 1.1, keys=slice(4, 20))], "in part"),
    ],
)
def test_what_does_not_fold_is_said(modulations, why):
    some = replace(problem("tiny", "plain"), modulations=modulations)
    with pytest.raises(Unsupported, match=why):
        PEERS["careful-flash"].build(some)


def test_axes_none_scales_every_pair():
    r = torch.ones(136)
    r[20:60] = 0.7
    some = replace(problem("tiny", "plain"), modulations=[fr.QueryScale(r, keys=slice(30, 90))])
    assert some.check(careful(some)).passed


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_cuda_kernels_are_called_as_torch_declares_them(kernel):
    """On tensors without data: arguments and shapes, not results."""
    q, k = (torch.empty(2, n, 3, 128, dtype=torch.bfloat16, device="meta") for n in (205, 4096))
    out, lse = getattr(fused_calls, kernel)(q, k, k, 0.1)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 3, 205), torch.float32)


@pytest.mark.parametrize("shape", ["with an axis of 1", "with more rows", "as it should be"])
def test_log_sum_exps_of_every_layout(shape):
    """cuDNN's has an axis behind since torch 2.9; FlashAttention-2's may have rows beyond the queries."""
    q, lse = torch.zeros(2, 3, 5, 16), torch.randn(2, 3, 5)
    found = {"with an axis of 1": lse[..., None], "with more rows": torch.cat([lse, lse], dim=2)}.get(shape, lse)
    assert torch.equal(fused_calls._three(found, q), lse)


# ---- others ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("workload", "case"),
    [("tiny", "grag"), ("tiny", "crop-gain"), ("tiny-masked", "bands"), ("tiny-masked", "crop-gain"),
     ("tiny-shared", "shared")],
)  # fmt: skip
def test_flex_attention_is_told_gains_and_masks(workload, case):
    some = problem(workload, case)
    gains = [m for m in some.modulations if isinstance(m, fr.LogitGain)]
    assert some.check(peers.flex_run(some, gains, flex_attention, peers.as_is)()).passed


def test_flex_attention_says_what_it_cannot():
    with pytest.raises(Unsupported, match="cannot rotate"):
        PEERS["flex"].build(problem("tiny", "loose-levels"))
    with pytest.raises(Unsupported, match="from row to row"):
        peers.flex_run(problem("tiny-masked", "grag"), [], flex_attention, peers.as_is)


@pytest.mark.parametrize("case", ["loose-per-query", "all-per-query"])
def test_materialised_keys_of_single_queries(case, monkeypatch):
    """What more distinct scales than there are passes for are computed with."""
    monkeypatch.setattr("fastrope.bench.materialised.MAX_SCALES", 3)
    for workload in ("tiny", "tiny-masked"):
        some = problem(workload, case)
        contestant = PEERS["materialised"].build(some)
        assert some.check(contestant.run()).passed
    monkeypatch.setattr("fastrope.bench.materialised.MAX_ELEMENTS", 1000)
    with pytest.raises(Unsupported, match="keys of 16 queries"):
        PEERS["materialised"].build(problem("tiny", case))


def test_a_library_that_is_missing_is_unsupported(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    monkeypatch.setattr(peers, "_on_cuda", lambda problem: True)
    some = problem("tiny", "plain")
    with pytest.raises(Unsupported, match="head dims"):
        PEERS["sage"].build(some)
    monkeypatch.setattr(peers, "SAGE_DIMS", (32,))
    with pytest.raises(Unsupported, match="sageattention is not installed"):
        PEERS["sage"].build(some)


def test_sage_attention_is_called_as_its_first_version_is(monkeypatch):
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        assert (tensor_layout, is_causal, sm_scale) == ("HND", False, None)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    monkeypatch.setattr(peers, "_on_cuda", lambda problem: True)
    monkeypatch.setattr(peers, "SAGE_DIMS", (32,))
    some = problem("tiny", "plain")
    contestant = PEERS["sage"].build(some)
    assert contestant.problem.check(contestant.run()).passed
    assert PEERS["sage"].approximate


def test_torch_sdpa_is_pinned(monkeypatch):
    used = []
    pin = peers.sdpa_kernel
    monkeypatch.setattr(peers, "sdpa_kernel", lambda backend: used.append(backend) or pin(backend))
    PEERS["flash"].build(problem("tiny", "plain"))
    for name in ("cudnn", "efficient"):
        with pytest.raises(Unsupported, match="No viable backend"):
            PEERS[name].build(problem("tiny", "plain"))
    assert [backend.name for backend in used] == ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"]
