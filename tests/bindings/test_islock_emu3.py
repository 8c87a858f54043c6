"""Emu3, tiny and random, through its own generate: rows, guidance once, anchors, pictures."""

from __future__ import annotations

import math

import pytest
import torch
from anchored import Spy, seeded
from transformers import Emu3Config, Emu3ForConditionalGeneration, LogitsProcessorList

import fastrope as fr
from fastrope.bindings.transformers import AnchorProcessor, emu3

CODES, EOL, FIRST, VOCAB = 32, 60, 20, 64
HEIGHT, WIDTH = 3, 4
N = HEIGHT * WIDTH


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # The vocabulary keeps codes in another order than the codebook, which a mistaken mapping would not survive.
    visual = {f"<|visual token {code:06d}|>": FIRST + code * 7 % CODES for code in range(CODES)}
    config = Emu3Config(
        vocabulary_map={**visual, "<|extra_200|>": EOL, "<image>": 61},
        text_config=dict(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            attention_dropout=0.0,
        ),
        vq_config=dict(
            codebook_size=CODES, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1],
            num_res_blocks=1, attn_resolutions=[1], hidden_size=32, temporal_downsample_factor=1,
        ),
    )  # fmt: skip
    model = Emu3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
        model.get_input_embeddings().weight.mul_(20.0)
    return model


@pytest.fixture
def inputs():
    ids = torch.randint(5, 18, (2, 6))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def negative():
    ids = torch.randint(5, 18, (1, 3)).expand(2, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def matcher(model, tau=math.inf, candidates=CODES, alpha=0.0):
    entries, ids = emu3.codebook(model)
    lock = fr.ISLock(candidates=candidates, alpha=alpha, tau=tau)
    return lock.matcher(entries, num_tokens=N, token_ids=ids)


def random_anchors(rows=2):
    return torch.randint(FIRST, FIRST + CODES, (rows, N))


def stream(tokens):
    """Rows with their end-of-line tokens, as the model sees them."""
    rows = tokens.view(-1, HEIGHT, WIDTH)
    return torch.cat([rows, torch.full_like(rows[..., :1], EOL)], dim=-1).flatten(1)


@torch.no_grad()
def full_logits(model, prompt, tokens):
    """Log-probabilities ``(B, N, V)`` at image tokens from one uncached pass over prompt and rows."""
    sequence = torch.cat([prompt, stream(tokens)], dim=1)
    logits = model(sequence, use_cache=False).logits[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
    return logits.unflatten(1, (HEIGHT, WIDTH + 1))[:, :, :WIDTH].flatten(1, 2)


def test_guidance_is_applied_once_and_rows_are_counted(model, inputs, negative):
    spy = Spy(matcher(model, tau=1.0, candidates=8))
    made = emu3.generate(
        model, inputs, HEIGHT, WIDTH, negative=negative, matcher=spy, anchors=random_anchors(), guidance=3.0,
        temperature=0.8, top_k=0,
    )  # fmt: skip
    assert spy.positions == list(range(N))
    conditional, unconditional = (full_logits(model, prompt["input_ids"], made.tokens) for prompt in (inputs, negative))
    assert (conditional - unconditional).abs().max() > 0.1
    expected = (unconditional + (conditional - unconditional) * 3.0) / 0.8
    image = torch.zeros(VOCAB, dtype=torch.bool)
    image[FIRST : FIRST + CODES] = True
    expected = expected.masked_fill(~image, -torch.inf)
    torch.testing.assert_close(torch.stack(spy.logits, 1), expected, atol=1e-3, rtol=1e-3)


def test_rows_and_their_ends_reach_the_model(model, inputs):
    grid = emu3.grid(model, HEIGHT, WIDTH)
    anchors = random_anchors()
    processor = AnchorProcessor(grid, matcher=matcher(model), anchors=anchors, image_ids=emu3.codebook(model)[1])
    out = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=grid.length, do_sample=True,
        top_k=5, temperature=3.0, logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    generated = out[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(generated, stream(anchors))
    assert torch.equal(grid.flatten(generated), processor.tokens)


def test_the_hosts_prefix_function_may_force_rows_instead(model, inputs, negative):
    """The way the host documents generation; anchors are matched where it leaves a choice, and nowhere else."""
    grid, anchors = emu3.grid(model, HEIGHT, WIDTH), random_anchors()
    processor = AnchorProcessor(grid, matcher=matcher(model), anchors=anchors, force_rows=False)
    length = inputs["input_ids"].shape[1]
    out = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=grid.length, guidance_scale=3.0,
        negative_prompt_ids=negative["input_ids"], negative_prompt_attention_mask=negative["attention_mask"],
        prefix_allowed_tokens_fn=emu3.prefix_function(model, grid, length),
        logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    assert torch.equal(out[:, length:], stream(anchors))


def test_the_most_probable_tokens_are_those_of_the_host(model, inputs, negative):
    grid, length = emu3.grid(model, HEIGHT, WIDTH), inputs["input_ids"].shape[1]
    host = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=grid.length, guidance_scale=3.0,
        do_sample=False, negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"],
        prefix_allowed_tokens_fn=emu3.prefix_function(model, grid, length),
    )  # fmt: skip
    ours = emu3.generate(model, inputs, HEIGHT, WIDTH, negative=negative, guidance=3.0, top_k=1)
    assert torch.equal(ours.tokens, grid.flatten(host[:, length:]))
    plain = emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None, top_k=1)
    assert not torch.equal(plain.tokens, ours.tokens)


def test_its_own_anchors_bring_the_original_back(model, inputs, negative):
    call = dict(negative=negative, top_k=16)
    original = emu3.generate(model, inputs, HEIGHT, WIDTH, generator=seeded(1, 2), **call)
    assert original.record is None
    edit = emu3.generate(
        model, inputs, HEIGHT, WIDTH, matcher=matcher(model), anchors=original.tokens, generator=seeded(3, 4), **call
    )
    assert torch.equal(edit.tokens, original.tokens)
    assert edit.record.counts()["kept"] == [N, N]
    again = emu3.generate(model, inputs, HEIGHT, WIDTH, generator=seeded(3, 4), **call)
    assert not torch.equal(again.tokens, original.tokens)


def test_a_batch_is_its_rows(model, inputs, negative):
    anchors = random_anchors()
    settings = dict(matcher=matcher(model, tau=1.5, candidates=12, alpha=0.6), top_k=20)
    both = emu3.generate(
        model, inputs, HEIGHT, WIDTH, negative=negative, anchors=anchors, generator=seeded(1, 2), **settings
    )
    for row in range(2):
        one, no = ({n: t[row : row + 1] for n, t in batch.items()} for batch in (inputs, negative))
        alone = emu3.generate(
            model,
            one,
            HEIGHT,
            WIDTH,
            negative=no,
            anchors=anchors[row : row + 1],
            generator=seeded(1 + row),
            **settings,
        )
        assert torch.equal(alone.tokens[0], both.tokens[row])
        assert torch.equal(alone.record.accepted[0], both.record.accepted[row])


def test_prompts_padded_on_the_left_are_their_rows(model, inputs, negative):
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[0, :2], mask[0, :2] = 0, 0
    settings = dict(matcher=matcher(model, tau=1.5, candidates=12, alpha=0.6), top_k=20, negative=negative)
    anchors = random_anchors()
    padded = {"input_ids": ids, "attention_mask": mask}
    both = emu3.generate(model, padded, HEIGHT, WIDTH, anchors=anchors, generator=seeded(1, 2), **settings)
    settings["negative"] = {name: rows[:1] for name, rows in negative.items()}
    short = {name: rows[:1, 2:] for name, rows in padded.items()}
    alone = emu3.generate(model, short, HEIGHT, WIDTH, anchors=anchors[:1], generator=seeded(1), **settings)
    assert torch.equal(alone.tokens[0], both.tokens[0])


def test_a_padded_negative_prompt_is_the_short_one(model, inputs, negative):
    padded = {name: torch.cat([torch.zeros(2, 2, dtype=torch.long), rows], 1) for name, rows in negative.items()}
    padded["input_ids"][:, 0] = 7  # hidden by the mask
    anchors, seen = random_anchors(), []
    for prompt in (negative, padded):
        spy = Spy(matcher(model))
        emu3.generate(model, inputs, HEIGHT, WIDTH, negative=prompt, matcher=spy, anchors=anchors, top_k=0)
        seen.append(torch.stack(spy.logits, 1))
    torch.testing.assert_close(seen[1], seen[0], atol=1e-3, rtol=1e-3)


def test_one_negative_prompt_serves_all_rows_and_sequences(model, inputs, negative):
    one = {name: rows[:1] for name, rows in negative.items()}
    call = dict(anchors=random_anchors(), matcher=matcher(model, tau=1.5, candidates=12), top_k=20)
    both = emu3.generate(model, inputs, HEIGHT, WIDTH, negative=negative, generator=seeded(1, 2), **call)
    for given in (one, negative):
        twice = emu3.generate(
            model, inputs, HEIGHT, WIDTH, negative=given, generator=seeded(1, 8, 2, 9), num_return_sequences=2, **call
        )
        assert torch.equal(twice.tokens[0::2], both.tokens)
    three = {name: rows[:1].expand(3, -1) for name, rows in negative.items()}
    with pytest.raises(ValueError, match="negative: expected a number of rows that divides the batch of 2, received 3"):
        emu3.generate(model, inputs, HEIGHT, WIDTH, negative=three, **call)


def test_pictures_become_vocabulary_ids_and_back(model, inputs):
    pixels = torch.rand(2, 3, 2 * HEIGHT, 2 * WIDTH) * 2 - 1
    ids = emu3.encode(model, pixels)
    with torch.no_grad():
        expected = model.model.get_image_tokens(pixels, [(2 * HEIGHT, 2 * WIDTH)] * 2)
    assert torch.equal(stream(ids).flatten(), expected)
    host = torch.cat([stream(ids), torch.zeros(2, 3, dtype=torch.long)], dim=1)  # it drops three tokens after the rows
    theirs = model.decode_image_tokens(image_tokens=host, height=HEIGHT, width=WIDTH)
    torch.testing.assert_close(emu3.decode(model, ids, HEIGHT, WIDTH), theirs)
    made = emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None, matcher=matcher(model), anchors=ids, top_k=0)
    assert torch.equal(made.tokens, ids)


def test_bad_calls_are_named(model, inputs):
    with pytest.raises(ValueError, match="negative: expected a negative prompt"):
        emu3.generate(model, inputs, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="max_new_tokens"):
        emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None, max_new_tokens=3)
    with pytest.raises(ValueError, match="matcher: expected one for the grid's 6 tokens, received 12"):
        emu3.generate(model, inputs, 2, 3, guidance=None, matcher=matcher(model), anchors=random_anchors())
    with pytest.raises(ValueError, match="tokens: expected 12 per row"):
        emu3.decode(model, torch.zeros(1, 5, dtype=torch.long), HEIGHT, WIDTH)
