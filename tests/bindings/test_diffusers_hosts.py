"""Every host of the table: the binding against a processor written from the formulas, on calls and real pipelines."""

from __future__ import annotations

import types

import pytest
import torch
from masked_hosts import ALL, masked_call

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS, assert_differ, assert_same, grag_like, loose_like
from tiny_transformers import TARGET, TEXT, run

WITH_PIPELINE = {name: host for name, host in TINY_HOSTS.items() if host.pipeline}
PIPELINES = pytest.mark.parametrize("host", WITH_PIPELINE.values(), ids=WITH_PIPELINE)
KINDS = {"grag": grag_like, "loose": loose_like}
BOTH = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


# ---- calls -----------------------------------------------------------------------------------------------------------


@ALL
@BOTH
@pytest.mark.parametrize("rotation", ["op", "host"])
def test_modulated_forward_follows_the_formulas(host, kind, rotation):
    model, call = host.build().double(), host.call(host.layout)
    mods = kind(host.layout)
    stock = run(model, call)
    with host.by_formulas(model, host.attend(mods)):
        expected = run(model, call)
    with fr.apply(model, mods, rotation=rotation):
        out = run(model, call)
    assert_same(out, expected, 1e-10 if rotation == "op" else 1e-5)
    assert_differ(out, stock)
    assert torch.equal(run(model, call), stock)


@ALL
def test_every_row_of_a_batch_has_its_own_values(host):
    model, call = host.build().double(), host.call(host.layout)
    mods = loose_like(host.layout, batch=2)
    with host.by_formulas(model, host.attend(mods)):
        expected = run(model, call)
    with fr.apply(model, mods):
        assert_same(run(model, call), expected, 1e-10)


@ALL
def test_both_kinds_together_in_some_layers(host):
    """Methods are told where they are; layers where nothing is active run the processor they had."""
    model, call = host.build().double(), host.call(host.layout)
    mods = grag_like(host.layout) + loose_like(host.layout)
    sites = []

    def modulations(site):
        sites.append(site)
        return mods if site.layer % 2 else []

    with host.by_formulas(model, host.attend(mods), layers={1, 3}):
        expected = run(model, call)
    with fr.apply(model, types.SimpleNamespace(modulations=modulations)):
        out = run(model, call)
    assert_same(out, expected)
    kinds = {"transformer_blocks": "double", "single_transformer_blocks": "single", "layers": "joint"}
    found = [kinds[blocks] for blocks, _ in host.attentions(model)]
    assert [s.kind for s in sites] == found
    assert [s.layer for s in sites] == list(range(len(found)))
    assert {(s.tokens, s.num_layers, s.axes_dim) for s in sites} == {(host.layout, len(found), host.axes)}


@ALL
def test_calls_of_different_length_alternate(host):
    """True guidance: two prompts, two text lengths, one handle."""
    model = host.build().double()
    layouts = [relaid(host.layout, host.layout.text_tokens + extra) for extra in (0, 32)]
    calls = [host.call(layout) for layout in layouts]
    expected = []
    for layout, call in zip(layouts, calls, strict=True):
        with host.by_formulas(model, host.attend(grag_like(layout), layout)):
            expected.append(run(model, call))
    method = types.SimpleNamespace(modulations=lambda site: grag_like(site.tokens))
    with fr.apply(model, method):
        for n in (0, 1, 0, 1):
            assert_same(run(model, calls[n]), expected[n], 1e-10)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_and_neutral_are_the_stock_model_bit_for_bit(host, dtype, monkeypatch):
    monkeypatch.setattr(fr, "attention", None)  # equal bits by way of the host's own processors, not by luck
    model, call = host.build().to(dtype), host.call(host.layout, dtype=dtype)
    stock = run(model, call)
    silent = types.SimpleNamespace(modulations=lambda site: [])
    for methods in ([], [silent], grag_like(host.layout, 1.0, 1.0)[:1]):
        with fr.apply(model, *methods):
            assert torch.equal(run(model, call), stock)
    assert torch.equal(run(model, call), stock)


@ALL
def test_the_same_objects_come_back(host):
    model, call = host.build(), host.call(host.layout, dtype=torch.float32)
    everyone = [m for m in model.modules() if hasattr(m, "set_processor")]
    before, keys = [m.processor for m in everyone], list(model.state_dict())
    with fr.apply(model, grag_like(host.layout)):
        run(model, call)
        bound = [attn.processor for _, attn in host.attentions(model)]
        assert not any(b in before for b in bound)
        assert not any("Added" in type(b).__name__ or isinstance(b, torch.nn.Module) for b in bound)
        assert list(model.state_dict()) == keys
    assert all(m.processor is p for m, p in zip(everyone, before, strict=True))
    assert not model._forward_pre_hooks


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen", "qwen-edit-plus", "chroma"])
@BOTH
def test_text_masks_hide_keys(name, kind):
    """The mean of a group runs over the tokens that are there, in every row by itself."""
    host = TINY_HOSTS[name]
    model = host.build().double()
    call, mask = masked_call(host)
    mods = [*kind(host.layout), fr.BandWeight(torch.linspace(0.5, 1.5, 8), keys=host.layout.text)]
    with host.by_formulas(model, host.attend(mods, key_mask=mask)):
        expected = run(model, call)
    with fr.apply(model, mods):
        out = run(model, call)
    assert_same(out, expected, 1e-10)
    unmasked = {key: None if key.endswith("mask") else value for key, value in call.items()}
    assert_differ(out, run(model, unmasked))


def test_masks_change_between_calls():
    """The same tokens under another mask are another plan."""
    host = TINY_HOSTS["qwen-edit-plus"]
    model = host.build().double()
    call, mask = masked_call(host)
    mods = [*grag_like(host.layout), fr.BiasDelta(1.3, 1.4, keys=host.layout.text)]
    with fr.apply(model, mods):
        for _ in range(2):
            first = run(model, call)
            call["encoder_hidden_states_mask"] = call["encoder_hidden_states_mask"].flip(0)
            second = run(model, call)
            call["encoder_hidden_states_mask"] = call["encoder_hidden_states_mask"].flip(0)
    for out, keys in ((first, mask), (second, mask.flip(0))):
        with host.by_formulas(model, host.attend(mods, key_mask=keys)):
            assert_same(out, run(model, call), 1e-10)


def test_a_mask_belongs_to_the_call_it_came_with():
    """What is remembered of a sequence must not change with the caller's mask."""
    host = TINY_HOSTS["chroma"]
    model = host.build().double()
    call, mask = masked_call(host)
    kept = mask.clone()
    with fr.apply(model, grag_like(host.layout)) as handle:
        run(model, call)
        mask[0, 1] = False
        run(model, call)
        handle.update(mods := [fr.BiasDelta(1.3, 1.4, keys=host.layout.target)])
        out = run(model, call | {"attention_mask": kept})
    with host.by_formulas(model, host.attend(mods, key_mask=kept)):
        assert_same(out, run(model, call), 1e-10)


def test_neutral_groups_over_a_floating_mask():
    """Which groups the host's mask divides matters only where they modulate."""
    host = TINY_HOSTS["chroma"]
    model = host.build()
    call, mask = masked_call(host)
    call = {k: v.float() if v.is_floating_point() else v for k, v in call.items()} | {"attention_mask": mask.float()}
    stock = run(model, call)
    with fr.apply(model, fr.BiasDelta(1.0, torch.ones(2), keys=host.layout.text)):
        assert torch.equal(run(model, call), stock)
    handle = fr.apply(model, fr.BiasDelta(1.0, 1.1, keys=host.layout.text))
    with handle, pytest.raises(NotImplementedError, match=r"^BiasDelta\.keys: "):
        run(model, call)


@pytest.mark.parametrize("rotation", ["op", "host"])
def test_floating_masks_are_added_to_the_logits(rotation):
    """Chroma's pipelines hand over zeros and ones in the dtype of the model, and torch adds them."""
    host = TINY_HOSTS["chroma"]
    model = host.build().double()
    call, mask = masked_call(host)
    call["attention_mask"] = mask.double()
    target = host.layout.target
    mods = [*loose_like(host.layout), fr.BiasDelta(1.2, 0.6, keys=slice(target.start, target.start + 7))]
    bias = mask.double()[:, :, None] * mask.double()[:, None]
    stock = run(model, call)
    with host.by_formulas(model, host.attend([], bias=bias)):
        assert_same(run(model, call), stock)
    with host.by_formulas(model, host.attend(mods, bias=bias)):
        expected = run(model, call)
    with fr.apply(model, mods, rotation=rotation):
        out = run(model, call)
    assert_same(out, expected, 1e-10 if rotation == "op" else 1e-5)
    assert_differ(out, stock)
    across = fr.BiasDelta(1.2, 0.6, keys=host.layout.text)
    with fr.apply(model, across), pytest.raises(NotImplementedError, match=r"^BiasDelta\.keys: expected tokens"):
        run(model, call)


@BOTH
def test_captions_of_different_length_in_one_batch(kind):
    """Z-Image: rows of a batch differ in length and in the positions of their picture."""
    host = TINY_HOSTS["z-image"]
    model = host.build().double()
    captions = [40, 7, 33]  # 64, 32 and 64 tokens
    call = host.call(host.layout, batch=3, captions=captions)
    layout = relaid(host.layout, 64)
    rows = [relaid(host.layout, n) for n in (64, 32, 64)]
    positions, mask = torch.zeros(3, len(layout), 3), torch.zeros(3, len(layout), dtype=torch.bool)
    for n, row in enumerate(rows):
        positions[n, : len(row)] = row.positions("z-image")
        mask[n, : len(row)] = True
    mods = [*kind(layout), fr.BiasDelta(0.8, 1.5, keys=layout.target)]
    with host.by_formulas(model, host.attend(mods, positions=positions, key_mask=mask)):
        expected = run(model, call)
    asked = types.SimpleNamespace(modulations=lambda site: mods if site.tokens == layout else None)
    for rotation in ("op", "host"):
        with fr.apply(model, asked, rotation=rotation):
            assert_same(run(model, call), expected, 1e-10 if rotation == "op" else 1e-5)


# ---- pipelines -------------------------------------------------------------------------------------------------------


class ByLength:
    """The reference's attention where calls differ in length: one per sequence length."""

    def __init__(self, *each):
        self.each = {attend.positions.shape[-2]: attend for attend in each}

    def __call__(self, q, k, v):
        return self.each[q.shape[1]](q, k, v)


def relaid(layout: fr.TokenLayout, text: int) -> fr.TokenLayout:
    return fr.TokenLayout(text, layout.target_grid, layout.reference_grids, layout.order, layout.padding)


@PIPELINES
@BOTH
def test_pipeline_follows_the_formulas(host, kind):
    """Both branches of classifier-free guidance where the host has them, with prompts of different length."""
    pipe = host.pipeline()
    lengths = host.lengths
    layouts = [relaid(host.layout, host.layout.text_tokens if host.name == "z-image" else n) for n in lengths if n]
    reference = ByLength(*(host.attend(kind(layout), layout) for layout in layouts))
    sites = set()

    def modulations(site):
        sites.add((site.tokens, site.step, site.num_steps))
        return kind(site.tokens)

    stock = host.generate(pipe, lengths=lengths)
    with host.by_formulas(pipe.transformer, reference):
        expected = host.generate(pipe, lengths=lengths)
    with fr.apply(pipe, types.SimpleNamespace(modulations=modulations)):
        out = host.generate(pipe, lengths=lengths)
    assert_same(out, expected, 1e-4)
    assert_differ(out, stock)
    assert sites == {(layout, step, 2) for layout in layouts for step in range(2)}
    assert torch.equal(host.generate(pipe, lengths=lengths), stock)


@PIPELINES
def test_a_method_for_some_steps_of_a_pipeline(host):
    """The step is the scheduler's: guidance calls the model twice in each."""
    pipe = host.pipeline()
    lengths = host.lengths
    asked = []

    def modulations(site):
        asked.append(site.step)
        return grag_like(site.tokens) if site.step == 3 else []

    stock = host.generate(pipe, lengths=lengths)
    with fr.apply(pipe, types.SimpleNamespace(modulations=modulations)):
        assert torch.equal(host.generate(pipe, lengths=lengths), stock)  # it has two steps
        asked.clear()
        late = host.generate(pipe, steps=4, lengths=lengths)
    layers = len(host.attentions(pipe.transformer))
    branches = 2 if lengths[1] and host.name != "z-image" else 1  # Z-Image puts both into one batch
    assert asked == [step for step in range(4) for _ in range(layers * branches)]
    assert_differ(late, host.generate(pipe, steps=4, lengths=lengths))


def test_padded_prompts_in_a_pipeline():
    """Qwen-Image: rows of one batch with prompts of different length, in both branches of guidance."""
    host = TINY_HOSTS["qwen"]
    pipe, attends = host.pipeline(), []
    for length in host.lengths:
        layout = relaid(host.layout, length)
        mask = torch.ones(2, len(layout), dtype=torch.bool)
        mask[1, length - 2 : length] = False
        mods = [fr.BiasDelta(0.7, 1.6, keys=layout.text), *loose_like(layout)]
        attends.append(host.attend(mods, layout, key_mask=mask))
    arguments = dict(lengths=host.lengths, masked=(True, True))
    with host.by_formulas(pipe.transformer, ByLength(*attends)):
        expected = host.generate(pipe, **arguments)
    method = types.SimpleNamespace(
        modulations=lambda site: [fr.BiasDelta(0.7, 1.6, keys=site.tokens.text), *loose_like(site.tokens)]
    )
    with fr.apply(pipe, method):
        assert_same(host.generate(pipe, **arguments), expected, 1e-4)


@BOTH
def test_three_references(kind):
    """FLUX.2, two of them of one size side by side: every one has a frame, a span and values of its own."""
    host, references = TINY_HOSTS["flux2"], [(2, 3), (2, 3), (4, 1)]
    layout = fr.TokenLayout(TEXT, TARGET, references)
    pipe, sites = host.pipeline(), set()

    def modulations(site):
        sites.add(site.tokens)
        return kind(site.tokens)

    stock = host.generate(pipe, lengths=host.lengths, references=references)
    with host.by_formulas(pipe.transformer, host.attend(kind(layout), layout)):
        expected = host.generate(pipe, lengths=host.lengths, references=references)
    with fr.apply(pipe, types.SimpleNamespace(modulations=modulations)):
        out = host.generate(pipe, lengths=host.lengths, references=references)
    assert_same(out, expected, 1e-4)
    assert_differ(out, stock)
    assert sites == {layout}
