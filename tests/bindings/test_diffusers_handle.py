"""Handles: what they install and put back, and what they refuse."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import types
import weakref

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import KONTEXT, LAYOUT, TINY_HOSTS, all_four, grag_like, kontext_call
from tiny_pipelines import flux_generate, flux_pipeline
from tiny_transformers import TARGET, TEXT, build_flux, run

# ---- handles ---------------------------------------------------------------------------------------------------------


def attentions(model) -> list[torch.nn.Module]:
    return [m for m in model.modules() if hasattr(m, "set_processor")]


def test_remove_restores_the_same_objects(transformer):
    other = build_flux()
    before, others = transformer.attn_processors, other.attn_processors
    keys = list(transformer.state_dict())
    handle = fr.apply(transformer, all_four())
    during = transformer.attn_processors
    assert all(during[name] is not p for name, p in before.items())
    assert not any("Added" in type(p).__name__ or isinstance(p, torch.nn.Module) for p in during.values())
    assert list(transformer.state_dict()) == keys
    assert all(other.attn_processors[name] is p for name, p in others.items())
    assert len(transformer._forward_pre_hooks) == 1
    handle.remove()
    assert not handle.bound
    assert all(transformer.attn_processors[name] is p for name, p in before.items())
    assert len(transformer._forward_pre_hooks) == 0


def test_leaving_the_block_removes_even_after_an_error(transformer):
    before = transformer.attn_processors
    with pytest.raises(RuntimeError, match=r"^stop$"), fr.apply(transformer, all_four()):
        raise RuntimeError("stop")
    assert all(transformer.attn_processors[name] is p for name, p in before.items())
    with fr.apply(transformer) as handle:
        handle.remove()  # leaving the block afterwards is no second removal


def test_copies_are_refused_while_bound(transformer):
    with fr.apply(transformer, all_four()):
        for each in (transformer, transformer.transformer_blocks[0], transformer.attn_processors):
            with pytest.raises(NotImplementedError, match=r"^copy: expected .* handle\.remove\(\)"):
                copy.deepcopy(each)
    copy.deepcopy(transformer)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", [0, 1, 3, "hook before", "hook after"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_binding_is_all_or_nothing(transformer, monkeypatch, error, where, late):
    """An error or an interrupt at any layer or hook, just before or just after it took effect, undoes everything."""
    before, call = transformer.attn_processors, kontext_call()
    stock, owner, name = run(transformer, call), transformer, "set_processor"
    if isinstance(where, int):
        owner = attentions(transformer)[where]
    else:
        name = "register_forward_pre_hook" if where == "hook before" else "register_forward_hook"
    real = getattr(owner, name)

    def fail(*args, **kwargs):
        monkeypatch.undo()
        if late:
            real(*args, **kwargs)
        raise error("stop")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(error, match=r"^stop$"):
        fr.apply(transformer, all_four())
    assert all(transformer.attn_processors[key] is p for key, p in before.items())
    assert not transformer._forward_pre_hooks
    assert not transformer._forward_hooks
    assert torch.equal(run(transformer, call), stock)
    with pytest.raises(ValueError, match=r"^pipe: expected a transformer that a handle is bound to"):
        fr.remove(transformer)
    with fr.apply(transformer, all_four()):
        assert not torch.equal(run(transformer, call), stock)
    assert torch.equal(run(transformer, call), stock)


def test_a_removed_handle_is_no_context():
    """What is under it would run without its methods."""
    handle = fr.apply(build_flux(), all_four())
    handle.remove()
    with pytest.raises(ValueError, match=r"^handle: expected a bound handle, received one that was removed"):
        handle.__enter__()
    assert repr(handle).startswith("<fastrope.Handle on FluxTransformer2DModel: removed, [QueryScale")


def test_a_removed_handle_holds_nothing():
    """Neither transformer nor pipeline nor plans, though somebody keeps it."""
    pipe = flux_pipeline()
    layout = TINY_HOSTS["flux"].layout
    handle = fr.apply(pipe, grag_like(layout))
    flux_generate(pipe)
    held = [pipe, pipe.transformer, next(iter(handle._state.works)).plans[0]]
    held = [weakref.ref(x) for x in held]
    handle.remove()
    del pipe
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


def test_removing_twice_is_refused(transformer):
    handle = fr.apply(transformer)
    handle.remove()
    with pytest.raises(ValueError, match=r"^handle: expected a bound handle"):
        handle.remove()


@pytest.mark.parametrize("through", [lambda t: t, lambda t: type("Pipe", (), {"transformer": t})(), torch.compile])
def test_a_lost_handle_can_be_removed(transformer, through):
    before = transformer.attn_processors
    target = through(transformer)
    fr.apply(target, all_four())
    with pytest.raises(ValueError, match=r"fastrope\.remove\(pipe\) if it is lost"):
        fr.apply(target)
    fr.remove(target)
    assert all(transformer.attn_processors[name] is p for name, p in before.items())
    assert not transformer._forward_pre_hooks
    with fr.apply(target) as handle:
        fr.remove(target)
        assert not handle.bound
    with pytest.raises(ValueError, match=r"^pipe: expected a transformer that a handle is bound to, received Flux"):
        fr.remove(target)
    with pytest.raises(ValueError, match=r"^pipe: expected a diffusers pipeline"):
        fr.remove("FLUX.1-dev")


def test_applying_twice_is_refused_and_changes_nothing(transformer):
    with fr.apply(transformer) as handle:
        during = transformer.attn_processors
        with pytest.raises(ValueError, match=r"without a bound handle"):
            fr.apply(transformer, all_four())
        assert all(transformer.attn_processors[name] is p for name, p in during.items())
        assert len(transformer._forward_pre_hooks) == 1
        assert handle.bound
    fr.apply(transformer).remove()


def test_processors_replaced_meanwhile_are_left_alone(transformer):
    handle = fr.apply(transformer)
    mine = KONTEXT.processors["transformer_blocks"](None)
    attentions(transformer)[1].set_processor(mine)
    with pytest.raises(NotImplementedError, match=r"^attention processors: expected those that .*, received Flux;"):
        run(transformer, kontext_call())
    with pytest.warns(UserWarning, match=r"^1 attention processors were replaced"):
        handle.remove()
    assert attentions(transformer)[1].processor is mine


def test_attention_backend_reaches_the_original(transformer):
    original = attentions(transformer)[0].processor
    with fr.apply(transformer):
        attentions(transformer)[0].set_attention_backend("native")
        assert original._attention_backend == "native"
        assert attentions(transformer)[0].processor._attention_backend == "native"


def test_a_call_that_goes_round_the_hook_is_refused(transformer):
    with fr.apply(transformer), pytest.raises(ValueError, match=r"^transformer: expected a call of the object"):
        transformer.forward(**kontext_call())


def test_a_failed_call_leaves_no_plan_of_an_earlier_one(transformer):
    with fr.apply(transformer, all_four()):
        run(transformer, kontext_call())
        short = fr.TokenLayout(TEXT, TARGET)
        with pytest.raises(ValueError, match="QueryScale"):
            run(transformer, kontext_call(short))
        with pytest.raises(ValueError, match=r"went round"):
            transformer.forward(**kontext_call())


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupted_call_leaves_nothing_behind(transformer):
    """torch runs no hooks after a KeyboardInterrupt; what it leaves is never taken for the work of another call."""
    call, inner = kontext_call(), kontext_call()
    with fr.apply(transformer, all_four()):
        expected = run(transformer, call), run(transformer, inner)

        def broken_off() -> None:
            watch = transformer.single_transformer_blocks[0].register_forward_pre_hook(interrupt)
            with contextlib.suppress(KeyboardInterrupt):
                run(transformer, inner)
            watch.remove()

        broken_off()
        with pytest.raises(ValueError, match=r"^transformer: expected a call of the object"):
            transformer.forward(**call)
        broken_off()
        assert torch.equal(run(transformer, call), expected[0])
        with pytest.raises(ValueError, match=r"^transformer: expected a call of the object"):
            transformer.forward(**call)

        def within(*_) -> None:
            watch.remove()
            broken_off()
            assert torch.equal(run(transformer, inner), expected[1])

        watch = transformer.transformer_blocks[1].register_forward_pre_hook(within)
        assert torch.equal(run(transformer, call), expected[0])  # a call within goes before, not instead
        broken_off()


def test_a_call_broken_off_lets_go_of_its_tensors(transformer):
    """When the next call begins, in whatever thread."""
    kept = []

    def broken_off() -> None:
        call = kontext_call()
        kept.append(weakref.ref(call["hidden_states"]))
        with contextlib.suppress(KeyboardInterrupt):
            run(transformer, call)

    with fr.apply(transformer, all_four()):
        watch = transformer.single_transformer_blocks[0].register_forward_pre_hook(interrupt)
        thread = threading.Thread(target=broken_off)
        thread.start()
        thread.join()
        watch.remove()
        run(transformer, kontext_call())
        gc.collect()
        assert kept[0]() is None


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_unknown_hosts_are_refused():
    for host, name in (
        (torch.nn.Linear(2, 2), "Linear"),
        (types.SimpleNamespace(transformer=torch.nn.Linear(2, 2)), "Linear"),
        (types.SimpleNamespace(unet=torch.nn.Linear(2, 2)), "SimpleNamespace"),
        ("FLUX.1-dev", "str"),
    ):
        with pytest.raises(ValueError, match=rf"^pipe: expected .*, received {name}$"):
            fr.apply(host)


@pytest.mark.parametrize("method", [3, "grag", fr.BiasDelta, types.SimpleNamespace(modulations=None)])
def test_what_is_no_method_is_refused(transformer, method):
    with pytest.raises(ValueError, match=r"^methods: expected modulations"):
        fr.apply(transformer, [method])


def test_a_method_must_answer_with_modulations(transformer):
    for answer in (None, fr.BiasDelta(), [1]):
        method = types.SimpleNamespace(modulations=lambda site, answer=answer: answer)
        with fr.apply(transformer, method), pytest.raises(ValueError, match=r"expected a list of modulations"):
            run(transformer, kontext_call())


def test_unknown_backends_are_refused(transformer):
    with pytest.raises(ValueError, match=r"^backend: expected one of"):
        fr.apply(transformer, backend="flash")


def test_ip_adapters_are_refused(transformer):
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    attentions(transformer)[1].set_processor(FluxIPAdapterAttnProcessor(32, 32))
    with pytest.raises(NotImplementedError, match=r"^IP-Adapter: .*transformer_blocks\.1\.attn"):
        fr.apply(transformer)
    assert type(attentions(transformer)[0].processor).__name__ == "FluxAttnProcessor"
    assert not transformer._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "what"), [("PAGFluxAttnProcessor", "PAG"), ("MyProcessor", "custom attention processors")]
)
def test_foreign_processors_are_refused(transformer, name, what):
    attentions(transformer)[0].set_processor(type(name, (), {})())
    with pytest.raises(NotImplementedError, match=rf"^{what}: expected FluxAttnProcessor at .*, received {name}$"):
        fr.apply(transformer)


def test_pag_pipelines_are_refused(transformer):
    mixin = type("PAGMixin", (), {})
    pipe = type("FluxPAGPipeline", (mixin,), {"transformer": transformer})()
    with pytest.raises(NotImplementedError, match=r"^PAG: "):
        fr.apply(pipe)


def test_nunchaku_is_refused(transformer):
    kind = type("NunchakuFluxTransformer2DModelV2", (type(transformer),), {"__module__": "nunchaku.models"})
    transformer.__class__ = kind
    with pytest.raises(NotImplementedError, match=r"^nunchaku: "):
        fr.apply(transformer)


def test_attention_masks_are_refused_where_a_modulation_is_active(transformer):
    call = kontext_call() | {"joint_attention_kwargs": {"attention_mask": torch.ones(2, 1, 1, len(LAYOUT)).bool()}}
    with fr.apply(transformer):
        run(transformer, call)
    with fr.apply(transformer, all_four()), pytest.raises(NotImplementedError, match=r"^attention_mask: "):
        run(transformer, call)


@pytest.mark.parametrize("kind", ["Flux2KVAttnProcessor", "Flux2KVParallelSelfAttnProcessor"])
def test_key_caches_of_flux2_are_refused(kind):
    """They attend to other keys than the sequence's."""
    from diffusers.models.transformers import transformer_flux2

    host = TINY_HOSTS["flux2"]
    model = host.build()
    layer = next(attn for blocks, attn in host.attentions(model) if ("single" in blocks) == ("Parallel" in kind))
    layer.set_processor(getattr(transformer_flux2, kind)())
    with pytest.raises(NotImplementedError, match=rf"^custom attention processors: .*, received {kind}$"):
        fr.apply(model)


def test_layered_qwen_is_refused_where_something_is_bound():
    host = TINY_HOSTS["qwen"]
    model, call = host.build().double(), host.call(host.layout)
    model.register_to_config(use_layer3d_rope=True)
    with fr.apply(model):
        run(model, call)
    with fr.apply(model, all_four()), pytest.raises(NotImplementedError, match=r"^use_layer3d_rope: "):
        run(model, call)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: [x], NotImplementedError, r"^x: expected one picture per row, received lists"),
        (lambda x: torch.cat([x, x], dim=1), ValueError, r"^x: expected 1 frame\(s\) per picture, received 2"),
    ],
    ids=["omni", "frames"],
)
def test_what_z_image_cannot_be_asked(change, error, message):
    host = TINY_HOSTS["z-image"]
    model, call = host.build().double(), host.call(host.layout)
    mods = [fr.BiasDelta(delta=1.3, keys=slice(0, 4))]
    with fr.apply(model, mods), pytest.raises(error, match=message):
        run(model, call | {"x": [change(x) for x in call["x"]]})


def test_pictures_of_different_size_are_refused():
    host = TINY_HOSTS["z-image"]
    model, call = host.build().double(), host.call(host.layout)
    call["x"][1] = call["x"][1][..., :4]
    stock = run_each(model, call)
    with fr.apply(model):
        assert all(torch.equal(a, b) for a, b in zip(run_each(model, call), stock, strict=True))
    mods = [fr.BiasDelta(delta=1.3, keys=slice(0, 4))]
    with fr.apply(model, mods), pytest.raises(NotImplementedError, match=r"^x: expected pictures of one size"):
        run_each(model, call)


def run_each(model, call: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]
