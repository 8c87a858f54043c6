"""Gradient checkpointing: blocks that run again in the backward pass do what they did in their own forward."""

from __future__ import annotations

import functools
import gc
import types
import weakref

import pytest
import torch
from overlapping import METHOD, overlapping
from torch.utils.checkpoint import checkpoint
from untwisting_calls import CARRIED, DIALS, apply, call_of, source_of

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS, assert_differ, assert_same, grag_like, kontext_call, loose_like
from tiny_transformers import build_flux, run

HOSTS = pytest.mark.parametrize("name", ["kontext", "qwen", "z-image"])


def by_step(site: fr.Site) -> list:
    """Other numbers and another structure in every step and layer; the last layer is the host's own."""
    if site.layer == site.num_layers - 1:
        return []
    return loose_like(site.tokens) if site.step else grag_like(site.tokens, delta=0.5 + 0.2 * site.layer)


def leaf_of(call: dict) -> torch.Tensor:
    return (call["x"][0] if "x" in call else call["hidden_states"]).requires_grad_()


def loss_of(model, call: dict) -> torch.Tensor:
    return sum(out.square().sum() for out in model(**call, return_dict=False)[0])


def two_steps(handle, model, calls: list[dict]) -> torch.Tensor:
    """The loss of two steps that differ, before any backward pass."""
    total = 0.0
    for step, call in enumerate(calls):
        handle.set_step(step, 2)
        total = total + loss_of(model, call)
    return total


def functions() -> dict:
    return {
        "default": None,
        "plain": lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=False),
        "reentrant": lambda module, *args: checkpoint(module, *args, use_reentrant=True),
    }


@HOSTS
@pytest.mark.parametrize("how", functions())
@pytest.mark.parametrize("when", ["before", "while"])
def test_two_steps_before_one_backward(name, how, when):
    """Enabled before or while a handle is bound; the backward pass while it is, after it was removed, or beside another
    one that is bound by then."""
    host = TINY_HOSTS[name]
    model = host.build().double().train()
    calls = [host.call(host.layout) for _ in range(2)]
    leaves = [leaf_of(call) for call in calls]
    method = types.SimpleNamespace(modulations=by_step)
    stock = torch.autograd.grad(loss_of(model, calls[0]), leaves[0])[0]

    def enable():
        model.enable_gradient_checkpointing(functions()[how])
        return model._gradient_checkpointing_func

    with fr.apply(model, method) as handle:
        expected = torch.autograd.grad(two_steps(handle, model, calls), leaves)
    assert_differ(expected[0], stock)
    function = enable() if when == "before" else None
    for end in ("bound", "removed", "bound anew"):
        handle = fr.apply(model, method)
        if when == "while":
            function = enable()
        total = two_steps(handle, model, calls)
        other = None
        if end != "bound":
            handle.remove()
            assert model._gradient_checkpointing_func is function
        if end == "bound anew":
            other = fr.apply(model, [])
        total.backward()
        for leaf, gradient in zip(leaves, expected, strict=True):
            assert torch.equal(leaf.grad, gradient)
            leaf.grad = None
        for each in (handle, other):
            if each is not None and each.bound:
                each.remove()
        assert model._gradient_checkpointing_func is function


@CARRIED
def test_a_shared_reference(carried):
    """Rows of the batch, and keys of a cache."""
    host = TINY_HOSTS["flux"]
    model, source = host.build().double().train(), source_of(host, call_of(host, 6, 1))
    calls = [call_of(host, text, 2) for text in (5, 9)]
    leaves = [leaf_of(call) for call in calls]
    method = fr.UntwistingRoPE(**DIALS)
    with apply(model, carried, source, method) as handle:
        expected = torch.autograd.grad(two_steps(handle, model, calls), leaves)
        model.enable_gradient_checkpointing()
        total = two_steps(handle, model, calls)
    for gradient, known in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        assert_same(gradient, known, 1e-12)


def test_a_block_that_runs_again_leaves_other_threads_their_calls():
    """After the handle was removed: another thread runs the host's own transformer meanwhile, as it stands."""
    model, call = build_flux().double().train(), kontext_call()
    leaf, stock = leaf_of(call), run(model, call)
    with fr.apply(model, METHOD):
        expected = torch.autograd.grad(loss_of(model, call), leaf)[0]
        model.enable_gradient_checkpointing()
        total = loss_of(model, call)
    block = model.transformer_blocks[0]
    gradient, found = overlapping(block.norm1, lambda: torch.autograd.grad(total, leaf)[0], lambda: run(model, call))
    assert torch.equal(found, stock)
    assert torch.equal(gradient, expected)


def test_blocks_that_run_again_are_not_looked_at_again():
    model, call = build_flux().double().train(), kontext_call()
    leaf_of(call)
    model.enable_gradient_checkpointing()
    with fr.apply(model, METHOD) as handle, handle.inspect() as record:
        loss_of(model, call).backward()
    assert [look.layer for look in record.looks] == [0, 1, 2, 3]


def test_a_graph_holds_what_it_needs_and_no_more():
    model, call = build_flux().double().train(), kontext_call()
    leaf_of(call)
    model.enable_gradient_checkpointing()
    handle = fr.apply(model, METHOD)
    total = loss_of(model, call)
    plan = weakref.ref(next(iter(handle._state.works)).plans[0])
    state = weakref.ref(handle._state)
    handle.remove()
    gc.collect()
    assert plan() is not None
    assert state() is None
    total.backward()
    del total
    gc.collect()
    assert plan() is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("what", ["transformer", "block"])
def test_checkpoints_that_cannot_be_followed_are_refused(what, reentrant):
    """Around the whole transformer, or put into a block by other means than diffusers' own."""
    model, call = build_flux().double().train(), kontext_call()
    leaf_of(call)
    run_again = functools.partial(checkpoint, use_reentrant=reentrant)

    def forward_again(forward, **given):
        names = list(given)
        return run_again(lambda *args: forward(**dict(zip(names, args, strict=True))), *given.values())

    def loss(hidden):
        return loss_of(model, call | {"hidden_states": hidden})

    with fr.apply(model, METHOD):
        expected = run(model, call)
        if what == "block":
            for block in model.transformer_blocks:
                block.forward = functools.partial(forward_again, block.forward)
            assert torch.equal(run(model, call), expected)  # without gradients nothing runs again
        with pytest.raises(NotImplementedError, match=r"^gradient checkpointing: expected transformer\.enable_grad"):
            loss(call["hidden_states"]) if what == "block" else run_again(loss, call["hidden_states"])


def test_hooks_of_offloading_are_refused_after_removal():
    """They run the block itself, which is the host's own again; while the handle is bound they do no harm."""
    accelerate = pytest.importorskip("accelerate")
    model, call = build_flux().double().train(), kontext_call()
    leaf = leaf_of(call)
    with fr.apply(model, METHOD):
        expected = torch.autograd.grad(loss_of(model, call), leaf)[0]
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        accelerate.hooks.add_hook_to_module(block, accelerate.hooks.ModelHook())
    model.enable_gradient_checkpointing()
    with fr.apply(model, METHOD):
        assert torch.equal(torch.autograd.grad(loss_of(model, call), leaf)[0], expected)
        total = loss_of(model, call)
    with pytest.raises(NotImplementedError, match=r"^gradient checkpointing: expected backward\(\) before handle\.rem"):
        total.backward()
