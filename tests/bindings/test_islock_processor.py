"""The processor in generate() of a plain causal model with Lumina-mGPT's vocabulary, tiny and random."""

from __future__ import annotations

import math

import pytest
import torch
from anchored import Spy
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

import fastrope as fr
from fastrope.bindings.transformers import AnchorProcessor, Grid, lumina

HEIGHT, WIDTH = 2, 4
N = HEIGHT * WIDTH
VOCAB = 9000
CODES = 8192


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=8710,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(rows=2):
    ids = torch.randint(8900, VOCAB, (rows, 4))
    return torch.cat([ids, torch.tensor(lumina.prefix(HEIGHT, WIDTH)).expand(rows, -1)], dim=1)


def matcher(model, tau=math.inf, candidates=CODES, alpha=0.0):
    entries, ids = lumina.codebook(model)
    lock = fr.ISLock(candidates=candidates, alpha=alpha, tau=tau, metric="cosine")
    return lock.matcher(entries, num_tokens=N, token_ids=ids)


def run(model, ids, processor, grid, **options):
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=grid.length, do_sample=True, top_k=50,
        logits_processor=LogitsProcessorList([processor]), **options,
    )  # fmt: skip
    return out[:, ids.shape[1] :]


def test_ids_and_rows_are_luminas(model):
    entries, ids = lumina.codebook(model)
    assert (int(ids[0]), int(ids[-1]), len(ids)) == (4, 8195, CODES)
    assert torch.equal(entries[5], model.get_input_embeddings().weight[9])
    grid = lumina.grid(HEIGHT, WIDTH)
    assert (grid.newline, grid.length, grid.lead) == (8803, HEIGHT * (WIDTH + 1) + 1, 0)
    assert lumina.grid(HEIGHT, WIDTH, from_start=True).raster(3) == 0
    with pytest.raises(ValueError, match="height, width: expected even numbers"):
        lumina.grid(3, 4)
    assert lumina.prefix(48, 32) == [8197, 8804 + 24, 8804 + 16]
    with pytest.raises(ValueError, match="height, width: expected even numbers"):
        lumina.prefix(3, 4)


def test_rows_end_with_new_lines_and_anchors_fill_them(model):
    grid, ids = lumina.grid(HEIGHT, WIDTH), prompt()
    anchors = torch.randint(4, 8196, (2, N))
    processor = AnchorProcessor(grid, matcher=matcher(model), anchors=anchors, image_ids=lumina.codebook(model)[1])
    out = run(model, ids, processor, grid)
    assert out[:, -1].tolist() == [8196, 8196]
    out = out[:, :-1].view(2, HEIGHT, WIDTH + 1)
    assert torch.equal(out[..., :WIDTH].flatten(1), anchors)
    assert bool((out[..., WIDTH] == lumina.NEW_LINE).all())
    assert torch.equal(processor.record.tokens, anchors)
    assert processor.record.counts()["kept"] == [N, N]


def test_start_and_sizes_are_written_where_they_are_generated(model):
    grid, ids = lumina.grid(HEIGHT, WIDTH, from_start=True), torch.randint(8900, VOCAB, (2, 4))
    anchors = torch.randint(4, 8196, (2, N))
    processor = AnchorProcessor(grid, matcher=matcher(model), anchors=anchors, image_ids=lumina.codebook(model)[1])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=grid.length, do_sample=False,
        logits_processor=LogitsProcessorList([processor]),
    )[:, ids.shape[1] :]  # fmt: skip
    assert out[:, :3].tolist() == [lumina.prefix(HEIGHT, WIDTH)] * 2
    assert torch.equal(grid.flatten(out), anchors)


def test_what_comes_before_an_unknown_opening_is_the_models(model):
    ids = torch.randint(8900, VOCAB, (2, 4))
    grid = Grid(HEIGHT, WIDTH, lead=3, opening=(7,))
    processor = AnchorProcessor(grid, image_ids=lumina.codebook(model)[1])
    call = dict(attention_mask=torch.ones_like(ids), do_sample=False)
    out = model.generate(
        ids, max_new_tokens=grid.length, logits_processor=LogitsProcessorList([processor]), **call
    )[:, 4:]  # fmt: skip
    free = model.generate(ids, max_new_tokens=2, **call)
    assert torch.equal(out[:, :2], free[:, 4:])
    assert out[:, 2].tolist() == [7, 7]


@pytest.mark.parametrize("change", ["size", "padding", "text"])
def test_prompts_that_end_elsewhere_are_refused(model, change):
    """Another size, padding on the right, no image start: one check of the last tokens."""
    ids = prompt()
    if change == "size":
        ids[1, -1] += 1
    elif change == "padding":
        ids = torch.cat([ids, torch.ones(2, 1, dtype=torch.long)], dim=1)
    else:
        ids = ids[:, :4]
    grid = lumina.grid(HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"input_ids: expected prompts that end with \[8197, 8805, 8806\]"):
        run(model, ids, AnchorProcessor(grid, image_ids=lumina.codebook(model)[1]), grid)


def test_later_processors_that_change_the_choice_are_found_out(model):
    grid, ids = lumina.grid(HEIGHT, WIDTH), prompt()

    def first(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([4]), 0.0)

    processor = AnchorProcessor(grid, image_ids=lumina.codebook(model)[1])
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=grid.length,
        logits_processor=LogitsProcessorList([processor, first]),
    )  # fmt: skip
    for name in ("tokens", "record"):
        with pytest.raises(ValueError, match=r"processor: expected a generate\(\) that appends the chosen"):
            getattr(processor, name)


def test_a_doubled_batch_is_guided_once_and_stays_in_step(model):
    grid, ids = lumina.grid(HEIGHT, WIDTH), prompt(4)
    spy = Spy(matcher(model, tau=0.9, candidates=20))
    anchors = torch.randint(4, 8196, (2, N))
    processor = AnchorProcessor(grid, matcher=spy, anchors=anchors, guidance=4.0, image_ids=lumina.codebook(model)[1])
    out = run(model, ids, processor, grid)
    assert torch.equal(out[:2], out[2:])
    assert torch.equal(grid.flatten(out[:2]), processor.tokens)
    with torch.no_grad():
        logits = model(torch.cat([ids, out], 1)).logits[:, ids.shape[1] - 1 : -1]
    expected = logits[2:] + (logits[:2] - logits[2:]) * 4.0
    steps = [grid.step(index) for index in range(N)]
    found = torch.stack(spy.logits, 1)[..., 4:8196]
    torch.testing.assert_close(found, expected[:, steps, 4:8196], atol=1e-4, rtol=1e-4)
    assert bool(torch.isneginf(spy.logits[0][:, :4]).all())


def test_later_warpers_and_seeds_change_nothing(model):
    grid, ids = lumina.grid(HEIGHT, WIDTH), prompt()
    found = []
    for temperature in (0.1, 5.0):
        torch.manual_seed(round(temperature))  # of the host's own sampling
        processor = AnchorProcessor(
            grid, image_ids=lumina.codebook(model)[1], generator=torch.Generator().manual_seed(7)
        )
        found.append(run(model, ids, processor, grid, temperature=temperature))
        assert processor.record is None
    assert torch.equal(*found)
    assert bool(torch.isin(grid.flatten(found[0]), lumina.codebook(model)[1]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_keep_their_dtype_and_one_finite_entry(dtype):
    processor = AnchorProcessor(Grid(1, 2, newline=3), top_k=4)
    ids = torch.zeros(2, 5, dtype=torch.long)
    for step in range(3):
        out = processor(ids, torch.randn(2, 10, dtype=dtype))
        assert out.dtype == dtype
        assert torch.isfinite(out).sum(1).tolist() == [1, 1]
        assert step < 2 or out.argmax(1).tolist() == [3, 3]
        ids = torch.cat([ids, out.argmax(1, keepdim=True)], dim=1)
    after = torch.randn(2, 10, dtype=dtype)
    assert torch.equal(processor(ids, after), after)


def test_bad_arguments_are_named(model):
    grid = Grid(HEIGHT, WIDTH)
    anchors = torch.zeros(1, N, dtype=torch.long)
    for arguments, message in [
        (dict(grid=(2, 3)), "grid: expected a Grid"),
        (dict(grid=grid, anchors=anchors), "anchors: expected a matcher and anchors, or neither"),
        (dict(grid=Grid(2, 2), anchors=anchors, matcher=matcher(model)), "matcher: expected one for the grid's 4"),
        (dict(grid=grid, temperature=0), r"temperature: .* top_k=1 takes the most probable token \(greedy\)"),
        (dict(grid=grid, guidance=math.nan), "guidance"), (dict(grid=grid, top_k=2.0), "top_k"),
        (dict(grid=grid, top_p=1.5), "top_p"), (dict(grid=grid, image_ids=torch.zeros(2, 2)), "image_ids"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            AnchorProcessor(**arguments)


def test_bad_calls_are_named():
    ids = torch.zeros(2, 5, dtype=torch.long)
    processor = AnchorProcessor(Grid(1, 2))
    processor(ids, torch.zeros(2, 10))
    with pytest.raises(ValueError, match="input_ids: expected 6 columns, one more per step; .* received 5"):
        processor(ids, torch.zeros(2, 10))
    with pytest.raises(ValueError, match="input_ids: expected 2 rows, as at first"):
        processor(torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 10))
    with pytest.raises(ValueError, match="scores: expected twice the rows"):
        AnchorProcessor(Grid(1, 2), guidance=2.0)(ids[:1], torch.zeros(3, 10))
    with pytest.raises(ValueError, match="image_ids: expected ids of a vocabulary of 10"):
        AnchorProcessor(Grid(1, 2), image_ids=torch.tensor([3, 10]))(ids, torch.zeros(2, 10))
    with pytest.raises(ValueError, match="processor: expected one that has run"):
        _ = AnchorProcessor(Grid(1, 2)).tokens
