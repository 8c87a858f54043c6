"""What FLUX.1 says of its sequence: ids, plans made of them, grids read off them."""

from __future__ import annotations

import contextlib
import types
from dataclasses import replace

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import (
    KONTEXT,
    LAYERS,
    LAYOUT,
    Recorder,
    all_four,
    assert_differ,
    assert_same,
    kontext_by_formulas,
    kontext_call,
)
from tiny_transformers import DIM, TARGET, TEXT, build_flux, run

from fastrope.bindings.image import works

# ---- mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("per_row", [False, True])
def test_modulated_forward_follows_the_formulas(transformer, backend, per_row):
    call = kontext_call()
    mods = all_four(batch=2 if per_row else None)
    expected = kontext_by_formulas(transformer, call, mods)
    stock = run(transformer, call)
    with fr.apply(transformer, *mods, backend=backend):
        out = run(transformer, call)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert_differ(out, stock)


@pytest.mark.parametrize("index", range(4))
def test_each_modulation_alone(transformer, index):
    call = kontext_call()
    mods = all_four()[index : index + 1]
    with fr.apply(transformer, mods, backend="sdpa"):
        out = run(transformer, call)
    torch.testing.assert_close(out, kontext_by_formulas(transformer, call, mods), rtol=1e-9, atol=1e-9)
    assert_differ(out, run(transformer, call))


def test_half_precision_ids_are_exact_and_batched_ids_are_read(transformer):
    call, mods = kontext_call(), all_four()
    expected = kontext_by_formulas(transformer, call, mods)
    with fr.apply(transformer, mods):
        low = {name: call[name].to(torch.bfloat16) for name in ("txt_ids", "img_ids")}
        assert torch.equal(run(transformer, call | low), run(transformer, call))
        batched = {name: call[name][None].expand(2, -1, -1) for name in ("txt_ids", "img_ids")}
        assert_same(run(transformer, call | batched), expected)


def test_other_ids_of_the_same_shape_make_another_plan(transformer):
    call, mods = kontext_call(), all_four()
    far = call | {"img_ids": call["img_ids"] * torch.tensor([1.0, 3.0, 2.0])}
    with fr.apply(transformer, mods):
        for _ in range(2):
            assert_same(run(transformer, call), by_formulas_within(transformer, call, mods))
            assert_same(run(transformer, far), by_formulas_within(transformer, far, mods))


def by_formulas_within(model, call, mods):
    """The expectation while a handle is bound: on a copy of the weights."""
    twin = build_flux().double()
    twin.load_state_dict(model.state_dict())
    return kontext_by_formulas(twin, call, mods)


def test_ids_and_modulations_changed_in_place_are_seen(transformer):
    call, mods = kontext_call(), all_four()
    with fr.apply(transformer, mods):
        run(transformer, call)
        call["img_ids"][:, 1] += call["img_ids"][:, 2]
        mods[1].weight.mul_(0.5)
        assert_same(run(transformer, call), by_formulas_within(transformer, call, mods))


def test_gradients_flow_to_the_inputs(transformer):
    call = kontext_call(batch=1)
    leaf = call["hidden_states"].requires_grad_()
    with fr.apply(transformer, all_four()):
        transformer(**call, return_dict=False)[0].square().sum().backward()
    assert bool(leaf.grad.isfinite().all())
    assert float(leaf.grad.abs().max()) > 0


def test_plans_are_shared_by_layers_and_steps(transformer, monkeypatch):
    built = []
    plan = fr.plan
    monkeypatch.setattr(fr, "plan", lambda **arguments: built.append(1) or plan(**arguments))
    call = kontext_call()
    method = types.SimpleNamespace(modulations=lambda site: all_four(site.tokens))  # new tensors at every site
    with fr.apply(transformer, method):
        for timestep in (1.0, 0.5, 0.25):
            ids = {name: call[name].clone() for name in ("txt_ids", "img_ids")}
            run(transformer, call | ids | {"timestep": torch.full((2,), timestep, dtype=torch.float64)})
    assert len(built) == 1


def test_numbers_of_every_layer_and_step_share_one_plan(transformer, monkeypatch):
    """Each layer follows its own numbers; neutral ones leave the plan, to the bit."""
    built = []
    plan = fr.plan
    monkeypatch.setattr(fr, "plan", lambda **arguments: built.append(1) or plan(**arguments))
    call = kontext_call()
    scale, weight, group, gain = all_four()

    def at(layer: int, step: int) -> list:
        numbers = replace(group, bias=1.2 + 0.3 * layer, delta=0.7 + 0.4 * step)
        return [scale, replace(weight, weight=weight.weight + 0.2 * step - 0.1 * layer), numbers, gain]

    with fr.apply(transformer, types.SimpleNamespace(modulations=lambda s: at(s.layer, s.step))) as handle:
        outs = [handle.set_step(step) or run(transformer, call) for step in (0, 1, 2, 0)]
        assert len(built) == 1
        assert handle._state.works.nbytes < 1.2 * next(iter(handle._state.works)).plans[0].nbytes
    for step, out in enumerate(outs[:3]):
        with contextlib.ExitStack() as stack:
            for n in range(LAYERS):
                attend = KONTEXT.attend(at(n, step))
                stack.enter_context(KONTEXT.by_formulas(transformer, attend, layers={n}))
            torch.testing.assert_close(out, run(transformer, call), rtol=1e-9, atol=1e-9)
    assert torch.equal(outs[3], outs[0])
    stock = run(transformer, call)
    values = {0: (1.2, 1.0), 1: (1.0, 1.0), 2: (torch.tensor([1.0, 1.2]), 1.0)}
    numbers = types.SimpleNamespace(modulations=lambda s: [fr.BiasDelta(*values[s.step], keys=LAYOUT.reference(0))])
    with fr.apply(transformer, numbers) as handle:
        outs = [handle.set_step(step) or run(transformer, call) for step in range(3)]
    assert torch.equal(outs[1], stock)
    assert_same(outs[2], torch.stack([stock[0], outs[0][1]]))


@pytest.mark.parametrize(
    "made",
    [lambda keys: fr.BiasDelta(1.2, 0.7, keys), lambda keys: fr.BandWeight(torch.linspace(0.3, 2, DIM // 2), keys)],
)
def test_other_keys_make_another_plan(transformer, made):
    call = kontext_call()
    first, other = made(LAYOUT.reference(0)), made(LAYOUT.text)
    with fr.apply(transformer, types.SimpleNamespace(modulations=lambda s: [first if s.layer < 2 else other])):
        out = run(transformer, call)
    with (
        KONTEXT.by_formulas(transformer, KONTEXT.attend([first]), layers={0, 1}),
        KONTEXT.by_formulas(transformer, KONTEXT.attend([other]), layers={2, 3}),
    ):
        torch.testing.assert_close(out, run(transformer, call), rtol=1e-9, atol=1e-9)


def test_works_kept_are_bounded(transformer, monkeypatch):
    monkeypatch.setattr(works, "KNOWN_WORKS", 5)
    method = types.SimpleNamespace(
        modulations=lambda s: [fr.BiasDelta(1.1 + s.layer + 10 * s.step, keys=LAYOUT.reference(0))]
    )
    with fr.apply(transformer, method) as handle:
        for step in range(4):
            handle.set_step(step)
            run(transformer, kontext_call())
            assert len(handle._state.works) <= 5


def test_the_hosts_own_embedding_decides(transformer, monkeypatch):
    """Another theta is read off the model; an embedding that is not diffusers' own is refused."""
    call = kontext_call()
    barely = fr.BiasDelta(1.0, 1 + 1e-9, keys=slice(0, 4))
    transformer.pos_embed.theta = 20
    stock = run(transformer, call)
    with fr.apply(transformer, barely):
        torch.testing.assert_close(run(transformer, call), stock, rtol=1e-6, atol=1e-6)
    own = type(transformer.pos_embed).forward
    monkeypatch.setattr(transformer.pos_embed, "forward", lambda ids: own(transformer.pos_embed, ids / 2))
    with fr.apply(transformer, barely), pytest.raises(NotImplementedError, match="rotary embedding"):
        run(transformer, call)


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [(3, 5), (1, 4), (4, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("references", [[], [(3, 5)], [(1, 1)], [(2, 7), (2, 7)]])
def test_layouts_are_read_off_the_ids(transformer, target, references):
    layout = fr.TokenLayout(TEXT, target, references)
    method = Recorder()
    with fr.apply(transformer, method):
        run(transformer, kontext_call(layout, batch=1))
    assert {s.tokens for s in method.sites} == {layout}


def test_references_of_one_frame_are_told_apart(transformer):
    """Kontext gives every reference frame 1 when several are joined."""
    layout = fr.TokenLayout(TEXT, TARGET, [(2, 3), (4, 3)])
    call = kontext_call(layout, batch=1)
    call["img_ids"][:, 0].clamp_(max=1)
    method = Recorder()
    with fr.apply(transformer, method):
        run(transformer, call)
    assert {s.tokens for s in method.sites} == {layout}


@pytest.mark.parametrize("spoil", [lambda ids: ids.flip(0), lambda ids: (ids + 254).bfloat16().double()])
def test_ids_that_are_no_grids_are_refused_only_by_who_needs_the_layout(transformer, spoil):
    call = kontext_call()
    call["img_ids"] = spoil(call["img_ids"])
    with fr.apply(transformer, Recorder()), pytest.raises(ValueError, match=r"^img_ids: expected raster grids"):
        run(transformer, call)
    mods = all_four()
    with fr.apply(transformer, mods):
        out = run(transformer, call)
    assert_same(out, kontext_by_formulas(transformer, call, mods))
