"""LlamaGen under ISLock: generation, warping, text."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from anchored import Spy, seeded
from tiny_llamagen import TINY, N, matcher
from torch.nn import functional as F

import fastrope as fr
from fastrope import device as devices
from fastrope.bindings import llamagen
from fastrope.bindings.llamagen.generate import warp
from fastrope.bindings.llamagen.text import pad_left

# dim, layers, feed-forward width of the published checkpoints.


@pytest.fixture
def model() -> llamagen.LlamaGen:
    model = llamagen.LlamaGen(TINY).eval()
    with torch.no_grad():
        model.output.weight.mul_(4.0)  # enough contrast for guidance and top-k to matter
    return model


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, TINY.prefix, TINY.caption_dim)


@pytest.mark.parametrize("masked", [False, True])
def test_cached_and_guided_logits_are_those_of_two_full_passes(model, features, masked):
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]]) if masked else None
    spy = Spy(matcher(tau=0.8, candidates=10))
    anchors = torch.randint(TINY.vocabulary, (2, N))
    made = llamagen.generate(
        model, features, mask=mask, matcher=spy, anchors=anchors, guidance=3.0, temperature=0.7, top_k=0,
        generator=seeded(1, 2),
    )  # fmt: skip
    assert spy.positions == list(range(N))
    shown = features if mask is None else features * mask[..., None]
    nothing = model.cls_embedding.uncond_embedding.expand(2, -1, -1)
    conditional = model(made.tokens[:, :-1], shown, mask)
    unconditional = model(made.tokens[:, :-1], nothing, mask)
    expected = (unconditional + (conditional - unconditional) * 3.0) / 0.7
    torch.testing.assert_close(torch.stack(spy.logits, 1), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(made.record.tokens, made.tokens)


def test_without_guidance_only_the_condition_runs(model, features):
    spy = Spy(matcher())
    anchors = torch.randint(TINY.vocabulary, (2, N))
    made = llamagen.generate(model, features, matcher=spy, anchors=anchors, guidance=None, top_k=0)
    torch.testing.assert_close(torch.stack(spy.logits, 1), model(made.tokens[:, :-1], features), atol=2e-5, rtol=1e-4)


def test_its_own_anchors_bring_the_original_back(model, features):
    original = llamagen.generate(model, features, top_k=20, generator=seeded(1, 2))
    assert original.record is None
    assert not torch.equal(original.tokens[0], original.tokens[1])
    edit = llamagen.generate(
        model, features, matcher=matcher(), anchors=original.tokens, top_k=20, generator=seeded(3, 4)
    )
    assert torch.equal(edit.tokens, original.tokens)
    assert edit.record.counts() == {"kept": [N, N], "moved": [0, 0], "fallback": [0, 0], "free": [0, 0]}
    assert not edit.record.distance.any()


def test_foreign_anchors_move_tokens_and_the_window_shrinks(model, features):
    anchors = torch.randint(TINY.vocabulary, (1, N), generator=seeded(5)[0])
    lock = dict(tau=0.8, candidates=15, alpha=0.6)
    edit = llamagen.generate(
        model, features[:1], matcher=matcher(**lock), anchors=anchors, top_k=20, generator=seeded(2)
    )
    counts = {name: found[0] for name, found in edit.record.counts().items()}
    assert min(counts[name] for name in ("kept", "moved", "fallback")) > 0
    assert sum(counts.values()) == N
    assert edit.record.window[0].tolist() == [math.floor(15 * (10 * N - 6 * i) / (10 * N)) for i in range(N)]
    assert bool((edit.record.distance[edit.record.accepted] <= 0.8).all())
    assert bool((edit.record.distance[edit.record.fallback] > 0.8).all())


def test_a_batch_is_its_rows(model, features):
    anchors = torch.randint(TINY.vocabulary, (2, N))
    settings = dict(matcher=matcher(tau=0.8, candidates=10, alpha=0.6), top_k=20)
    both = llamagen.generate(model, features, anchors=anchors, generator=seeded(1, 2), **settings)
    for row in range(2):
        alone = llamagen.generate(
            model, features[row : row + 1], anchors=anchors[row : row + 1], generator=seeded(1 + row), **settings
        )
        assert torch.equal(alone.tokens[0], both.tokens[row])
        for name in ("window", "accepted"):
            assert torch.equal(getattr(alone.record, name)[0], getattr(both.record, name)[row])


@pytest.mark.skipif(not devices.interpreted(), reason="runs the interpreted kernel")
def test_the_kernel_makes_the_image_of_the_reference(features):
    model = llamagen.LlamaGen(llamagen.LlamaGenConfig(**{**TINY.__dict__, "grid": 2})).eval()
    anchors, lock = torch.randint(TINY.vocabulary, (2, 4)), dict(tau=0.8, candidates=20, num_tokens=4)
    made = [
        llamagen.generate(
            model, features, matcher=matcher(**lock, backend=name), anchors=anchors, generator=seeded(1, 2)
        )
        for name in ("eager", "triton")
    ]
    assert torch.equal(made[0].tokens, made[1].tokens)
    assert made[0].record.counts() == made[1].record.counts()


def test_free_positions_are_sampled_as_without_anchors(model, features):
    original = llamagen.generate(model, features, top_k=20, generator=seeded(1, 2))
    anchors = torch.full((1, N), -1)
    free = llamagen.generate(model, features, matcher=matcher(), anchors=anchors, top_k=20, generator=seeded(1, 2))
    assert torch.equal(free.tokens, original.tokens)
    assert free.record.counts()["free"] == [N, N]


def test_hidden_features_do_not_matter(model, features):
    mask = torch.tensor([[False, False, True, True, True]] * 2)
    changed = features.clone()
    changed[:, :2] = 100.0
    runs = [llamagen.generate(model, f, mask=mask, top_k=20, generator=seeded(1, 2)) for f in (features, changed)]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    unmasked = llamagen.generate(model, changed, top_k=20, generator=seeded(1, 2))
    assert not torch.equal(runs[0].tokens, unmasked.tokens)


def test_class_conditions():
    config = llamagen.LlamaGenConfig(**{**TINY.__dict__, "condition": "class", "prefix": 1, "classes": 7})
    model = llamagen.LlamaGen(config).eval()
    spy = Spy(matcher())
    labels, anchors = torch.tensor([3, 6]), torch.randint(TINY.vocabulary, (1, N))
    made = llamagen.generate(model, labels, matcher=spy, anchors=anchors, guidance=2.0, top_k=0)
    conditional, nothing = (model(made.tokens[:, :-1], c) for c in (labels, torch.tensor([7, 7])))
    expected = nothing + (conditional - nothing) * 2.0
    torch.testing.assert_close(torch.stack(spy.logits, 1), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(made.tokens, anchors.expand(2, -1))


@pytest.mark.parametrize(("condition", "guidance", "top_k"), [("text", 7.5, 1000), ("class", 4.0, 2000)])
def test_the_defaults_are_the_published_ones_of_the_condition(condition, guidance, top_k):
    shapes = {**TINY.__dict__, "condition": condition, "vocabulary": 3000, "prefix": 5 if condition == "text" else 1}
    model = llamagen.LlamaGen(llamagen.LlamaGenConfig(**shapes)).eval()
    given = torch.randn(1, 5, 12) if condition == "text" else torch.tensor([3])
    lock = fr.ISLock(candidates=9).matcher(torch.randn(3000, 8), num_tokens=N)
    call, seen = dict(matcher=lock, anchors=torch.zeros(1, N, dtype=torch.long)), []
    for settings in ({}, dict(guidance=guidance, top_k=top_k)):
        spy = Spy(lock)
        llamagen.generate(model, given, **{**call, "matcher": spy}, generator=seeded(1), **settings)
        seen.append(torch.stack(spy.logits, 1))
    assert torch.isfinite(seen[0]).sum(-1).unique().tolist() == [top_k]
    assert torch.equal(*seen)


def test_labels_of_no_class_are_refused():
    config = llamagen.LlamaGenConfig(**{**TINY.__dict__, "condition": "class", "prefix": 1, "classes": 7})
    model = llamagen.LlamaGen(config).eval()
    for label in (-1, 8):
        with pytest.raises(ValueError, match=rf"condition: expected labels below 7.* received \[{label}\]"):
            llamagen.generate(model, torch.tensor([3, label]))


def test_anchors_of_another_vocabulary_are_refused(model, features):
    anchors = torch.full((1, N), TINY.vocabulary)
    with pytest.raises(ValueError, match="anchors: expected ids of the matcher's codebook"):
        llamagen.generate(model, features, matcher=matcher(), anchors=anchors)
    small = fr.ISLock().matcher(torch.randn(9, 4), num_tokens=N)
    with pytest.raises(ValueError, match="matcher: expected one of 48 codes, received 9"):
        llamagen.generate(model, features, matcher=small, anchors=torch.zeros(1, N, dtype=torch.long))


def test_another_default_device_changes_nothing(features):
    tokens = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model = llamagen.LlamaGen(TINY).eval()  # its rotation table is not made yet
        lock, anchors = matcher(tau=0.8, candidates=10), torch.zeros(1, N, dtype=torch.long)
        with torch.device(device):
            original = llamagen.generate(model, features, generator=seeded(1, 2))
            made = llamagen.generate(model, features, matcher=lock, anchors=anchors, generator=seeded(1, 2))
        tokens.append(torch.stack([original.tokens, made.tokens]))
    assert torch.equal(*tokens)


def test_low_precision_runs_and_logits_are_float32(model, features):
    spy = Spy(matcher())
    half = model.to(torch.bfloat16)
    made = llamagen.generate(half, features, matcher=spy, anchors=torch.zeros(1, N, dtype=torch.long), top_k=0)
    assert spy.logits[0].dtype == torch.float32
    assert made.tokens.shape == (2, N)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(condition=torch.zeros(2, 4, 12)), r"condition: expected shape \(B, 5, 12\)"),
        (dict(condition=torch.zeros(2, 5, 12, dtype=torch.long)), "condition: expected floating-point"),
        (dict(mask=torch.ones(2, 4, dtype=torch.bool)), r"mask: expected shape \(2, 5\)"),
        (
            dict(mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])),
            r"mask: expected padding on the left.*row\(s\) \[1\]",
        ),
        (dict(mask=torch.zeros(2, 5)), "mask: expected a token that counts"),
        (dict(mask=torch.tensor([[-1e4, 0, 0, 0, 0]] * 2)), "mask: expected 1 where a token counts"),
        (dict(condition=torch.full((2, 5, 12), math.nan)), "condition: expected finite values"),
        (
            dict(condition=F.pad(torch.ones(2, 3, 12), (0, 0, 2, 0))),
            "mask: expected the mask of condition",
        ),
        (dict(guidance=math.inf), "guidance: expected a finite number"),
        (dict(anchors=torch.zeros(2, N, dtype=torch.long)), "anchors: expected a matcher and anchors"),
        (dict(temperature=0.0), r"temperature: expected a finite number > 0; top_k=1 .* \(greedy\), received 0.0"),
        (dict(top_k=-1), "top_k"),
        (dict(top_p=0.0), "top_p"),
    ],
)
def test_bad_calls_are_named(model, features, change, message):
    arguments = {"condition": features, **change}
    with pytest.raises(ValueError, match=message):
        llamagen.generate(model, arguments.pop("condition"), **arguments)


def test_a_matcher_of_another_size_is_refused(model, features):
    """Its window would shrink at another pace."""
    anchors = torch.zeros(1, N, dtype=torch.long)
    wrong = fr.ISLock().matcher(torch.zeros(TINY.vocabulary, 8), num_tokens=2 * N)
    with pytest.raises(ValueError, match="matcher: expected one for the model's 16 tokens, received 32"):
        llamagen.generate(model, features, matcher=wrong, anchors=anchors)


def test_impossible_configurations_are_refused():
    for change, name in [
        (dict(condition="video"), "condition"), (dict(heads=3), "dim"), (dict(kv_heads=4), "kv_heads"),
        (dict(condition="class"), "prefix"), (dict(grid=0), "grid"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: "):
            llamagen.LlamaGenConfig(**{**TINY.__dict__, **change})
    with pytest.raises(ValueError, match="size: expected one of B, L, XL, XXL, 3B"):
        llamagen.LlamaGenConfig.published("7B")


def test_it_needs_no_host_library():
    code = """
import sys
for name in ("transformers", "diffusers", "matplotlib", "PIL"):
    sys.modules[name] = None  # what an installation without them looks like
import torch
from fastrope.bindings import llamagen
shapes = dict(dim=32, layers=1, heads=2, grid=2, vocabulary=16, prefix=3, caption_dim=4, hidden=16)
model = llamagen.LlamaGen(llamagen.LlamaGenConfig(**shapes)).eval()
print(llamagen.generate(model, torch.randn(1, 3, 4), top_k=5).tokens.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "torch.Size([1, 4])", done.stderr


# ---- warping and text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 7, 1.0), (2.0, 0, 0.6), (1.3, 9, 0.8)]
)
def test_warping_is_that_of_transformers(temperature, top_k, top_p):
    from fastrope.bindings.transformers.processor import warpers

    logits = torch.randn(5, 40).double() * 2
    logits[:, 3] = -torch.inf
    theirs = warpers(temperature, top_k, top_p)(torch.zeros(5, 1, dtype=torch.long), logits)
    torch.testing.assert_close(warp(logits, temperature, top_k, top_p), theirs)


def test_features_move_to_the_end():
    features = torch.arange(1, 9, dtype=torch.float).view(2, 4, 1)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    moved, shown = pad_left(features, mask)
    assert moved[..., 0].tolist() == [[0, 0, 1, 2], [5, 6, 7, 8]]
    assert shown.tolist() == [[False, False, True, True], [True] * 4]


def test_prompts_are_encoded_by_a_t5_encoder():
    from transformers import T5Config, T5EncoderModel

    class Words:
        """A tokenizer: one id per letter of the first words' lengths."""

        def __call__(self, prompts, max_length, padding, truncation, return_tensors):
            assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
            ids = torch.zeros(len(prompts), max_length, dtype=torch.long)
            for row, prompt in enumerate(prompts):
                assert prompt == prompt.lower()
                words = [len(word) for word in prompt.split(" ")]
                ids[row, : len(words)] = torch.tensor(words)
            return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    config = T5Config(vocab_size=20, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    encoder = T5EncoderModel(config).eval()
    features, mask = llamagen.encode_prompts(["A red   Fox", "sea"], encoder=encoder, tokenizer=Words(), length=5)
    assert mask.tolist() == [[False, False, True, True, True], [False] * 4 + [True]]
    ids = torch.tensor([[1, 3, 3, 0, 0]])
    with torch.no_grad():
        expected = encoder(ids, attention_mask=(ids > 0).long()).last_hidden_state[0, :3]
    torch.testing.assert_close(features[0, 2:], expected)
    assert not features[0, :2].any()
    with pytest.raises(ValueError, match="tokenizer"):
        llamagen.encode_prompts(["x"], encoder=encoder)
