"""Captured graphs, compiled calls and synchronisation on a device."""

from __future__ import annotations

import pytest
import torch
from gpu.device_calls import (
    KINDS,
    ROUTES,
    a_call,
    planned,
)

pytestmark = pytest.mark.gpu


def refill(*inputs: torch.Tensor) -> None:
    """New values in place."""
    for x in inputs:
        x.copy_(torch.randn(x.shape, device=x.device).to(x.dtype))


@pytest.mark.parametrize("route", ROUTES)
def test_a_captured_graph_replays_on_new_values(route):
    make, backend = ROUTES[route]
    call = make()
    q, k, v = inputs = [x.clone() for x in (call.q, call.k, call.v)]
    attend = planned(call, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend(q, k, v)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v)
    for _ in range(3):
        refill(*inputs)
        graph.replay()
        assert torch.equal(out, attend(q, k, v))


@pytest.mark.parametrize("route", ROUTES)
def test_compiled_into_cuda_graphs_without_recompiling(route):
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    counters.clear()
    make, backend = ROUTES[route]
    call = make()
    q, k, v = inputs = [x.clone() for x in (call.q, call.k, call.v)]
    attend = planned(call, backend)
    compiled = torch.compile(lambda q, k, v: attend(q * 2, k, v) + 1, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(q, k, v).clone(), attend(q * 2, k, v) + 1)
            refill(*inputs)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("route", ["folded", "split", "polynomial"])
def test_other_paths_do_not_synchronise(route):
    make, backend = ROUTES[route]
    call = make()
    attend = planned(call, backend)
    attend(call.q, call.k, call.v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(call.q, call.k, call.v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, "random"])
def test_the_hot_path_does_not_synchronise(kind, mask):
    call = a_call(kind, mask=mask)
    attend = planned(call, return_lse=True)
    attend(call.q, call.k, call.v)
    call.run("triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(call.q, call.k, call.v)
        call.run("triton")  # the same objects again: the plan is remembered
    finally:
        torch.cuda.set_sync_debug_mode("default")
