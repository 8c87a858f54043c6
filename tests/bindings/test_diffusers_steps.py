"""Which step a call belongs to: from the pipeline, from the timestep, or told."""

from __future__ import annotations

import types

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers import FluxKontextPipeline, FluxPipeline
from diffusers_hosts import (
    KONTEXT,
    LAYERS,
    LAYOUT,
    TEXT,
    TINY_HOSTS,
    Recorder,
    assert_differ,
    flux_generate,
    flux_pipeline,
    kontext_call,
    kontext_generate,
    kontext_pipeline,
    run,
    scheduler,
)

# ---- pipelines -------------------------------------------------------------------------------------------------------


def build_pipeline(build=kontext_pipeline, dtype=torch.float32, scheduler_shift: float = 3.0):
    pipe = build()
    pipe.scheduler = scheduler(scheduler_shift)
    return pipe.to(dtype)


def generate(pipe, steps: int = 3, batch: int = 2, negative: bool = False, **arguments):
    """An image of 3 x 5 tokens, from a reference of 2 x 3 tokens where the pipeline takes one."""
    make = kontext_generate if isinstance(pipe, FluxKontextPipeline) else flux_generate
    return make(pipe, steps, batch, (TEXT, TEXT if negative else None), **arguments)


@pytest.mark.parametrize("kind", [flux_pipeline, kontext_pipeline])
def test_pipeline_runs_modulated_and_comes_back(kind):
    pipe = build_pipeline(kind)
    layout = LAYOUT if kind is kontext_pipeline else TINY_HOSTS["flux"].layout
    keys = layout.references if layout.reference_grids else layout.text
    method = Recorder([fr.BiasDelta(1.0, 3.0, keys=keys)])
    stock = generate(pipe)
    with fr.apply(pipe, method):
        out = generate(pipe)
    assert {site.tokens for site in method.sites} == {layout}
    assert_differ(out, stock)
    assert torch.equal(generate(pipe), stock)


def test_sites_of_a_run():
    pipe = build_pipeline()
    method = Recorder()
    with fr.apply(pipe, method):
        generate(pipe, steps=3, negative=True)
    # Four layers, twice a step: the negative prompt is another call, not another step.
    assert [s.step for s in method.sites] == [0] * 8 + [1] * 8 + [2] * 8
    assert [s.layer for s in method.sites] == [0, 1, 2, 3] * 6
    assert {(s.num_steps, s.axes_dim, s.spatial_axes) for s in method.sites} == {(3, KONTEXT.axes, (1, 2))}
    assert method.sites[-1].progress == 1.0


def test_steps_do_not_depend_on_the_dtype_or_on_earlier_runs():
    """More steps than bfloat16 tells timesteps apart, after a run that was cut short."""
    pipe = build_pipeline(flux_pipeline, torch.bfloat16, scheduler_shift=100.0)
    method = Recorder()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    with fr.apply(pipe, method):
        generate(pipe, steps=5, batch=1, callback_on_step_end=stop)
        assert [s.step for s in method.sites[::LAYERS]] == [0, 1]
        method.sites.clear()
        generate(pipe, steps=16, batch=1)
    assert len(set(pipe.scheduler.timesteps.to(torch.bfloat16).tolist())) < 16
    assert [s.step for s in method.sites[::LAYERS]] == list(range(16))


@pytest.mark.parametrize(("dtype", "shift"), [(torch.float32, 3.0), (torch.bfloat16, 100.0)])
def test_a_pipeline_that_shares_the_transformer_gets_the_right_steps(dtype, shift):
    """The handle's pipeline is not the one that runs: steps come from the timestep's value."""
    pipe = build_pipeline(flux_pipeline, dtype, shift)
    other = FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    method = Recorder()
    with fr.apply(pipe, method):
        generate(other, steps=16, batch=1)
    assert [s.step for s in method.sites[::LAYERS]] == list(range(16))
    assert method.sites[0].num_steps == 16


@pytest.mark.parametrize("ran", [False, True])
def test_a_pipeline_with_a_scheduler_of_its_own_is_not_taken_for_the_handles(ran):
    """Timesteps of another run tell nothing, even where some are equal: untold, methods see step 0, with a warning."""
    pipe = build_pipeline(flux_pipeline)
    other = FluxPipeline(**{**pipe.components, "scheduler": scheduler()})
    other.set_progress_bar_config(disable=True)
    method = Recorder()
    with fr.apply(pipe, method):
        if ran:
            generate(pipe, steps=4)
            assert [s.step for s in method.sites[::LAYERS]] == [0, 1, 2, 3]
            method.sites.clear()
        with pytest.warns(UserWarning, match=r"^fastrope: nothing tells the denoising step"):
            generate(other, steps=8)
    assert {(s.step, s.num_steps) for s in method.sites} == {(0, 28)}


def test_the_step_inside_the_loop_is_read_without_touching_a_tensor():
    from fastrope.bindings.diffusers.steps import find_step

    def in_thousands(timesteps):
        return timesteps / 1000

    scheduler = types.SimpleNamespace(timesteps=torch.empty(9, device="meta"), step_index=None, begin_index=0)
    pipe = types.SimpleNamespace(scheduler=scheduler, _current_timestep=1.0)
    assert find_step(pipe, torch.empty(2, device="meta"), in_thousands) == (0, 9)
    scheduler.step_index = 4
    assert find_step(pipe, torch.empty(2, device="meta"), in_thousands) == (4, 9)
    assert find_step(types.SimpleNamespace(scheduler=None), torch.ones(2), in_thousands) is None


def test_methods_active_at_some_steps_only():
    pipe = build_pipeline()
    mods = [fr.BiasDelta(1.0, 3.0, keys=LAYOUT.references)]
    stock = generate(pipe)
    outs = {}
    for name, when in (("never", lambda s: s.step > 2), ("last", lambda s: s.step == 2), ("all", lambda s: True)):
        with fr.apply(pipe, Recorder(mods, when)):
            outs[name] = generate(pipe)
    assert torch.equal(outs["never"], stock)
    assert_differ(outs["last"], stock)
    assert_differ(outs["last"], outs["all"])


def test_a_bare_transformer_is_told_its_step(transformer):
    method = Recorder()
    with fr.apply(transformer, method) as handle:
        with pytest.warns(UserWarning, match=r"^fastrope: nothing tells the denoising step"):
            run(transformer, kontext_call())
        handle.set_step(7, 10)
        run(transformer, kontext_call())
        handle.set_step(None)
        run(transformer, kontext_call())
        with pytest.raises(ValueError, match=r"^step: expected"):
            handle.set_step(10, 10)
    assert [(s.step, s.num_steps) for s in method.sites[::LAYERS]] == [(0, 28), (7, 10), (0, 28)]
