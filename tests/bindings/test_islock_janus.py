"""Janus, tiny and random, through its own generate: guidance once, positions, anchors, pictures."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from anchored import Spy, seeded
from torch.nn import functional as F
from transformers import JanusConfig, JanusForConditionalGeneration, LogitsProcessorList

import fastrope as fr
from fastrope.bindings.transformers import AnchorProcessor, Grid, janus

BOS, PAD, BOI, CODES, N = 1, 0, 3, 40, 16


def host_generate(model, inputs, **options):
    """The host's own image generation, which needs help in some versions: see :func:`janus.new_cache`."""
    return model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_mode="image",
        **janus.new_cache(model), **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = JanusConfig(
        text_config=dict(
            model_type="llama", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        ),
        vision_config=dict(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=2, projection_dim=32,
            num_image_tokens=N, depth=1,
        ),
        vq_config=dict(
            embed_dim=4, num_embeddings=CODES, latent_channels=16, base_channels=32, channel_multiplier=[1, 1],
            num_res_blocks=1, projection_dim=32, num_hidden_layers=1, image_token_embed_dim=32,
        ),
        image_token_id=45,
    )  # fmt: skip
    model = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in (model.model.generation_head.vision_head.weight, model.model.generation_embeddings.weight):
            weight.mul_(20.0)  # enough contrast for the prompt and the guidance to matter
    model.generation_config.generation_kwargs = {"boi_token_id": BOI}
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = PAD, BOS
    return model


@pytest.fixture
def inputs():
    ids = torch.randint(5, 40, (2, 6))
    ids[:, 0], ids[:, -1] = BOS, BOI
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def matcher(model, tau=math.inf, candidates=CODES, alpha=0.0):
    lock = fr.ISLock(candidates=candidates, alpha=alpha, tau=tau)
    return lock.matcher(janus.codebook(model), num_tokens=N)


@torch.no_grad()
def full_logits(model, ids, tokens):
    """Logits ``(B, N, V)`` of image tokens from one uncached pass over prompt and image."""
    words = model.get_input_embeddings()(ids)
    image = model.prepare_embeddings_for_image_generation(tokens[:, :-1])
    hidden = model.model.language_model(inputs_embeds=torch.cat([words, image], 1), use_cache=False).last_hidden_state
    return model.model.generation_head(hidden[:, ids.shape[1] - 1 :])


def test_guidance_is_applied_once(model, inputs):
    spy = Spy(matcher(model, tau=1.0, candidates=8))
    anchors = torch.randint(CODES, (2, N))
    made = janus.generate(model, inputs, matcher=spy, anchors=anchors, guidance=5.0, temperature=0.8)
    ids = inputs["input_ids"]
    nothing = torch.where((ids == BOS) | (ids == BOI), ids, PAD)
    conditional, unconditional = (full_logits(model, prompt, made.tokens) for prompt in (ids, nothing))
    assert (conditional - unconditional).abs().max() > 0.1
    expected = (unconditional + (conditional - unconditional) * 5.0) / 0.8
    torch.testing.assert_close(torch.stack(spy.logits, 1), expected, atol=1e-3, rtol=1e-3)
    assert spy.positions == list(range(N))


def test_the_most_probable_tokens_are_those_of_the_host(model, inputs):
    """The host's own guidance, without this package, as the oracle."""
    host = host_generate(model, inputs, guidance_scale=5, do_sample=False)
    ours = janus.generate(model, inputs, guidance=5.0, top_k=1)
    assert torch.equal(ours.tokens, host)
    assert ours.record is None
    plain = janus.generate(model, inputs, guidance=None, top_k=1)
    assert torch.equal(plain.tokens, full_logits(model, inputs["input_ids"], plain.tokens).argmax(-1))
    assert not torch.equal(plain.tokens, host)


def test_its_own_anchors_bring_the_original_back(model, inputs):
    original = janus.generate(model, inputs, top_k=20, generator=seeded(1, 2))
    edit = janus.generate(
        model, inputs, matcher=matcher(model), anchors=original.tokens, top_k=20, generator=seeded(3, 4)
    )
    assert torch.equal(edit.tokens, original.tokens)
    assert edit.record.counts()["kept"] == [N, N]
    again = janus.generate(model, inputs, top_k=20, generator=seeded(3, 4))
    assert not torch.equal(again.tokens, original.tokens)


def test_a_batch_is_its_rows_and_returned_sequences_share_anchors(model, inputs):
    anchors = torch.randint(CODES, (2, N))
    settings = dict(matcher=matcher(model, tau=0.7, candidates=12, alpha=0.6), top_k=20)
    both = janus.generate(model, inputs, anchors=anchors, generator=seeded(1, 2), **settings)
    for row in range(2):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        alone = janus.generate(model, one, anchors=anchors[row : row + 1], generator=seeded(1 + row), **settings)
        assert torch.equal(alone.tokens[0], both.tokens[row])
    twice = janus.generate(
        model, inputs, anchors=anchors, generator=seeded(1, 8, 2, 9), num_return_sequences=2, **settings
    )
    assert torch.equal(twice.tokens[0::2], both.tokens)
    assert torch.equal(twice.record.anchors, anchors.repeat_interleave(2, 0))


def test_prompts_padded_on_the_left_are_their_rows(model, inputs):
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[0, :3], mask[0, :2] = torch.tensor([PAD, PAD, BOS]), 0
    settings = dict(matcher=matcher(model, tau=0.7, candidates=12, alpha=0.6), top_k=20)
    anchors, padded = torch.randint(CODES, (2, N)), {"input_ids": ids, "attention_mask": mask}
    both = janus.generate(model, padded, anchors=anchors, generator=seeded(1, 2), **settings)
    short = {name: rows[:1, 2:] for name, rows in padded.items()}
    alone = janus.generate(model, short, anchors=anchors[:1], generator=seeded(1), **settings)
    assert torch.equal(alone.tokens[0], both.tokens[0])


def test_pictures_become_the_nearest_codes_and_tokens_become_pixels(model, inputs):
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    codes = janus.encode(model, pixels)
    vq = model.model.vqmodel
    with torch.no_grad():
        latents = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1).flatten(2).transpose(1, 2)
    distances = (latents[:, :, None] - F.normalize(vq.quantize.embedding.weight, dim=-1)).square().sum(-1)
    assert torch.equal(codes, distances.argmin(-1))
    made = janus.generate(model, inputs, matcher=matcher(model), anchors=codes)
    assert torch.equal(made.tokens, codes)
    assert janus.decode(model, made.tokens).shape == (2, 3, 8, 8)


def test_the_image_start_token_is_asked_for_where_the_host_lost_it(model, inputs, monkeypatch):
    expected = janus.generate(model, inputs, top_k=1)
    monkeypatch.delattr(model.generation_config, "generation_kwargs")
    with pytest.raises(ValueError, match=r"image_start: expected the id .* processor\.tokenizer\.boi_token_id"):
        janus.generate(model, inputs, top_k=1)
    assert torch.equal(janus.generate(model, inputs, top_k=1, image_start=BOI).tokens, expected.tokens)
    assert not hasattr(model.generation_config, "generation_kwargs")


def changed(batch, place=None, token=None, **entries):
    found = {name: tensor.clone() for name, tensor in batch.items()}
    if place is not None:
        found["input_ids"][place] = token
    return {**found, **entries}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(place=(slice(None), -1), token=9), "input_ids: expected prompts of image mode.*generation_mode=.*row 0"),
        (dict(place=(1, -1), token=9), "input_ids: expected prompts of image mode.* received 9 at the end of row 1"),
        (dict(place=(1, 2), token=BOI), r"input_ids: expected prompts without pictures .* row\(s\) \[1\]"),
        (dict(place=(0, 2), token=45), r"input_ids: expected prompts without pictures .* row\(s\) \[0\]"),
        (dict(place=(0, 0), token=PAD), "attention_mask: expected zeros where input_ids has padding"),
        (dict(place=(0, 1), token=50), "input_ids: expected ids below the vocabulary's 50"),
        (
            dict(attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2])),
            "attention_mask: expected padding on the left",
        ),
        (dict(attention_mask=torch.ones(2, 5)), r"attention_mask: expected shape \(2, 6\)"),
        (dict(pixel_values=torch.zeros(2, 3, 8, 8)), "pixel_values: expected a prompt of text alone"),
    ],
)
def test_prompts_made_for_something_else_are_refused(model, inputs, change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        janus.generate(model, changed(inputs, **change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_beams=2), "num_beams: expected num_return_sequences"),
        (dict(generation_mode="text"), "generation_mode: expected no other options"),
        (dict(cache=None), "cache: expected no such option"),
        (dict(cache_implementation="static"), "cache_implementation: expected no such option"),
        (dict(use_cache=False), "use_cache: expected no other options"),
        (dict(temperature=0), r"temperature: .*top_k=1 .* \(greedy\)"),
    ],
)
def test_options_that_would_choose_tokens_are_refused(model, inputs, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        janus.generate(model, inputs, **options)


def test_an_unconditional_prompt_that_cannot_be_made_is_refused(model, inputs, monkeypatch):
    monkeypatch.setattr(model.generation_config, "pad_token_id", None)
    with pytest.raises(ValueError, match="model.generation_config.pad_token_id: expected an id, for the unconditional"):
        janus.generate(model, inputs)


def test_processors_that_change_the_choice_are_found_out(model, inputs):
    def first(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([0]), 0.0)

    with pytest.raises(ValueError, match="processors: expected processors that do not change or drop"):
        janus.generate(model, inputs, processors=[first])


def test_pixels_and_tokens_of_something_else_are_refused(model):
    with pytest.raises(ValueError, match="pixels: expected values about -1..1"):
        janus.encode(model, torch.rand(1, 3, 8, 8) * 255)
    with pytest.raises(ValueError, match=r"tokens: expected image tokens alone, received \[40\]"):
        janus.decode(model, torch.full((1, N), CODES)[:, :1])
    with pytest.raises(ValueError, match="tokens: expected 16 per row, received 15"):
        janus.decode(model, torch.zeros(1, N - 1, dtype=torch.long))


def test_a_host_that_does_not_see_its_tokens_is_refused(model, inputs, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.4.0")
    with pytest.raises(NotImplementedError, match=r"transformers: expected 5\.5 or newer .* received 5\.4\.0"):
        janus.generate(model, inputs)


def test_the_host_guiding_too_is_refused(model, inputs):
    processor = AnchorProcessor(janus.grid(model), guidance=5.0, growing=False)
    with pytest.raises(ValueError, match="twice the batch size"):
        host_generate(model, inputs, guidance_scale=5, logits_processor=LogitsProcessorList([processor]))
    for name in ("guidance_scale", "logits_processor"):
        with pytest.raises(ValueError, match=name):
            janus.generate(model, inputs, **{name: None})


def test_a_processor_serves_one_call(model, inputs):
    processor = AnchorProcessor(janus.grid(model), guidance=5.0, growing=False)
    call = dict(guidance_scale=1.0, logits_processor=LogitsProcessorList([processor]))
    host_generate(model, inputs, **call)
    with pytest.raises(ValueError, match=f"processor: expected {N} steps; a processor serves one call"):
        host_generate(model, inputs, **call)


def test_a_processor_without_guidance_is_refused(model, inputs):
    processor = AnchorProcessor(Grid(4, 4), growing=False)
    with pytest.raises(ValueError, match=r"scores: expected 2 rows, as input_ids; guidance=\.\.\..* received 4"):
        host_generate(model, inputs, guidance_scale=1.0, logits_processor=LogitsProcessorList([processor]))
