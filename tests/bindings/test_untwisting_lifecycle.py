"""A shared reference beside what else happens to a model: other runs, LoRAs, offload, errors; and what stays behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from shared_paths import FLUX, path_of, small
from untwisting_calls import CARRIED, DIALS, apply, call_of, source_of
from untwisting_runs import GENERATE, to_float

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS, assert_differ, assert_same
from tiny_transformers import TEXT, run

from fastrope.bindings.diffusers import JointSequence
from fastrope.bindings.image.extended import target_work
from fastrope.bindings.image.layers import BatchedWork, ReferenceWork, SharedWork
from fastrope.bindings.image.requests import LayerRequest
from fastrope.sharing import Sharing

# ---- what is kept is never stale -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "z-image"])
def test_one_cache_through_all_kinds_of_runs(name):
    """Steps, schedule, guidance, batch, branches, size and seed change from run to run; each is that of a new cache."""
    host = TINY_HOSTS[name]
    pipe, path, generate = host.pipeline(), path_of(host), GENERATE.get(name, host.generate)
    cache = fr.ReferenceCache(path)
    positive, negative = host.lengths
    pixels = 2 if name in ("flux2", "qwen") else 16
    wide = {"height": pixels * 2, "width": pixels * 7}
    runs = [
        dict(steps=2, batch=1, lengths=(positive, None)),
        dict(steps=3, batch=1, lengths=(positive, None)),
        dict(steps=3, batch=2, lengths=(positive + 4, negative)),
        dict(steps=3, batch=1, lengths=(positive, None), shift=1.0),
        dict(steps=2, batch=1, lengths=(positive, None), size=wide),
        dict(steps=2, batch=1, lengths=(positive, None)),
    ]
    if name == "flux":
        runs[2]["lengths"] = (positive, positive)  # its pipeline wants embeddings of one length
    drawn = []
    for given in runs:
        pipe.scheduler.set_shift(given.pop("shift", 3.0))
        found = []
        for reference in (cache, fr.ReferenceCache(path)):
            with fr.apply(pipe, fr.UntwistingRoPE(**DIALS), reference=reference):
                found.append(of_size(pipe, generate, **given))
        assert torch.equal(found[0], found[1])
        drawn.append(found[0])
    assert torch.equal(drawn[0], drawn[-1])
    assert len(cache) == 6  # the first step, pure noise in all; one more of 2 steps, two of 3, two of another shift


def of_size(pipe, generate, steps, batch, lengths, size=None):
    """A run; ``size`` overrides the height and width that the tiny hosts ask for."""
    kind = type(pipe)
    if size is None:
        return generate(pipe, steps, batch, lengths)

    class Sized(kind):
        def __call__(self, *given, **arguments):
            return super().__call__(*given, **arguments | size)

    pipe.__class__ = Sized
    try:
        return generate(pipe, steps, batch, lengths)
    finally:
        pipe.__class__ = kind


def test_a_lora_that_comes_changes_and_goes():
    """What was kept without an adapter, or at another strength, is not used with it."""
    peft = pytest.importorskip("peft")
    model, call, source = small()
    cache = fr.ReferenceCache(source)
    targets = ["to_q", "to_k", "to_v", "add_k_proj"]

    def same_as_a_new_cache(handle, steps: int) -> torch.Tensor:
        found = run(model, call)
        handle.remove()
        with fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=fr.ReferenceCache(source)):
            assert torch.equal(run(model, call), found)
        assert len(cache) == steps
        return found

    def bound():
        return fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=cache)

    bare = same_as_a_new_cache(bound(), 1)
    for name in ("ink", "oil"):
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
        model.add_adapter(config, adapter_name=name)
    model.double()
    model.set_adapter("ink")
    ink = same_as_a_new_cache(bound(), 2)
    model.set_adapters(["ink"], weights=[0.25])
    weak = same_as_a_new_cache(bound(), 3)
    model.set_adapters(["ink", "oil"], weights=[0.25, 1.0])
    both = same_as_a_new_cache(bound(), 4)
    for one, other in ((bare, ink), (ink, weak), (weak, both)):
        assert_differ(one, other)
    model.set_adapters(["ink"], weights=[1.0])
    assert torch.equal(same_as_a_new_cache(bound(), 4), ink)
    model.disable_adapters()
    assert torch.equal(same_as_a_new_cache(bound(), 4), bare)  # as before there were any
    model.enable_adapters()
    model.delete_adapters("ink")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    model.add_adapter(config, adapter_name="ink")
    model.double()
    model.set_adapters(["ink"], weights=[1.0])
    assert_differ(same_as_a_new_cache(bound(), 5), ink)  # another one of the same name


def test_a_lora_that_is_unloaded_is_freed():
    """Also while a handle is bound that kept something with it."""
    peft = pytest.importorskip("peft")
    model, call, source = small()
    with fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=fr.ReferenceCache(source)):
        bare = run(model, call)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        model.double()
        assert_differ(run(model, call), bare)
        held = [weakref.ref(x) for name, x in model.named_parameters() if "lora" in name]
        model.unload_lora()
        gc.collect()
        assert len(held) == 16
        assert not any(ref() is not None for ref in held)
        assert torch.equal(run(model, call), bare)


def test_a_lora_that_takes_the_place_of_another():
    """Of the very same configuration, with no run between; whoever holds the old layers does not revive them."""
    peft = pytest.importorskip("peft")
    model, call, source = small()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    model.add_adapter(config)
    model.double()
    with fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=fr.ReferenceCache(source)):
        first, held = run(model, call), list(model.modules())
        model.unload_lora()
        model.add_adapter(config)
        model.double()
        found = run(model, call)
    assert len(held) > 16
    assert_differ(found, first)
    with fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=fr.ReferenceCache(source)):
        assert torch.equal(run(model, call), found)


@CARRIED
def test_guidance_is_the_targets_unless_the_reference_has_its_own(carried):
    """FLUX.2's model is told its guidance; what is kept for one number is not used for another."""
    host = TINY_HOSTS["flux2"]
    model, call, source = host.build().double(), call_of(host, 5, 2), source_of(host, call_of(host, 6, 1))
    own = fr.Reference(source.latents, {**source.arguments, "guidance": torch.tensor([9.0]).double()})
    for given, counts in ((source, (1, 2, 2)), (own, (1, 1, 1))):
        cache, found, fresh = fr.ReferenceCache(given), [], []
        for strength, count in zip((2.5, 6.0, 2.5), counts, strict=True):
            told = call | {"guidance": torch.full((2,), strength).double()}
            for reference, outputs in (
                (cache, found),
                (given if carried == "batched" else fr.ReferenceCache(given), fresh),
            ):
                with fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=reference):
                    outputs.append(run(model, told))
            assert len(cache) == count
            assert_same(found[-1], fresh[-1], 1e-10)
        assert_differ(found[1], found[0])
        assert torch.equal(found[2], found[0])


def test_autocast_is_part_of_what_is_kept():
    model, call, source = small()
    model, call = model.float(), {key: to_float(value) for key, value in call.items()}
    given = {key: to_float(value) for key, value in source.arguments.items()}
    latents = source.latents(0, 0.0).float()
    source = fr.Reference(lambda step, sigma: latents, given)
    cache, found = fr.ReferenceCache(source), []
    for reference in (cache, cache, fr.ReferenceCache(source)):
        with fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=reference):
            with torch.autocast("cpu", torch.bfloat16):
                found.append(run(model, call))
            found.append(run(model, call))
    assert_differ(found[0], found[1])
    assert torch.equal(found[0], found[4])
    assert torch.equal(found[1], found[5])
    assert len(cache) == 2


def test_another_dtype_is_kept_apart():
    model, call, source = small()
    cache = fr.ReferenceCache(source)
    with fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=cache):
        exact = run(model, call)
        model.float()
        rough = run(model, {key: to_float(value) for key, value in call.items()})
    assert len(cache) == 2
    assert rough.dtype == torch.float32
    assert_same(rough.double(), exact, 1e-4)


# ---- errors ----------------------------------------------------------------------------------------------------------


@CARRIED
def test_a_broken_call_leaves_the_next_one_whole(carried):
    """Also one that shares nothing any more: no rows are cut off that nobody appended."""
    model, call, source = small()
    stock, broken = run(model, call), [True]

    def fail(module, args):
        if broken.pop() if broken else False:
            raise RuntimeError("out of memory")

    with apply(model, carried, source, fr.UntwistingRoPE(**DIALS)) as handle:
        expected = run(model, call)
        watch = model.single_transformer_blocks[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, call)
        handle.update()
        assert torch.equal(run(model, call), stock)
        handle.update(fr.UntwistingRoPE(**DIALS))
        broken.append(True)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, call)
        assert torch.equal(run(model, call), expected)
        broken.append(True)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, call)
    watch.remove()
    assert torch.equal(run(model, call), stock)


@CARRIED
def test_a_pipeline_that_broke_off_draws_again(carried):
    pipe, path = FLUX.pipeline(), path_of(FLUX)
    stock = FLUX.generate(pipe, 3, 1, (TEXT, None))
    reference = path if carried == "batched" else fr.ReferenceCache(path)

    def stop(pipe, step, timestep, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return {}

    with fr.apply(pipe, fr.UntwistingRoPE(**DIALS), reference=reference):
        expected = FLUX.generate(pipe, 3, 1, (TEXT, None))
        with pytest.raises(KeyboardInterrupt):
            FLUX.generate(pipe, 3, 1, (TEXT, None), callback_on_step_end=stop)
        assert torch.equal(FLUX.generate(pipe, 3, 1, (TEXT, None)), expected)
        with pytest.raises(KeyboardInterrupt):
            FLUX.generate(pipe, 3, 1, (TEXT, None), callback_on_step_end=stop)
    assert torch.equal(FLUX.generate(pipe, 3, 1, (TEXT, None)), stock)


# ---- offload ---------------------------------------------------------------------------------------------------------


@CARRIED
@pytest.mark.parametrize("how", ["model", "layer by layer", "blocks"])
def test_offload(carried, how):
    """Hooks of accelerate and diffusers around every forward, also of the reference alone."""
    accelerate, cpu = pytest.importorskip("accelerate"), torch.device("cpu")
    model, call, source = small()
    with apply(model, carried, source, fr.UntwistingRoPE(**DIALS)):
        expected = run(model, call)
    if how == "model":
        accelerate.cpu_offload_with_hook(model, cpu)
    elif how == "layer by layer":
        accelerate.cpu_offload(model, cpu)
    else:
        model.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    with apply(model, carried, source, fr.UntwistingRoPE(**DIALS)):
        assert torch.equal(run(model, call), expected)
        assert torch.equal(run(model, call), expected)


# ---- tensors of any make ---------------------------------------------------------------------------------------------


@CARRIED
def test_strided_and_expanded_inputs(carried):
    model, call, source = small()
    with apply(model, carried, source, fr.UntwistingRoPE(**DIALS)):
        expected = run(model, call)
    strided = {}
    for name, x in call.items():
        wide = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)
        strided[name] = wide[..., 0]
    latents = source.latents(0, 0.0)
    poisoned = torch.stack([latents, torch.full_like(latents, torch.nan)], dim=2)[:, :, 0]
    given = {name: x[:1].expand(1, *x.shape[1:]) for name, x in source.arguments.items()}
    with apply(model, carried, fr.Reference(lambda step, sigma: poisoned, given), fr.UntwistingRoPE(**DIALS)):
        assert_same(run(model, strided), expected, 1e-12)


@pytest.mark.parametrize("applied", [False, True])
def test_statistics_know_the_pairing(applied):
    """Of a host whose pairs are (c, c + D/2): unrotated queries and keys, or rotated ones, say the same."""
    layout = fr.TokenLayout(2, (2, 3))
    rope = fr.RoPE.axial(layout.positions("flux"), (4, 6, 6), pairing="half")
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, len(layout), 2, 16, generator=g).double() for _ in range(3))
    sequence = JointSequence(layout.positions("flux"), lambda: layout)
    request = LayerRequest(sharings=(Sharing(adain=0.6),))
    targets = target_work(sequence, rope, (), rope.angles[layout.target], None)
    work = BatchedWork(SharedWork(targets, request, layout), ReferenceWork(sequence, rope), 1)
    expected = work.attend(q, k, v, False)
    turned = [fr.rope.rotate(x, rope.angles, "half") for x in (q, k)] if applied else [q, k]
    assert_same(work.attend(*turned, v, applied), expected, 1e-12)
