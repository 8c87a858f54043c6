"""NAG in bound transformers, against two passes over one image: a batch whose rows differ in the text alone."""

from __future__ import annotations

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
from types import SimpleNamespace

from diffusers_hosts import TINY_HOSTS, assert_differ, assert_same, grag_like, run
from pages import DOCS, run_snippets
from untwisting_calls import call_of, source_of

from fastrope.guidance import normalised_guidance

DIALS = dict(scale=4.0, tau=1.4, alpha=0.4)
SIZES = {"flux": (3, 3), "kontext": (5, 2), "chroma": (4, 4), "flux2": (5, 3), "qwen": (3, 4)}  # of the two prompts


def by_hand(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """NAG's formulas on ``(S, H * D)``, one token after the other."""
    made = []
    for good, bad in zip(positive.double(), negative.double(), strict=True):
        pushed = DIALS["scale"] * good - (DIALS["scale"] - 1) * bad
        growth = pushed.abs().sum() / good.abs().sum()
        pushed = pushed * min(float(growth), DIALS["tau"]) / growth
        made.append(DIALS["alpha"] * pushed + (1 - DIALS["alpha"]) * good)
    return torch.stack(made)


class TwoPasses:
    """Attention of one prompt's rows and then of the other's; the image is guided in both, so it stays one image."""

    def __init__(self, attend, mask, text: int, guided=True):
        self.attend, self.mask, self.text, self.guided = attend, mask, text, guided

    def __call__(self, q, k, v):
        self.attend.key_mask = self.mask
        out = self.attend(q, k, v)
        half = len(out) // 2
        for row in range(half if self.guided else 0):
            image = by_hand(out[row, self.text :], out[half + row, self.text :]).to(out.dtype)
            out[row, self.text :] = out[half + row, self.text :] = image
        if not self.guided:
            out[half:, self.text :] = out[:half, self.text :]
        return out


def calls(host, sizes: tuple[int, int]):
    """A call with both prompts in one text, and the same as two rows per picture with a mask over the text."""
    grids = host.layout.target_grid, host.layout.reference_grids
    both, longest = sum(sizes), max(sizes)
    joined = fr.TokenLayout(both, *grids)
    apart = fr.TokenLayout(longest, *grids)
    call = host.call(joined, batch=2, dtype=torch.float32)
    texts = call["encoder_hidden_states"].split(sizes, dim=1)
    rows = [torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[1])) for t in texts]
    double = {n: torch.cat([x, x]) if isinstance(x, torch.Tensor) and len(x) == 2 and n != "txt_ids" else x
              for n, x in call.items()}  # fmt: skip
    double["encoder_hidden_states"] = torch.cat(rows)
    if "txt_ids" in call:
        double["txt_ids"] = host.call(apart, batch=2, dtype=torch.float32)["txt_ids"]
    if "img_shapes" in call:
        double["img_shapes"] = call["img_shapes"] * 2
    mask = torch.ones(4, len(apart), dtype=torch.bool)
    for n, size in enumerate(sizes):
        mask[2 * n : 2 * n + 2, size:longest] = False
    return joined, call, apart, double, mask


@pytest.mark.parametrize(
    ("name", "grag"),
    [("flux", False), ("kontext", False), ("kontext", True), ("chroma", False), ("flux2", True), ("qwen", False)],
)
def test_it_equals_two_passes_over_one_image(name, grag):
    host, sizes = TINY_HOSTS[name], SIZES[name]
    model = host.build()
    joined, call, apart, double, mask = calls(host, sizes)
    if "attention_mask" in double:
        double.pop("attention_mask")
    twice = TwoPasses(host.attend(grag_like(apart) if grag else [], apart), mask, apart.text_tokens)
    with host.by_formulas(model, twice):
        expected = run(model, double)[:2]
    method = fr.NAG(**DIALS, negative=sizes[1])
    with fr.apply(model, method, *(grag_like(joined) if grag else [])) as handle:
        out = run(model, call)
        handle.update(fr.NAG(**DIALS | {"scale": 1.0}, negative=sizes[1]))
        alone = run(model, call)
    with fr.apply(model, method, *(grag_like(joined) if grag else []), rotation="host"):
        assert_same(run(model, call), expected, 1e-5)
    assert_same(out, expected, 1e-5)
    assert_differ(alone, out)
    if not grag:
        with host.by_formulas(model, TwoPasses(host.attend([], apart), mask, apart.text_tokens, guided=False)):
            assert_same(alone, run(model, double)[:2], 1e-5)


def test_where_it_is_inactive_the_prompts_stay_apart():
    host = TINY_HOSTS["flux"]
    model = host.build()
    _, call, *_ = calls(host, (3, 3))
    with fr.apply(model, fr.NAG(scale=1.0)) as handle:
        apart = run(model, call)
        for inactive in (fr.NAG(**DIALS, layers=[]), fr.At(fr.NAG(**DIALS), layers=[])):
            handle.update(inactive)
            assert torch.equal(run(model, call), apart)
        handle.update(fr.At(fr.NAG(**DIALS), layers=slice(2)))
        some = run(model, call)
        handle.update(fr.NAG(**DIALS, layers=slice(2)))
        assert torch.equal(run(model, call), some)
        assert_differ(some, apart)
    for rotation in ("op", "host"):
        with fr.apply(model, fr.NAG(**DIALS, layers=slice(2)), rotation=rotation):
            assert_same(run(model, call), some, 1e-5)


def test_the_norm_of_the_guided_attention_is_bounded():
    positive, negative = torch.randn(2, 2, 7, 3, 4)
    out = normalised_guidance(positive, negative, 9.0, 1.5, 1.0)
    growth = out.abs().sum((2, 3)) / positive.abs().sum((2, 3))
    assert growth.max() <= 1.5 + 1e-5
    assert growth.max() > 1.49
    torch.testing.assert_close(normalised_guidance(positive, negative, 1.0, 1.5, 0.7), positive)
    assert torch.equal(normalised_guidance(positive * 0, negative * 0, 4.0, 2.0, 0.5), positive * 0)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: fr.NAG(tau=0), "NAG.tau"),
        (lambda: fr.NAG(alpha=1.1), "NAG.alpha"),
        (lambda: fr.NAG(negative=0), "NAG.negative"),
        (lambda: fr.NAG(), "prompt_embeds: expected as many tokens"),
        (lambda: fr.NAG(negative=5), "NAG.negative: expected fewer than the 5 tokens"),
        (lambda: [fr.NAG(negative=2), fr.NAG(negative=2)], "one method that guides"),
    ],
)  # fmt: skip
def test_mistakes_are_named(method, message):
    host = TINY_HOSTS["flux"]
    model = host.build()
    with pytest.raises(ValueError, match=message), fr.apply(model, method()):
        run(model, host.call(host.layout, dtype=torch.float32))


def test_hosts_that_cannot_are_refused():
    z_image = TINY_HOSTS["z-image"]
    model = z_image.build()
    with fr.apply(model, fr.NAG(negative=16)), pytest.raises(NotImplementedError, match="begins with the text"):
        run(model, z_image.call(z_image.layout, dtype=torch.float32))


def test_the_page_runs(monkeypatch, capsys):
    """docs/nag.md, with a tiny transformer called once in the place of a pipeline."""
    host, seen = TINY_HOSTS["flux"], []

    class Small:
        transformer = host.build()

        def encode_prompt(self, prompt, prompt_2, max_sequence_length):
            return torch.randn(1, 4, 32), torch.randn(1, 32), None

        def __call__(self, prompt_embeds, pooled_prompt_embeds, **arguments):
            layout = fr.TokenLayout(prompt_embeds.shape[1], host.layout.target_grid)
            call = host.call(layout, batch=1, dtype=torch.float32)
            call |= dict(encoder_hidden_states=prompt_embeds, pooled_projections=pooled_prompt_embeds)
            seen.append(type(self.transformer.transformer_blocks[0].attn.processor.layer))
            return SimpleNamespace(images=[run(self.transformer, call)])

        def to(self, device):
            return self

    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", lambda name, torch_dtype: Small())
    found = run_snippets(DOCS / "nag.md", capsys)
    assert found["both"].shape == (1, 8, 32)
    assert found["image"].isfinite().all()
    assert len(seen) == 1


def test_a_bias_per_key_counts_where_its_keys_are():
    """On the keys of the prompt it equals a bias of their logits."""
    host = TINY_HOSTS["flux"]
    model = host.build()
    joined, call, *_ = calls(host, (3, 4))
    per_key = torch.zeros(len(joined))
    per_key[:3] = 0.7
    found = []
    for modulation in (fr.KeyBias(per_key), fr.LogitBias(torch.full((len(joined),), 0.7), keys=slice(3)), []):
        with fr.apply(model, fr.NAG(**DIALS, negative=4), modulation):
            found.append(run(model, call))
    assert_same(found[0], found[1], 1e-5)
    assert_differ(found[0], found[2])


def test_a_value_per_batch_row_stays_one_where_as_many_keys_are_left():
    """The image's part holds two of four keys, as many as there are rows."""
    host = TINY_HOSTS["flux"]
    model = host.build()
    joined, call, *_ = calls(host, (3, 4))
    found = []
    for gain in (torch.tensor([0.2, 3.0]), torch.tensor([[0.2], [3.0]]), torch.tensor([[3.0], [0.2]])):
        keys = [1, 2, joined.target.start, joined.target.start + 1]
        with fr.apply(model, fr.NAG(**DIALS, negative=4), fr.ValueGain(gain, keys=torch.tensor(keys))):
            found.append(run(model, call))
    assert_same(found[0], found[1], 1e-6)
    assert_differ(found[0], found[2])


def test_a_query_without_keys_gives_zeros():
    """Token 2 of the prompt sees nothing: the model is that whose attention gives it zeros."""
    host = TINY_HOSTS["flux"]
    model = host.build()
    joined, call, *_ = calls(host, (3, 3))
    bias = torch.zeros(len(joined))
    bias[2] = -torch.inf
    with fr.apply(model, fr.NAG(**DIALS), fr.LogitBias(bias, keys=slice(None))):
        assert run(model, call).isfinite().all()


def test_beside_a_shared_reference_it_is_refused():
    host = TINY_HOSTS["flux"]
    model = host.build()
    call = {n: x.float() for n, x in call_of(host, 4, 2, (2, 4)).items()}
    source = source_of(host, {n: x.float() for n, x in call_of(host, 4, 1, (2, 4)).items()})
    for reference in (source, fr.ReferenceCache(source)):
        with (
            fr.apply(model, fr.UntwistingRoPE(), fr.NAG(**DIALS), reference=reference),
            pytest.raises(NotImplementedError, match="NAG: expected no shared reference"),
        ):
            run(model, call)
