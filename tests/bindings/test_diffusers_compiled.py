"""The binding under compilers: one graph whatever the layer, the step and the structure of the plan."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS, assert_same, grag_like, loose_like
from tiny_pipelines import flux_generate, flux_pipeline
from tiny_transformers import build_flux, run
from torch._dynamo.testing import CompileCounter

DISTINCT = {
    host.build: host for host in TINY_HOSTS.values()
}  # models; the same with other references is no other graph
ALL = pytest.mark.parametrize("host", DISTINCT.values(), ids=[host.name for host in DISTINCT.values()])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, how: str, counter):
    """What to bind to and to call."""
    if how == "wrapped":
        return torch.compile(model, backend=counter, fullgraph=True)
    if how == "in place":
        model.compile(backend=counter, fullgraph=True)
    else:
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
    return model


def changing(layout: fr.TokenLayout):
    """A method whose plans differ in structure from layer to layer and from step to step."""

    def levels(count: int) -> list:
        scale = torch.ones(len(layout), dtype=torch.float64)
        tokens = layout.target.stop - layout.target.start
        scale[layout.target] = 0.5 + torch.arange(tokens).double().remainder(count) / 10
        return [fr.QueryScale(scale, keys=layout.target, axes=(1, 2))]

    def modulations(site):
        by_step = [
            grag_like(layout),
            [],  # the host's own attention
            levels(2),
            levels(3) + grag_like(layout),
            loose_like(layout),  # a scale of its own for every query
        ]
        return by_step[site.step] if site.layer % 3 != 2 else []

    return modulations


def expected_of(host, model, call, modulations, step: int) -> torch.Tensor:
    """By the formulas, in the layers where something is active."""
    count = len(host.attentions(model))
    site = fr.Site(host.layout, step=step)
    layers = {n for n in range(count) if modulations(replace(site, layer=n))}
    with host.by_formulas(model, host.attend(modulations(site)), layers=layers):
        return run(model, call)


@pytest.mark.parametrize(("how", "blocks"), [("wrapped", 12), ("in place", 2), ("block by block", 12)])
def test_flux_compiles_once_for_all_layers_and_steps(how, blocks):
    """12 double-stream and 12 single-stream layers, five steps of five structures."""
    host = TINY_HOSTS["kontext"]
    model, call = build_flux((blocks, blocks)).double(), host.call(host.layout)
    modulations = changing(host.layout)
    expected = [expected_of(host, model, call, modulations, step) for step in range(5)]
    counter = CompileCounter()
    target = compiled(model, how, counter)
    counts = []
    with fr.apply(target, types.SimpleNamespace(modulations=modulations)) as handle:
        for step in range(5):
            handle.set_step(step, 5)
            assert_same(run(target, call), expected[step])
            counts.append(counter.frame_count)
    # The host's first double block gets contiguous tokens and the others slices: that makes a graph with or without us.
    assert counts == [3 if how == "block by block" else 1] * 5


@ALL
def test_blocks_compile_once(host):
    """Block by block, as diffusers recommends; two kinds of block make two graphs."""
    model, call = host.build().double(), host.call(host.layout)
    modulations = changing(host.layout)
    expected = [expected_of(host, model, call, modulations, step) for step in range(5)]
    stock = run(model, call)
    model.compile_repeated_blocks(backend=(counter := CompileCounter()), fullgraph=True)
    run(model, call)
    before, counts = counter.frame_count, []
    assert before >= len(host.processors)
    with fr.apply(model, types.SimpleNamespace(modulations=modulations)) as handle:
        for step in range(5):
            handle.set_step(step, 5)
            out = run(model, call)
            assert_same(out, expected[step])
            if not modulations(fr.Site(host.layout, step=step)):
                assert_same(out, stock, 1e-12)  # the host's own backend on what the host rotated
            counts.append(counter.frame_count - before)
    assert counts[0] <= before  # as many graphs as the host has by itself
    assert counts == counts[:1] * 5
    assert torch.equal(run(model, call), stock)
    assert counter.frame_count - before == counts[0]  # the stock graphs are still there


def test_bound_under_another_default_device():
    """A layer's address is read on the host, whatever device new tensors go to."""
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    with host.by_formulas(model, host.attend(grag_like(host.layout))):
        expected = run(model, call)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with torch.device("meta"):
        handle = fr.apply(model, grag_like(host.layout))
    assert_same(run(model, call), expected)
    handle.remove()


def test_handles_of_one_model_share_its_graphs():
    """Another handle on the same compiled model, after the first was removed."""
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    model.compile_repeated_blocks(backend=(counter := CompileCounter()), fullgraph=True)
    counts = []
    for mods in (grag_like(host.layout), loose_like(host.layout)):
        with host.by_formulas(twin := host.build().double(), host.attend(mods)):
            twin.load_state_dict(model.state_dict())
            expected = run(twin, call)
        stock = run(twin, call)
        with fr.apply(model, mods) as handle:
            assert_same(run(model, call), expected)
            handle.update()
            assert_same(run(model, call), stock)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


def test_compiled_after_apply():
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    with fr.apply(model, loose_like(host.layout)):
        expected = run(model, call)
        assert_same(run(torch.compile(model, backend="eager", fullgraph=True), call), expected)


def test_inductor_runs_the_op():
    """The default compiler on one layer: the op is in the graph and its answer is used."""
    host = TINY_HOSTS["kontext"]
    model, call = build_flux((0, 1)), host.call(host.layout, dtype=torch.float32)
    mods = grag_like(host.layout)
    with host.by_formulas(model, host.attend(mods)):
        expected = run(model, call)
    with fr.apply(model, mods):
        model.compile_repeated_blocks(fullgraph=True)
        assert_same(run(model, call), expected, 1e-4)


@pytest.mark.parametrize("how", ["wrapped", "block by block"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_refused_in_compiled_layers(how, checkpointing):
    host = TINY_HOSTS["kontext"]
    model, call = host.build(), host.call(host.layout, dtype=torch.float32)
    if checkpointing:
        model.enable_gradient_checkpointing()
    target = compiled(model, how, "eager")
    with fr.apply(target, grag_like(host.layout)), pytest.raises(Exception, match=r"expected torch\.no_grad\(\) while"):
        target(**call)


def test_the_op_meets_its_contract():
    """Schema, fake implementation, layout of the output."""
    from fastrope.bindings.diffusers.forwards import Forward, Forwards, LayerState
    from fastrope.bindings.diffusers.layer_op import Layer, host_attention

    forwards = Forwards(torch.nn.Identity(), 1)
    layer = Layer(forwards, 0, "auto", None, applied=True)
    layer.original = types.SimpleNamespace(_attention_backend=None)
    forwards.enter(sys._getframe(), Forward((LayerState(),)))
    q, k, v = torch.randn(3, 2, 7, 2, 16).unbind()
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    for given in (None, mask):
        torch.library.opcheck(
            host_attention, (q, k, v.transpose(1, 2).contiguous().transpose(1, 2), given, layer.address)
        )
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.equal(host_attention(q, k, v, None, layer.address), expected)
    layer.close()
    with pytest.raises(ValueError, match=r"^handle: expected a bound handle"):
        host_attention(q, k, v, None, layer.address)


def test_a_compiled_pipeline_counts_its_steps():
    pipe = flux_pipeline()
    asked = []

    def modulations(site):
        asked.append(site.step)
        return grag_like(site.tokens) if site.step else []

    method = types.SimpleNamespace(modulations=modulations)
    with fr.apply(pipe, method):
        expected = flux_generate(pipe, steps=3)
    pipe.transformer.compile_repeated_blocks(backend=(counter := CompileCounter()), fullgraph=True)
    asked.clear()
    with fr.apply(pipe, method):
        assert_same(flux_generate(pipe, steps=3), expected, 1e-4)
    assert asked == [0] * 4 + [1] * 4 + [2] * 4
    assert 0 < counter.frame_count <= 3


def test_plans_made_later_are_of_what_was_given_then():
    """What is remembered for the same content must not change with the caller's tensor."""
    model, host = build_flux(), TINY_HOSTS["flux"]
    call, delta = host.call(host.layout, dtype=torch.float32), torch.tensor([1.5, 2.0])

    def method():
        return fr.BiasDelta(1.0, delta, keys=host.layout.target)

    with fr.apply(model, method()) as handle:
        expected = run(model, call)
        delta.mul_(0.5)
        run(model, call)
        delta = torch.tensor([1.5, 2.0])
        handle.update(method())
        model.compile(backend="eager")  # the first compiled call wants a plan of another kind
        assert_same(run(model, call), expected, 1e-5)
