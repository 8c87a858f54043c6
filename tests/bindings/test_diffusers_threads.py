"""Threads that share one bound transformer: what each draws is what it draws alone, to the bit."""

from __future__ import annotations

import contextlib
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from overlapping import METHOD, by_layout, overlapping, two_calls
from untwisting_calls import CARRIED, DIALS, apply, call_of, source_of

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers import FluxKontextPipeline, FluxPipeline
from diffusers_hosts import TINY_HOSTS, assert_differ, grag_like
from tiny_pipelines import flux_prompts, kl_vae, kontext_generate, kontext_pipeline, quiet, scheduler
from tiny_transformers import TEXT, build_flux, run

from fastrope.bindings.diffusers import handle as binding


@pytest.mark.parametrize("how", ["op", "host", "compiled"])
def test_a_call_overtaken_by_another(how):
    model, (one, other) = build_flux().double(), two_calls()
    if how == "compiled":
        torch._dynamo.reset()
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with fr.apply(model, METHOD, rotation="host" if how == "host" else "op"):
        expected = run(model, one), run(model, other)
        found = overlapping(model.x_embedder, lambda: run(model, one), lambda: run(model, other))
    assert all(map(torch.equal, found, expected))
    assert_differ(expected[0], run(model, one))


@CARRIED
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_a_reference_beside_other_calls(carried, warm):
    """Shared by two targets in two threads, also where its cache is empty yet."""
    host = TINY_HOSTS["flux"]
    model, source = host.build().double(), source_of(host, call_of(host, 6, 1))
    calls = [call_of(host, text, rows) for text, rows in ((5, 2), (9, 1))]
    method = fr.UntwistingRoPE(**DIALS)
    with apply(model, carried, source, method):
        expected = [run(model, call) for call in calls]
    with apply(model, carried, source, method):
        if warm:
            run(model, calls[0])
            found = overlapping(model.x_embedder, lambda: run(model, calls[0]), lambda: run(model, calls[1]))
            assert all(map(torch.equal, found, expected))
        with yielding(model), ThreadPoolExecutor(2) as pool:
            several = [pool.submit(run, model, calls[n % 2]) for n in range(6)]
            assert all(torch.equal(each.result(), expected[n % 2]) for n, each in enumerate(several))


def test_a_record_of_overlapping_calls():
    model, (one, other) = build_flux().double(), two_calls()
    with fr.apply(model, METHOD) as handle:
        with handle.inspect(layers=[0, 3]) as expected:
            run(model, one)
            run(model, other)
        with handle.inspect(layers=[0, 3]) as record:
            overlapping(model.x_embedder, lambda: run(model, one), lambda: run(model, other))
    assert [look.call for look in record.looks] == [0, 0, 1, 1]
    assert record.looks == expected.looks


def test_methods_and_steps_of_one_thread_leave_the_others_calls():
    """Methods replaced and a step told during a call belong to the next one, and a step to the thread that told it."""
    model, (one, other) = build_flux().double(), two_calls()
    steps = []

    def modulations(site):
        steps.append((site.step, site.num_steps, site.layer))
        return by_layout(site)

    with fr.apply(model, METHOD) as handle:
        expected = run(model, one), run(model, other)

        def second():
            handle.update(types.SimpleNamespace(modulations=modulations))
            handle.set_step(3, 9)
            return run(model, other)

        def first():
            handle.set_step(1, 4)
            found = run(model, one)
            handle.set_step(2, 4)
            run(model, one)
            return found

        found = overlapping(model.x_embedder, first, second)
        assert all(map(torch.equal, found, expected))
        assert steps[::4] == [(3, 9, 0), (2, 4, 0)]
        run(model, one)
        assert steps[-1] == (3, 9, 3)


def test_removing_during_a_call_of_another_thread():
    """The handle goes when the call is over, which ends as it began; one that begins meanwhile finds nothing bound."""
    model, (one, other) = build_flux().double(), two_calls()
    stock = run(model, other)
    handle = fr.apply(model, METHOD)
    expected = run(model, one)
    with ThreadPoolExecutor(2) as pool:

        def remove():
            removed = pool.submit(handle.remove)
            time.sleep(0.1)
            late = pool.submit(run, model, other)
            time.sleep(0.1)
            assert handle.bound
            assert not late.done()
            return removed, late

        found, (removed, late) = overlapping(model.x_embedder, lambda: run(model, one), remove)
        removed.result(60)
        assert torch.equal(late.result(60), stock)
    assert torch.equal(found, expected)
    assert torch.equal(run(model, other), stock)


def test_removing_waits_for_calls_within_calls():
    """A call within the one that is waited for does not wait itself."""
    model, (one, other) = build_flux().double(), two_calls()
    handle = fr.apply(model, METHOD)
    expected, inner = run(model, other), []

    def within(*_):
        watch.remove()
        inner.append(run(model, other))

    watch = model.transformer_blocks[1].register_forward_pre_hook(within)
    with ThreadPoolExecutor(1) as pool:

        def remove():
            removed = pool.submit(handle.remove)
            time.sleep(0.1)
            return removed

        _, removed = overlapping(model.x_embedder, lambda: run(model, one), remove)
        removed.result(60)
    assert torch.equal(inner[0], expected)


def test_removing_within_a_call_is_refused():
    model, (one, _) = build_flux().double(), two_calls()
    with fr.apply(model, METHOD) as handle:
        expected = run(model, one)

        def remove(*_):
            with pytest.raises(ValueError, match=r"^handle: expected no running call of the transformer in this thr"):
                handle.remove()

        watch = model.transformer_blocks[1].register_forward_pre_hook(remove)
        assert torch.equal(run(model, one), expected)
        watch.remove()
        assert torch.equal(run(model, one), expected)


def test_other_threads_stacks_are_not_asked_for(monkeypatch):
    """Before Python 3.12 that collects garbage under a lock that the end of a ``threading.local`` waits for."""
    model, (one, _) = build_flux().double(), two_calls()
    monkeypatch.setattr(sys, "_current_frames", lambda: pytest.fail("asked"))
    with fr.apply(model, METHOD):
        run(model, one)


@pytest.mark.parametrize("how", ["op", "host"])
def test_binding_during_a_call_of_another_thread(how):
    """The call ends as it began."""
    model, (one, other) = build_flux().double(), two_calls()
    stock = run(model, one)
    with fr.apply(model, METHOD):
        expected = run(model, other)

    def bind():
        return fr.apply(model, METHOD, rotation=how), run(model, other)

    found, (handle, bound) = overlapping(model.x_embedder, lambda: run(model, one), bind)
    assert torch.equal(found, stock)
    assert torch.equal(bound, expected) or how == "host"
    assert_differ(run(model, one), stock)
    handle.remove()


def test_two_threads_bind_one_transformer(monkeypatch):
    """One does, the other is told that a handle is bound."""
    model = build_flux()
    before, make = model.attn_processors, binding.CallState

    def slow(*args):
        time.sleep(0.1)
        return make(*args)

    monkeypatch.setattr(binding, "CallState", slow)
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(fr.apply, model, METHOD) for _ in range(2)]
        failed = [each.exception(60) for each in found]
    (refusal,) = filter(None, failed)
    assert isinstance(refusal, ValueError)
    assert str(refusal).startswith("pipe: expected a transformer without a bound handle")
    next(each for each, error in zip(found, failed, strict=True) if error is None).result().remove()
    assert all(model.attn_processors[name] is p for name, p in before.items())


@contextlib.contextmanager
def yielding(model):
    """Every block lets the other threads run."""
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    watches = [block.register_forward_pre_hook(lambda *_: time.sleep(1e-4)) for block in blocks]
    yield
    for watch in watches:
        watch.remove()


def test_three_pipelines_of_one_transformer_draw_what_each_draws_alone():
    """Sizes, references, batches, numbers of steps and methods' answers differ; 100 calls."""
    kontext = kontext_pipeline()
    model = kontext.transformer
    parts = {**kontext.components, "vae": None}
    flux = [quiet(FluxPipeline(**{**parts, "scheduler": scheduler()})) for _ in range(2)]
    other = quiet(FluxKontextPipeline(**{**kontext.components, "scheduler": scheduler(), "vae": kl_vae()}))

    def draw(pipe, size, steps, batch):
        given = flux_prompts(batch, TEXT, None, torch.float32)
        noise = torch.Generator().manual_seed(2)
        return pipe(
            **given, **size, num_inference_steps=steps, output_type="latent", generator=noise, return_dict=False
        )[0]

    jobs = [
        lambda: draw(flux[0], dict(height=48, width=80), 2, 1),
        lambda: draw(flux[1], dict(height=80, width=48), 3, 2),
        lambda: kontext_generate(other, 2, 1),
    ]

    def modulations(site):
        return by_layout(site) if site.step else grag_like(site.tokens, delta=1.5)

    counts = 34, 33, 33
    with fr.apply(kontext, types.SimpleNamespace(modulations=modulations)):
        expected = [job() for job in jobs]
        with yielding(model), ThreadPoolExecutor(3) as pool:
            runs = [
                pool.submit(lambda job=job, count=count: [job() for _ in range(count)])
                for job, count in zip(jobs, counts, strict=True)
            ]
            found = [each.result() for each in runs]
    assert [len(each) for each in found] == list(counts)
    for each, alone in zip(found, expected, strict=True):
        assert all(torch.equal(out, alone) for out in each)
