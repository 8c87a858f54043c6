"""The binding for ComfyUI, against doubles of the host's classes: what is steered, what stays, who goes with whom."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import comfyui_doubles as host
import comfyui_oracle as oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastrope as fr
from fastrope.bindings.comfyui import calls
from fastrope.bindings.comfyui.models import family_of
from fastrope.bindings.comfyui.patching import steer, steering_of
from fastrope.bindings.comfyui.steps import Steps
from fastrope.methods import Linear, PerStep

REFERENCE = host.picture(4, 6, seed=5)
POSITIVE, NEGATIVE = (host.prompt(seed=n, references=[REFERENCE]) for n in (1, 3))
NEAR = dict(rtol=0, atol=5e-6)


def test_doubles_have_the_recorded_signatures():
    recorded = json.loads((Path(__file__).parent / "comfyui_interface.json").read_text())["signatures"]
    assert {name: host.signature(double) for name, double in host.DOUBLED.items()} == recorded


# ---- what is steered, and what stays --------------------------------------------------------------------------------


def test_grag_equals_an_independent_computation():
    model, method = host.tiny(), fr.GRAG(0.8, 1.5)
    seen = []

    def override(func, q, k, v, heads, **kwargs):
        rule = oracle.grag(0.8, 1.5)
        return (
            rule(q.double(), k.double(), v.double(), kwargs["transformer_options"], None)
            .transpose(1, 2)
            .flatten(2)
            .float()
        )

    expected = model.clone()
    expected.model_options["transformer_options"]["optimized_attention_override"] = override
    steered = steer(model, method)
    steered.set_model_attn1_patch(lambda q, k, v, pe, **_: seen.append(pe is not None) or {})
    found = host.sample(steered, POSITIVE, NEGATIVE)
    torch.testing.assert_close(found, host.sample(expected, POSITIVE, NEGATIVE), **NEAR)
    assert not torch.allclose(found, host.sample(model, POSITIVE, NEGATIVE), rtol=0, atol=1e-3)
    assert seen == [True] * 12  # a patch of others comes first, and sees the host's rotation


@pytest.mark.parametrize(
    "method",
    [fr.GRAG(1.0, 1.0), fr.GRAG(delta=2.0, steps=[7]), fr.At(fr.GRAG(delta=2.0), steps=[7])],
    ids=["neutral", "inactive", "confined"],
)
def test_where_nothing_acts_the_bits_and_the_options_are_the_hosts(method, monkeypatch):
    opened = []
    monkeypatch.setattr(calls.ModelCall, "options", lambda self, given: opened.append(given) or given)
    model = host.tiny()
    assert torch.equal(host.sample(steer(model, method), POSITIVE), host.sample(model, POSITIVE))
    assert not opened


def test_a_schedule_makes_no_plan_for_every_step(monkeypatch):
    """Numbers change; the tables of the plan stay."""
    made, plan = [], fr.plan
    monkeypatch.setattr(fr, "plan", lambda **given: made.append(given) or plan(**given))
    steered = steer(host.tiny(), fr.GRAG(delta=Linear(1.2, 1.8)))
    found = host.sample(steered, POSITIVE)
    assert len(made) == 1
    steps = [steer(host.tiny(), fr.GRAG(delta=PerStep([1.2, 1.5, 1.8]))), steer(host.tiny(), fr.GRAG(delta=1.2))]
    assert torch.equal(host.sample(steps[0], POSITIVE), found)
    assert not torch.equal(host.sample(steps[1], POSITIVE), found)


def test_clones_share_no_methods():
    model = host.tiny()
    before = host.sample(model, POSITIVE)
    first = steer(model, fr.GRAG(delta=1.5))
    second, third = steer(first, fr.GRAG(1.0, 1.0, 1.2)), steer(first, fr.GRAG(1.0, 1.0, 0.7))
    assert [len(steering_of(m).bound) for m in (model, first, second, third)] == [0, 1, 2, 2]
    outs = [host.sample(m, POSITIVE) for m in (first, second, third)]
    assert torch.equal(before, host.sample(model, POSITIVE))
    assert torch.equal(outs[0], host.sample(first, POSITIVE))
    assert not any(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(outs, [*outs[1:], before], strict=True))


def test_two_branches_in_one_batch_equal_two_calls():
    steered = steer(host.tiny(), fr.GRAG(0.8, 1.5))
    wide = host.picture(batch=2, seed=6)
    together = host.sample(steered, POSITIVE, NEGATIVE, x=wide)
    rows = [host.sample(steered, POSITIVE, NEGATIVE, x=x[None]) for x in wide]
    torch.testing.assert_close(together, torch.cat(rows), **NEAR)


def test_a_run_leaves_no_tensors_behind():
    steered = steer(host.tiny(), fr.GRAG(delta=1.5))
    host.sample(steered, POSITIVE)
    steering = steering_of(steered)
    assert not any((steering._works, steering._positions, steering._requests))


# ---- stacking -------------------------------------------------------------------------------------------------------


def foreign(model, wraps: bool = True):
    """A clone with another node's override, which lets more or less of the host's attention through."""
    clone, options = model.clone(), None
    options = clone.model_options["transformer_options"]
    before = options.get("optimized_attention_override")

    def louder(func, *args, **kwargs):
        out = func(*args, **kwargs) if before is None else before(func, *args, **kwargs)
        return 1.5 * out

    def another(func, q, k, v, heads, **kwargs):
        return host.optimized_attention(q, k, v, heads, **{**kwargs, "_inside_attn_wrapper": True})

    options["optimized_attention_override"] = louder if wraps else another
    return clone


def test_two_nodes_and_a_foreign_override_in_any_order():
    keep, text = fr.GRAG(0.9, 1.4), fr.GRAG(1.0, 1.0, 1.2, 0.8)
    nodes = (lambda m: steer(m, keep), lambda m: steer(m, text), foreign)
    found = []
    for order in [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)]:
        model = host.tiny()
        for n in order:
            model = nodes[n](model)
        found.append(host.sample(model, POSITIVE, NEGATIVE))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)
    for fewer in (steer(steer(host.tiny(), keep), text), steer(foreign(host.tiny()), keep)):
        assert not torch.allclose(host.sample(fewer, POSITIVE, NEGATIVE), found[0], rtol=0, atol=1e-4)


def test_an_override_with_attention_of_its_own_is_given_steered_keys(monkeypatch, caplog):
    """A kernel switch: it never asks the host's attention, and computes that of the steered layers, too."""
    monkeypatch.setattr(calls, "_IGNORING", set())
    method, counts = fr.GRAG(0.8, 1.5), []
    another = foreign(host.tiny(), wraps=False)
    switch = another.model_options["transformer_options"]["optimized_attention_override"]

    def counted(func, q, k, v, heads, **kwargs):
        counts.append(q.shape[2])
        return switch(func, q, k, v, heads, **kwargs)

    another.model_options["transformer_options"]["optimized_attention_override"] = counted
    alone, stacked = (host.sample(steer(m, method), POSITIVE) for m in (host.tiny(), another))
    torch.testing.assert_close(stacked, alone, **NEAR)
    assert counts == [35] * (3 * 4 + 1)  # once more, to find out
    assert caplog.text.count("computes attention of its own") == 1


def test_what_folds_runs_on_the_hosts_own_attention(monkeypatch):
    """So a kernel that the user chose for all of ComfyUI is used in steered layers as well."""
    shapes, plain = [], host.F.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        shapes.append((q.shape[2], k.shape[2]))
        return plain(q, k, v, **kwargs)

    monkeypatch.setattr(host.F, "scaled_dot_product_attention", spy)
    host.sample(steer(host.tiny(), fr.GRAG(0.8, 1.5)), POSITIVE, steps=1)
    assert shapes == [(35, 35)] * 4


def test_attention_past_the_override_is_refused():
    steered = steer(host.tiny(), fr.GRAG(delta=1.5))
    steered.add_wrapper_with_key("apply_model", "rude", _without_override)
    with pytest.raises(NotImplementedError, match="past the host's override"):
        host.sample(steered, POSITIVE)


def _without_override(executor, *args, **kwargs):
    options = {**args[5]}
    options.pop("optimized_attention_override", None)
    return executor(*args[:5], options, **kwargs)


def test_positions_of_another_node_leave_the_rotation_to_the_host():
    model = host.tiny()
    model.model.diffusion_model.pe_embedder = type("Dynamic", (host.EmbedND,), {})(16, 500, [4, 6, 6])
    steered = steer(model, fr.GRAG(0.8, 1.5))
    moved = host.tiny()
    moved.model.diffusion_model.pe_embedder.theta = 500
    torch.testing.assert_close(
        host.sample(steered, POSITIVE), host.sample(steer(moved, fr.GRAG(0.8, 1.5)), POSITIVE), **NEAR
    )
    loose = fr.LooseRoPE(torch.rand(4, 6), torch.ones(4, 6))
    with pytest.raises(NotImplementedError, match="positions: expected the host's own"):
        host.sample(steer(model, loose), POSITIVE)


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_steps_are_those_of_the_samplers_noise_levels():
    levels = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])

    def find(sigma):
        return Steps().find({"sigmas": torch.tensor([sigma] * 2), "sample_sigmas": levels})[:2]

    assert [find(s) for s in (1.0, 0.8, 0.5, 0.2)] == [(n, 4) for n in range(4)]
    assert [find(s) for s in (0.9, 0.79, 0.51, 0.01)] == [(0, 4), (1, 4), (1, 4), (3, 4)]
    assert find(0.8 * (1 - 5e-5)) == (1, 4)
    assert find(1.3) == (0, 4)


def test_without_noise_levels_a_warning_is_logged_once(caplog):
    steps = Steps()
    assert [steps.find({"sigmas": torch.tensor([0.5])}) for _ in range(2)] == [(0, 1, 0.5)] * 2
    assert caplog.text.count("step 0 of 1") == 1


def test_a_sampler_that_asks_between_two_levels_is_in_one_step():
    model = host.tiny()
    first = steer(model, fr.GRAG(delta=1.5, steps=[0]))
    found, stock = (host.sample(m, POSITIVE, steps=2, midway=True) for m in (first, model))
    assert not torch.allclose(found, stock, rtol=0, atol=1e-4)
    late = steer(model, fr.GRAG(delta=1.5, steps=[2]))
    assert torch.equal(host.sample(late, POSITIVE, steps=2, midway=True), stock)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_other_models_are_refused_by_name():
    model = host.tiny(model=type("HunyuanVideo", (host.BaseModel,), {}))
    with pytest.raises(NotImplementedError, match=r"Flux\.1.*Qwen-Image.*Z-Image.*Krea 2.*received HunyuanVideo"):
        steer(model, fr.GRAG())
    assert family_of(host.tiny().model)[0].transformer == "Flux"


def test_a_reference_that_is_missing_is_told_with_what_to_do():
    steered = steer(host.tiny(), fr.GRAG(delta=1.5), refers=True)
    with pytest.raises(ValueError, match="at least one reference picture.*ReferenceLatent"):
        host.sample(steered, host.prompt())


def test_the_negative_prompt_may_go_without_a_reference():
    steered, plain = steer(host.tiny(), fr.GRAG(delta=1.5), refers=True), host.prompt(seed=3)
    found = host.sample(steered, POSITIVE, plain)
    assert not torch.allclose(found, host.sample(host.tiny(), POSITIVE, plain), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="reference picture"):
        host.sample(steer(host.tiny(), fr.GRAG(delta=1.5)), POSITIVE, plain)


def test_masks_and_other_tokens_are_refused():
    masked = steer(host.tiny(), fr.GRAG(delta=1.5))
    masked.set_model_attn1_patch(lambda q, k, v, **_: {"attn_mask": torch.zeros(1, 1, q.shape[2], k.shape[2])})
    with pytest.raises(NotImplementedError, match="attention mask"):
        host.sample(masked, POSITIVE)
    longer = steer(host.tiny(), fr.GRAG(delta=1.5))
    longer.set_model_attn1_patch(
        lambda q, k, v, **_: {"k": torch.cat([k, k], 2), "v": torch.cat([v, v], 2), "pe": None}
    )
    with pytest.raises(NotImplementedError, match="tokens: expected 35 .*Flux KV Cache"):
        host.sample(longer, POSITIVE)


# ---- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ntk", "yarn", "dype"])
def test_rescaled_positions_are_the_hosts_for_every_layer(kind):
    """Equal to a host whose own embedding turns by the rescaled angles, alone and beside a method."""
    method = fr.HighResolution(kind, trained=(2, 3))
    site = fr.Site(fr.TokenLayout(5, (4, 6), [(2, 3)]), axes_dim=(4, 6, 6), theta=10000.0)

    class Embedding(host.EmbedND):
        def forward(self, ids):
            sigma = self.sigmas.pop(0)
            found = method.rescaling(replace(site, sigma=sigma))
            factor, gain = (torch.tensor(x, dtype=torch.float64) for x in (found.factor, found.gain))
            phi = factor * oracle.angles(ids[0].double(), self.axes_dim, self.theta)
            rows = torch.stack([phi.cos(), -phi.sin(), phi.sin(), phi.cos()], dim=-1).unflatten(-1, (2, 2))
            return (gain[:, None, None] * rows).float()[None, None]

    moved = host.tiny()
    moved.model.diffusion_model.pe_embedder.__class__ = Embedding
    moved.model.diffusion_model.pe_embedder.sigmas = [1.0, 2 / 3, 1 / 3] * 2
    for beside in ((), (fr.GRAG(0.8, 1.5),)):
        steered, expected = steer(host.tiny(), method), moved
        for each in beside:
            steered, expected = steer(steered, each), oracle_of(expected)
        found = host.sample(steered, POSITIVE)
        torch.testing.assert_close(found, host.sample(expected, POSITIVE), rtol=0, atol=2e-5)
        assert not torch.allclose(found, host.sample(host.tiny(), POSITIVE), rtol=0, atol=1e-3)
    within = steer(host.tiny(), fr.HighResolution(kind, trained=(64, 64)))
    assert torch.equal(host.sample(within, POSITIVE), host.sample(host.tiny(), POSITIVE))


def oracle_of(model):
    def override(func, q, k, v, heads, **kwargs):
        out = oracle.grag(0.8, 1.5)(q.double(), k.double(), v.double(), kwargs["transformer_options"], None)
        return out.transpose(1, 2).flatten(2).float()

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


# ---- costs ----------------------------------------------------------------------------------------------------------


def test_no_matrix_of_queries_by_keys():
    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                self.largest = max(self.largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    wide, grid = host.picture(64, 64), (32, 32)
    positive = host.prompt(references=[host.picture(64, 64, seed=7)])
    left = (torch.arange(32) < 16).float().expand(grid)
    regions = fr.Regions([fr.Region(left, slice(0, 2), [0]), fr.Region(1 - left, slice(2, 4))], local=True)
    loose = fr.LooseRoPE(torch.rand(grid), torch.ones(grid), levels=3)
    methods = fr.GRAG(0.9, 1.4), loose, regions, fr.NAG(negative=2)
    model = host.tiny(heads=1)
    for method in methods:
        with Largest() as watched:
            host.sample(steer(model, method), positive, steps=1, x=wide)
        assert 0 < watched.largest < 2053**2 / 8


def test_an_inactive_step_costs_less_than_three_microseconds_per_attention_call():
    """The whole of what a call of a 57-layer model pays, over its layers."""
    model = host.tiny()
    for name, count in (("double_blocks", 19), ("single_blocks", 38)):
        setattr(model.model.diffusion_model, name, torch.nn.ModuleList(torch.nn.Identity() for _ in range(count)))
    steering = steering_of(steer(model, fr.GRAG(delta=1.5, steps=(0.9, 1.0))))
    sigmas = torch.linspace(1, 0, 1001)
    given = dict(x=host.picture(128, 128), t=None, **POSITIVE)

    def host_time(first: int, count: int = 100) -> float:
        options = [{"sigmas": sigmas[n : n + 1], "sample_sigmas": sigmas} for n in range(first, first + count)]
        start = time.thread_time()
        for each in options:
            assert steering.prepare(model.model, {**given, "transformer_options": each}).idle
        return (time.thread_time() - start) / count

    host_time(0, 5)
    best = min(host_time(n) for n in (5, 105, 205, 305))  # every step is a new one
    print(f"{best * 1e6:.0f} us a call, {best / 57 * 1e6:.2f} us an attention call")
    assert best / 57 < 3e-6
