"""What shared attention costs, and refuses: graphs, passes, memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from untwisting_calls import apply, call_of, plain_layout, source_of
from untwisting_runs import CARRIED, DIALS, small, to_float

import fastrope as fr

pytest.importorskip("diffusers")
import diffusers
from diffusers_hosts import TINY_HOSTS, assert_differ, assert_same
from shared_formulas import Row, band, sharing, watching
from tiny_transformers import TARGET, run
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode


@CARRIED
@pytest.mark.parametrize("how", ["wrapped", "blocks"])
def test_compiled_transformers_share_in_one_graph(carried, how):
    """Whatever the step, also while kept keys are made. The host's first block has a graph of its own."""
    host = TINY_HOSTS["flux"]
    torch._dynamo.reset()
    batch = 2 if carried == "batched" else 1  # a kept reference runs alone, in a batch of its own size
    model, call, reference = host.build().double(), call_of(host, 5, batch), call_of(host, 5, 1)
    source, steps, expected = source_of(host, reference), (0, 1, 2), []
    with apply(model, carried, source, fr.UntwistingRoPE(**DIALS)) as handle:
        for step in steps:
            handle.set_step(step, 3)
            expected.append(run(model, call))
    counter = CompileCounter()
    target = model
    if how == "wrapped":
        target = torch.compile(model, backend=counter, fullgraph=True)
    else:
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
    with apply(target, carried, source, fr.UntwistingRoPE(**DIALS)) as handle:
        for step in steps:
            handle.set_step(step, 3)
            assert_same(run(target, call), expected[step])
            assert counter.frame_count == (1 if how == "wrapped" else 3)
    torch._dynamo.reset()


# ---- cost -----------------------------------------------------------------------------------------------------------


@CARRIED
@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "z-image"])
def test_a_step_reads_no_tensor_that_came_before(name, carried, monkeypatch):
    """Ids and embeddings are the same objects in every step, also where the reference's text is longer."""
    from fastrope.bindings.image import fingerprints

    host = TINY_HOSTS[name]
    model = host.build().double()
    call, reference = call_of(host, 5, 2), call_of(host, 40, 1)
    if "txt_ids" in call and name == "flux2":  # its pipelines give every row ids
        call |= {key: call[key].expand(2, -1, -1) for key in ("txt_ids", "img_ids")}
    reads, real = [], fingerprints._digests
    with apply(model, carried, source_of(host, reference), fr.UntwistingRoPE(**DIALS)) as handle:
        expected = run(model, call)
        monkeypatch.setattr(fingerprints, "_digests", lambda tensors: reads.append(len(tensors)) or real(tensors))
        handle.set_step(2, 7)
        run(model, call)
        handle.set_step(3, 7)
        assert torch.equal(run(model, call), expected)
    assert reads == [1]  # the band weights of the new step, which are on the host


def test_steps_that_share_nothing_cost_no_rows():
    """Nor is the reference run for them."""
    host = TINY_HOSTS["flux"]
    model, call, reference = host.build().double(), call_of(host, 5, 2), call_of(host, 5, 1)
    stock, rows = run(model, call), []
    watch = model.transformer_blocks[0].register_forward_hook(lambda module, args, out: rows.append(len(out[0])))
    for carried, expected in (("batched", [2, 3]), ("kept", [2, 1, 2])):
        with apply(model, carried, source_of(host, reference), fr.UntwistingRoPE(steps=1)) as handle:
            for step in range(2):
                handle.set_step(step, 2)
                out = run(model, call)
                assert torch.equal(out, stock) == (step == 0)
        assert rows == expected
        rows.clear()
    watch.remove()


# ---- memory ----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of a tensor that comes to be."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                self.count = max(self.count, x.untyped_storage().nbytes() // x.element_size())
        return found


@CARRIED
@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "z-image"])
def test_no_tensor_of_queries_by_keys(name, carried):
    """1024 image tokens: queries by keys is 1029 x 2053; nothing else is a quarter of that."""
    host, grid = TINY_HOSTS[name], (32, 32)
    model = host.build()
    call, reference = ({k: to_float(v) for k, v in call_of(host, 5, 1, grid).items()} for _ in range(2))
    with apply(model, carried, source_of(host, reference), fr.UntwistingRoPE(**DIALS)):
        run(model, call)
        with Largest() as seen:
            run(model, call)
    assert 0 < seen.count < 1029 * 2053 / 4


def test_steps_of_a_schedule_share_their_tables(monkeypatch):
    """A plan is built for the first step alone, also of a native reference."""
    built, plan = [], fr.plan
    monkeypatch.setattr(fr, "plan", lambda **arguments: built.append(1) or plan(**arguments))
    for name, carried in (("flux", "batched"), ("flux", "kept"), ("kontext", None)):
        host = TINY_HOSTS[name]
        model = host.build()
        if carried is None:
            call = {k: to_float(v) for k, v in host.call(host.layout).items()}
            handle = fr.apply(model, fr.UntwistingRoPE(reference=0))
        else:
            call, reference = ({k: to_float(v) for k, v in call_of(host, 5, 1).items()} for _ in range(2))
            handle = apply(model, carried, source_of(host, reference), fr.UntwistingRoPE(blocks="single"))
        outputs = []
        with handle:
            for step in range(4):
                handle.set_step(step, 5)
                outputs.append(run(model, call))
                if step == 0:
                    built.clear()
        assert not built
        for one, other in itertools.pairwise(outputs):
            assert not torch.equal(one, other)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "flux",
            {"encoder_hidden_states": None},
            r"^reference\.arguments\['encoder_hidden_states'\]: expected a tensor",
        ),
        ("flux", {"pooled_projections": None}, r"^reference\.arguments\['pooled_projections'\]: expected a tensor"),
        ("flux", {"prompt": torch.ones(1)}, r"^reference\.arguments: expected some of"),
        ("flux", {"encoder_hidden_states": torch.ones(3, 5, 32)}, r"\['encoder_hidden_states'\]: expected 1 or 1 rows"),
        ("flux", {"img_ids": torch.ones(4, 3)}, r'^reference\.arguments\["img_ids"\]: expected \(15, axes\)'),
        ("flux", {"img_ids": torch.ones(15, 3)}, r'^reference\.arguments\["img_ids"\]: expected ids of the target'),
        ("qwen", {"img_shapes": [[(1, 5, 3)]]}, r'^reference\.arguments\["img_shapes"\]: expected those of the target'),
        ("qwen", {"img_shapes": [[(1, 5, 2)]]}, r'^reference\.arguments\["img_shapes"\]: expected shapes of 15 tokens'),
        ("z-image", {"cap_feats": None}, r'^reference\.arguments\["cap_feats"\]: expected 1 or 1 captions'),
        ("z-image", {"t": torch.ones(1)}, r"^reference\.arguments: expected 'cap_feats' alone, received 't'"),
    ],
)
def test_references_that_do_not_fit(name, changes, message):
    model, call, source = small(name, **changes)
    with fr.apply(model, fr.UntwistingRoPE(), reference=source), pytest.raises(ValueError, match=message):
        run(model, call)


@CARRIED
def test_text_ids_that_nobody_tells_are_not_guessed(carried):
    """Ovis counts its text on the diagonal, FLUX.1 does not count: one id looks the same in both."""
    host = TINY_HOSTS["ovis"]
    model, source = host.build().double(), source_of(host, call_of(host, 3, 1))
    expected = r'^reference\.arguments\["txt_ids"\]: expected 3 ids, as the target\'s single one does not tell'
    with apply(model, carried, source, fr.UntwistingRoPE()), pytest.raises(ValueError, match=expected):
        run(model, call_of(host, 1, 1))


@pytest.mark.parametrize("name", ["flux", "z-image"])
def test_latents_that_do_not_fit(name):
    model, call, source = small(name)
    for latents in (torch.zeros(1, 15, 5), torch.zeros(15, 4)):
        wrong = fr.Reference(lambda step, sigma, x=latents: x, source.arguments)
        with (
            fr.apply(model, fr.UntwistingRoPE(), reference=wrong),
            pytest.raises(ValueError, match=r"^reference\.latents: expected"),
        ):
            run(model, call)


def test_what_is_no_reference():
    model = TINY_HOSTS["flux"].build()
    known = fr.Reference(lambda step, sigma: None, {})
    for wrong in (torch.ones(1, 15, 4), "shared", {"latents": None}, [known, known]):
        expected = rf"^reference\.latents: expected a function .*, received nothing, of a {type(wrong).__name__}$"
        with pytest.raises(ValueError, match=expected):
            fr.apply(model, fr.UntwistingRoPE(), reference=wrong)
        with pytest.raises(ValueError, match=expected):
            fr.ReferenceCache(wrong)
    with pytest.raises(ValueError, match=r"^reference\.arguments: expected a mapping"):
        fr.Reference(lambda step, sigma: None, [1])
    assert not model._forward_pre_hooks


def test_a_reference_that_nobody_gave():
    model, call, _ = small()
    expected = r"^UntwistingRoPE\.reference: expected a site with a shared reference"
    with fr.apply(model, fr.UntwistingRoPE()), pytest.raises(ValueError, match=expected):
        run(model, call)


def test_refusals_by_name():
    model, call, source = small()
    nowhere = fr.UntwistingRoPE(blocks="joint")
    expected = r"^kinds: expected some of the model's kinds of block, \('double', 'single'\), received \('joint',\)"
    with fr.apply(model, nowhere, reference=source), pytest.raises(ValueError, match=expected):
        run(model, call)
    both = fr.UntwistingRoPE(), fr.UntwistingRoPE(layers=0)
    with fr.apply(model, *both, reference=source), pytest.raises(ValueError, match=r"^adain: expected one method"):
        run(model, call)
    with (
        fr.apply(model, fr.UntwistingRoPE(), reference=source) as handle,
        pytest.raises(NotImplementedError, match=r"^inspect: expected a handle without a shared reference"),
    ):
        handle.inspect()
    residual = {"controlnet_block_samples": [torch.zeros(2, 15, 32).double()] * 2}
    with (
        fr.apply(model, fr.UntwistingRoPE(), reference=source),
        pytest.raises(NotImplementedError, match=r"^controlnet_block_samples: expected None beside a reference"),
    ):
        run(model, call | residual)
    cache = fr.ReferenceCache(source)
    with fr.apply(model, fr.UntwistingRoPE(), reference=cache):
        plain = run(model, call)
        assert torch.equal(run(model, call | residual), plain)  # residuals of zeros, of the target alone
    other = TINY_HOSTS["flux"].build().double()
    with (
        fr.apply(other, fr.UntwistingRoPE(), reference=cache),
        pytest.raises(ValueError, match=r"^reference: expected a cache of this very transformer"),
    ):
        run(other, call)
    cache.clear()
    with fr.apply(other, fr.UntwistingRoPE(), reference=cache):
        assert_differ(run(other, call), plain)


@pytest.mark.parametrize("name", ["kontext", "flux2", "qwen-edit-plus"])
def test_a_grid_that_nobody_tells_is_not_guessed(name):
    """Ten tokens may be 2 x 5 or 5 x 2. The target's own grid, without its native references, needs no telling."""
    host = TINY_HOSTS[name]
    model, call = host.build().double(), host.call(host.layout)
    plain, refused = call_of(host, 5, 1), call_of(host, 5, 1, (5, 2))
    cache = fr.ReferenceCache(source_of(host, plain))
    with fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=cache) as handle:
        handle.set_step(1, 3)
        out = run(model, call)
    own, theirs = Row.of(host, host.layout), Row.of(host, plain_layout(host))
    with watching(host, model, theirs) as seen:
        run(model, plain)
    weights = band(0.55, 1.25, DIALS["beta"], host.axes)
    with sharing(host, model, own, seen, theirs, weights=weights, adain=DIALS["adain"]):
        assert_same(out, run(model, call), 1e-10)
    cache = fr.ReferenceCache(source_of(host, refused))
    what = r'^reference\.arguments\["img_(ids"\]: expected \(10, axes\)|shapes"\]: expected shapes of 10 tokens)'
    with fr.apply(model, fr.UntwistingRoPE(), reference=cache), pytest.raises(ValueError, match=what):
        run(model, call)


def test_settings_of_a_lora_are_part_of_what_is_kept():
    model, call, source = small()
    cache = fr.ReferenceCache(source)
    with fr.apply(model, fr.UntwistingRoPE(), reference=cache):
        for scale, count in ((0.5, 1), (0.5, 1), (1.0, 2)):
            run(model, call | {"joint_attention_kwargs": {"scale": scale}})
            assert len(cache) == count


def test_the_hosts_own_masks_are_not_lost_beside_ours():
    """A mask among the attention arguments is refused also where texts are filled up and masked."""
    host = TINY_HOSTS["flux"]
    model, call, reference = host.build().double(), call_of(host, 5, 1), call_of(host, 8, 1)
    given = {"joint_attention_kwargs": {"attention_mask": torch.ones(2, 1, 1, 23, dtype=torch.bool)}}
    with (
        fr.apply(model, fr.UntwistingRoPE(), reference=source_of(host, reference)),
        pytest.raises(NotImplementedError, match=r"^attention_mask: expected None in a modulated layer"),
    ):
        run(model, call | given)


def test_other_caches_are_refused_while_a_reference_runs():
    model, call, source = small()
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with (
        fr.apply(model, fr.UntwistingRoPE(), reference=fr.ReferenceCache(source)),
        model.cache_context("cond"),
        pytest.raises(NotImplementedError, match=r"^enable_cache: expected a transformer without"),
    ):
        run(model, call)


def test_longcat_in_one_batch_wants_texts_of_one_length():
    host = TINY_HOSTS["longcat"]
    model, call = host.build().double(), call_of(host, 5, 1)
    source = source_of(host, call_of(host, 7, 1))
    with (
        fr.apply(model, fr.UntwistingRoPE(), reference=source),
        pytest.raises(NotImplementedError, match=r"^encoder_hidden_states: expected texts of one length"),
    ):
        run(model, call)
    untold = fr.Reference(source.latents, {"encoder_hidden_states": source.arguments["encoder_hidden_states"]})
    with (
        fr.apply(model, fr.UntwistingRoPE(), reference=fr.ReferenceCache(untold)),
        pytest.raises(ValueError, match=r'^reference\.arguments\["img_ids"\]: expected ids, as'),
    ):
        run(model, call)


def test_a_failed_reference_leaves_the_model_usable():
    """An error while the reference runs alone, then a good call."""
    model, call, source = small()
    cache, broken = fr.ReferenceCache(source), [True]

    def fail(module, args):
        if broken.pop() if broken else False:
            raise RuntimeError("out of memory")

    with fr.apply(model, fr.UntwistingRoPE(), reference=fr.ReferenceCache(source)):
        expected = run(model, call)
    watch = model.transformer_blocks[0].register_forward_pre_hook(fail)
    with fr.apply(model, fr.UntwistingRoPE(), reference=cache):
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, call)
        assert (len(cache), cache.nbytes) == (0, 0)
        assert torch.equal(run(model, call), expected)
    watch.remove()


def test_memory_is_stated():
    model, call, source = small()
    cache = fr.ReferenceCache(source, device="cpu")
    assert cache  # also while it is empty
    assert repr(cache) == "<fastrope.ReferenceCache: 0 steps, 0.0 MiB, cpu>"
    with fr.apply(model, fr.UntwistingRoPE(), reference=cache) as handle:
        for step in range(3):
            handle.set_step(step, 3)
            run(model, call)
    each = 4 * (2 * math.prod(TARGET) + 4) * 32 * 8
    assert (len(cache), cache.nbytes) == (3, 3 * each)
