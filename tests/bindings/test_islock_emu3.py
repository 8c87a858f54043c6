"""Emu3, tiny and random, through its own generate: rows, guidance once, anchors, pictures."""

from __future__ import annotations

import math
import re

import pytest
import torch
from anchored import Spy, prefix_function, seeded
from torch.nn import functional as F
from transformers import Emu3Config, Emu3ForConditionalGeneration, GenerationConfig, LogitsProcessorList

import fastrope as fr
from fastrope.bindings.transformers import AnchorProcessor, emu3

CODES, EOL, PICTURE, FIRST, VOCAB = 32, 60, 61, 20, 64
ENDS = {(3, 4): [52, 55, 57, 56, 53], (2, 3): [52, 54, 57, 55, 53]}  # image start, height, *, width, image token
HEIGHT, WIDTH = 3, 4
N = HEIGHT * WIDTH


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # The vocabulary keeps codes in another order than the codebook, which a mistaken mapping would not survive.
    visual = {f"<|visual token {code:06d}|>": FIRST + code * 7 % CODES for code in range(CODES)}
    words = {word: 52 + place for place, word in enumerate([emu3.IMAGE_START, emu3.IMAGE_TOKEN, *"234*"])}
    config = Emu3Config(
        vocabulary_map={**visual, **words, "<|extra_200|>": EOL, "<image>": PICTURE},
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
        for layer in model.model.text_model.layers:
            layer.self_attn.o_proj.weight.mul_(200.0)  # all prompts end alike: let what comes before matter
    return model


def prompts(words, size=(HEIGHT, WIDTH)):
    """What the host's processor makes of ``words (B, S)``."""
    ids = torch.cat([words, torch.tensor(ENDS[size]).expand(len(words), -1)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def inputs():
    return prompts(torch.randint(5, 18, (2, 6)))


@pytest.fixture
def negative():
    return prompts(torch.randint(5, 18, (1, 3)).expand(2, -1))


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
        prefix_allowed_tokens_fn=prefix_function(model, grid, length),
        logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    assert torch.equal(out[:, length:], stream(anchors))


def test_the_most_probable_tokens_are_those_of_the_host(model, inputs, negative):
    grid, length = emu3.grid(model, HEIGHT, WIDTH), inputs["input_ids"].shape[1]
    host = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=grid.length, guidance_scale=3.0,
        do_sample=False, negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"],
        prefix_allowed_tokens_fn=prefix_function(model, grid, length),
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


def swapped(batch, **entries):
    return {**{name: tensor.clone() for name, tensor in batch.items()}, **entries}


def padded_right(batch):
    ids, mask = (F.pad(batch[name], (0, 2)) for name in ("input_ids", "attention_mask"))
    return swapped(batch, input_ids=ids, attention_mask=mask)


def with_token(batch, token, row=1, place=2):
    ids = batch["input_ids"].clone()
    ids[row, place] = token
    return swapped(batch, input_ids=ids)


def masked(batch, *places, dtype=torch.long):
    mask = batch["attention_mask"].clone()
    for place in places:
        mask[place] = 0
    return swapped(batch, attention_mask=mask.to(dtype))


FOREIGN = [
    (padded_right, r"attention_mask: expected padding on the left.*padding_side = \"left\".*row\(s\) \[0, 1\]"),
    (lambda b: masked(b, (1, 3)), r"attention_mask: expected padding on the left.* in row\(s\) \[1\]"),
    (
        lambda b: masked(b, 1),
        r"attention_mask: expected a token that counts in every row, received none in row\(s\) \[1\]",
    ),
    (lambda b: swapped(b, attention_mask=torch.zeros(2, 11).fill_(-1e4)), "attention_mask: expected 1 where a token"),
    (lambda b: swapped(b, attention_mask=torch.ones(2, 10)), r"attention_mask: expected shape \(2, 11\)"),
    (lambda b: swapped(b, attention_mask=torch.ones(2, 1, 11, 11)), "attention_mask: expected shape"),
    (lambda b: {"input_ids": b["input_ids"]}, "attention_mask: expected one, from"),
    (
        lambda b: with_token(b, 0, 0, 0),
        r"attention_mask: expected zeros where input_ids has padding.*ones in row\(s\) \[0\]",
    ),
    (
        lambda b: with_token(b, FIRST + 3),
        r"input_ids: expected prompts without image tokens, received some in row\(s\) \[1\]",
    ),
    (lambda b: with_token(b, EOL), "input_ids: expected prompts without image tokens"),
    (lambda b: with_token(b, PICTURE), "input_ids: expected prompts without image tokens"),
    (lambda b: with_token(b, VOCAB), "input_ids: expected ids below the vocabulary's 64"),
    (lambda b: swapped(b, input_ids=b["input_ids"].float()), "input_ids: expected integers"),
    (lambda b: swapped(b, input_ids=b["input_ids"][0]), r"input_ids: expected shape \(B, S\)"),
    (lambda b: with_token(b, 7, place=-1), "input_ids: expected <|image start|>3"),  # of text mode, in one row alone
    (
        lambda b: prompts(b["input_ids"][:, :6], (2, 3)),
        r"input_ids: expected .* at the end: 3 x 4 tokens.*received '2\*3",
    ),
    (
        lambda b: swapped(b, image_sizes=torch.tensor([[3, 4], [4, 3]])),
        "image_sizes: expected 3 x 4 tokens in every row",
    ),
    (lambda b: swapped(b, pixel_values=torch.zeros(2, 3, 8, 8)), "pixel_values: expected a prompt of text alone"),
    (lambda b: swapped(b, inputs_embeds=torch.zeros(2, 11, 32)), "inputs_embeds: expected a prompt of text alone"),
    (lambda b: swapped(b, token_type_ids=torch.ones(2, 11)), "token_type_ids: expected a prompt of text alone"),
    (lambda b: b["input_ids"], ".*: expected what processor.* returns, received Tensor"),
]


@pytest.mark.parametrize(("change", "message"), FOREIGN)
@pytest.mark.parametrize("negated", [False, True], ids=["prompt", "negative"])
def test_prompts_made_for_something_else_are_refused(model, inputs, negative, change, message, negated):
    message = message.replace("<|", re.escape("<|")).replace("|>", re.escape("|>"))
    batches = (inputs, change(swapped(inputs))) if negated else (change(inputs), negative)
    with pytest.raises(ValueError, match=("negative" if negated else "^") + ".*" * negated + message):
        emu3.generate(model, batches[0], HEIGHT, WIDTH, negative=batches[1], guidance=3.0)


def test_what_the_processor_adds_is_accepted(model, inputs):
    plain = emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None, top_k=1)
    more = swapped(inputs, image_sizes=[[HEIGHT, WIDTH]] * 2, token_type_ids=torch.zeros(2, 11, dtype=torch.long))
    more["attention_mask"] = more["attention_mask"].bool()
    assert torch.equal(emu3.generate(model, more, HEIGHT, WIDTH, guidance=None, top_k=1).tokens, plain.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_beams=4), "num_beams: expected num_return_sequences"),
        (dict(do_sample=False), "do_sample: expected top_k=1"),
        (dict(past_key_values=None), "past_key_values: expected no such option: every call"),
        (
            dict(generation_config=GenerationConfig(temperature=0.5)),
            "generation_config: expected the arguments of this",
        ),
        (dict(max_new_tokens=3), "max_new_tokens: expected no such option: the grid"),
        (dict(eos_token_id=EOL), "eos_token_id: expected no other options than"),
        (dict(assistant_model=None), "assistant_model: expected no other options than"),
        (dict(repetition_penalty=1.3), "repetition_penalty: expected no other options than"),
        (dict(stopping_criteria=[]), "stopping_criteria: expected no other options"),
        (dict(output_scores=True), "output_scores: expected no other options"),
        (dict(num_return_sequences=0), "num_return_sequences: expected an integer >= 1"),
    ],
)
def test_options_that_would_choose_tokens_are_refused(model, inputs, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None, **options)


@pytest.mark.parametrize(
    ("name", "value"), [("num_beams", 3), ("repetition_penalty", 1.2), ("suppress_tokens", [3]), ("min_p", 0.1)]
)
def test_a_generation_config_that_would_choose_tokens_is_refused(model, inputs, monkeypatch, name, value):
    monkeypatch.setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"^model.generation_config.{name}: expected"):
        emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None)


def test_the_sampling_of_the_models_own_config_gives_way(model, inputs, monkeypatch):
    plain = emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None, top_k=8, generator=seeded(1, 2))
    for name, value in dict(do_sample=False, top_k=3, return_dict_in_generate=True, max_length=12).items():
        monkeypatch.setattr(model.generation_config, name, value)
    again = emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None, top_k=8, generator=seeded(1, 2))
    assert torch.equal(again.tokens, plain.tokens)


def test_processors_that_change_the_choice_are_found_out(model, inputs):
    def first(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([FIRST]), 0.0)

    with pytest.raises(ValueError, match="expected"):
        emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None, top_k=8, processors=[first])


def test_codes_instead_of_vocabulary_ids_are_refused(model, inputs):
    """They have no codebook row, so that every position would be free."""
    codes = torch.randint(15, (2, N))
    with pytest.raises(ValueError, match="anchors: expected ids of the matcher's codebook .*vocabulary ids"):
        emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None, matcher=matcher(model), anchors=codes)
    with pytest.raises(ValueError, match="tokens: expected image tokens alone"):
        emu3.decode(model, codes, HEIGHT, WIDTH)
    entries, _ = emu3.codebook(model)
    without = fr.ISLock().matcher(entries, num_tokens=N)  # its ids were forgotten
    with pytest.raises(ValueError, match="anchors: expected ids of the matcher's codebook"):
        emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None, matcher=without, anchors=random_anchors() + 12)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 6, 8, dtype=torch.uint8), "pixels: expected a floating dtype"),
        (torch.rand(1, 3, 6, 8) * 255, "pixels: expected values about -1..1"),
        (torch.full((1, 3, 6, 8), torch.nan), "pixels: expected finite values"),
        (torch.rand(1, 3, 5, 8), "pixels: expected sides that are multiples of 2"),
        (torch.rand(1, 6, 8, 3), r"pixels: expected shape \(B, 3, H, W\)"),
    ],
)
def test_pictures_of_another_range_are_refused(model, pixels, message):
    with pytest.raises(ValueError, match=message):
        emu3.encode(model, pixels)


def test_bad_calls_are_named(model, inputs):
    with pytest.raises(ValueError, match="negative: expected a negative prompt"):
        emu3.generate(model, inputs, HEIGHT, WIDTH)
    small = prompts(inputs["input_ids"][:, :6], (2, 3))
    with pytest.raises(ValueError, match="matcher: expected one for the grid's 6 tokens, received 12"):
        emu3.generate(model, small, 2, 3, guidance=None, matcher=matcher(model), anchors=random_anchors())
    with pytest.raises(ValueError, match="tokens: expected 12 per row"):
        emu3.decode(model, torch.full((1, 5), FIRST), HEIGHT, WIDTH)
    with pytest.raises(
        ValueError, match=r"temperature: expected a finite number > 0; top_k=1 .*\(greedy\), received 0"
    ):
        emu3.generate(model, inputs, HEIGHT, WIDTH, guidance=None, temperature=0)
