"""Which step a call belongs to: from the pipeline, from the timestep, or told."""

from __future__ import annotations

import types
import warnings
import weakref

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers import FluxKontextPipeline, FluxPipeline
from diffusers_hosts import KONTEXT, LAYERS, LAYOUT, TINY_HOSTS, Recorder, assert_differ, kontext_call
from tiny_pipelines import flux_generate, flux_pipeline, kontext_generate, kontext_pipeline, scheduler
from tiny_transformers import TEXT, run

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
    """The handle's pipeline is not the one that runs; the scheduler is its own."""
    pipe = build_pipeline(flux_pipeline, dtype, shift)
    other = FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    method = Recorder()
    with fr.apply(pipe, method):
        generate(other, steps=16, batch=1)
    assert [s.step for s in method.sites[::LAYERS]] == list(range(16))
    assert method.sites[0].num_steps == 16


def sibling_of(pipe):
    """Another pipeline around the same transformer, with a scheduler of its own."""
    other = FluxPipeline(**{**pipe.components, "scheduler": scheduler()})
    other.set_progress_bar_config(disable=True)
    return other


def steps_of(method) -> list[tuple[int, int]]:
    """Steps and their number, call by call; forgets them."""
    found = [(site.step, site.num_steps) for site in method.sites[::LAYERS]]
    method.sites.clear()
    return found


@pytest.mark.parametrize("through", [lambda pipe: pipe, lambda pipe: pipe.transformer], ids=["pipeline", "transformer"])
def test_a_pipeline_with_a_scheduler_of_its_own_gets_its_own_steps(through):
    """Whatever the handle was made for, before and after another pipeline's run, also one that broke off."""
    pipe = build_pipeline(flux_pipeline)
    other, method = sibling_of(pipe), Recorder()

    def stop(pipe, step, timestep, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return tensors

    with fr.apply(through(pipe), method), warnings.catch_warnings():
        warnings.simplefilter("error")
        for broken in (False, True):
            generate(other, steps=8)
            assert steps_of(method) == [(n, 8) for n in range(8)]
            if broken:
                with pytest.raises(KeyboardInterrupt):
                    generate(pipe, steps=4, callback_on_step_end=stop)
                assert steps_of(method) == [(0, 4), (1, 4)]
            else:
                generate(pipe, steps=4)
                assert steps_of(method) == [(n, 4) for n in range(4)]
        generate(other, steps=6)
        assert steps_of(method) == [(n, 6) for n in range(6)]


def test_a_run_that_broke_off_leaves_no_step_behind(transformer):
    """A call by hand after it goes by its timestep, and is told of where that says nothing."""
    pipe = flux_pipeline(transformer.float())
    method, layout = Recorder(), TINY_HOSTS["flux"].layout

    def stop(*_):
        raise RuntimeError("stop")

    with fr.apply(pipe, method):
        with pytest.raises(RuntimeError, match=r"^stop$"):
            generate(pipe, steps=4, callback_on_step_end=stop)
        method.sites.clear()
        call = TINY_HOSTS["flux"].call(layout, 2, torch.float32)
        call["timestep"] = (pipe.scheduler.timesteps[2:3] / 1000).expand(2)
        run(transformer, call)
        assert steps_of(method) == [(2, 4)]
        call["timestep"] = call["timestep"] - 0.05
        with pytest.warns(UserWarning, match=r"^fastrope: the denoising step is unknown"):
            run(transformer, call)
        assert steps_of(method) == [(0, 28)]


def test_looking_for_the_pipeline_keeps_nothing_of_it(monkeypatch):
    """Neither tensors that its call is done with, nor what it keeps in its own locals()."""
    from fastrope.bindings.diffusers.steps import running_pipeline

    model, seen = torch.nn.Identity(), []

    class Pipeline:
        transformer, scheduler = model, None

        def __call__(self, keep: bool):
            tensor = torch.ones(3)
            held, mine = weakref.ref(tensor), locals() if keep else None
            seen.append(running_pipeline(model))
            if keep:
                assert mine["tensor"] is tensor
            else:
                del tensor
                assert held() is None

    pipe = Pipeline()
    pipe(False)
    pipe(True)
    assert seen == [pipe, pipe]
    assert running_pipeline(model) is None


def test_the_step_inside_the_loop_is_read_without_touching_a_tensor():
    from fastrope.bindings.diffusers.steps import find_step

    def in_thousands(timesteps):
        return timesteps / 1000

    scheduler = types.SimpleNamespace(timesteps=torch.empty(9, device="meta"), step_index=None, begin_index=0)
    assert find_step(scheduler, torch.empty(2, device="meta"), in_thousands, True)[:2] == (0, 9)
    scheduler.step_index = 4
    assert find_step(scheduler, torch.empty(2, device="meta"), in_thousands, True)[:2] == (4, 9)
    assert find_step(None, torch.ones(2), in_thousands, True) is None


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
        with pytest.warns(UserWarning, match=r"^fastrope: the denoising step is unknown"):
            run(transformer, kontext_call())
        handle.set_step(7, 10)
        run(transformer, kontext_call())
        handle.set_step(None)
        run(transformer, kontext_call())
        with pytest.raises(ValueError, match=r"^step: expected"):
            handle.set_step(10, 10)
    assert [(s.step, s.num_steps) for s in method.sites[::LAYERS]] == [(0, 28), (7, 10), (0, 28)]
