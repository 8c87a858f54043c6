"""Nodes that join prompts, against doubles of the host's classes: Regions and NAG."""

from __future__ import annotations

import comfyui_doubles as host
import comfyui_oracle as oracle
import pytest
import torch
from comfyui_api import node_classes
from comfyui_api import run_node as run

import fastrope as fr
from fastrope.bindings.comfyui.marks import Joined
from fastrope.bindings.comfyui.patching import steer

NEAR = dict(rtol=0, atol=5e-6)
COMMON, LEFT, RIGHT = (host.picture(4, 6, seed=n) for n in (5, 6, 7))


@pytest.fixture
def nodes(monkeypatch):
    """Node classes by their ids."""
    return node_classes(monkeypatch)


def masked(mask, tokens=4, seed=1, strength=1.0, **options):
    """What Conditioning (Set Mask) makes of a prompt."""
    options = {"mask": mask[None], "mask_strength": strength, "set_area_to_bounds": False, **options}
    return host.conditioning(tokens, seed, **options)


def halves():
    """A soft mask over the left, four times as fine as the tokens, and a hard one over the right."""
    left, right = torch.zeros(16, 24), torch.zeros(4, 6)
    left[:, :8], left[:, 8:12], right[:, 3:] = 1.0, 0.25, 1.0
    return left, right


def prompts():
    """One for the whole picture and two for its halves, with reference latents of their own and in common."""
    left, right = halves()
    return [
        *host.conditioning(3, 2, references=[COMMON]),
        *masked(left, 4, 3, 0.5, references=[LEFT, COMMON.clone()]),
        *masked(right, 2, 4, references=[RIGHT]),
    ]


def attending(model, rule, rows=(0,)):
    """A clone whose attention is ``rule`` in calls of the positive prompt, or of the negative one."""
    before = model.model_options["transformer_options"].get("optimized_attention_override")

    def override(func, q, k, v, heads, **kwargs):
        options = kwargs["transformer_options"]
        if options["cond_or_uncond"] != list(rows):
            return before(func, q, k, v, heads, **kwargs) if before else func(q, k, v, heads, **kwargs)
        out = rule(*(x.double() for x in (q, k, v)), options, None)
        return out.transpose(1, 2).flatten(2).float()

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


def unmarked(joined):
    """The same conditioning without our mark."""
    ((text, options),) = joined
    return host.become([[text, {**options, "model_conds": {}}]])


# ---- Regions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True])
def test_regions_equal_a_dense_mask(nodes, local):
    model, negative = host.tiny(), host.prompt(9, 8, [host.picture(4, 6, seed=n) for n in (5, 6, 7)])
    steered, joined = run(nodes["FastRoPE_Regions"], model, regions=prompts(), local=local).args
    left, right = halves()
    inside = [0.5 * left[::4, ::4].flatten(), right.flatten()]
    owners = [set()] * 3 + [{0}] * 4 + [{1}] * 2 + [set()] * 24 + [set()] * 6 + [{0}] * 6 + [{1}] * 6
    rule = oracle.dense(oracle.regions(owners, inside, 9, local))
    found = host.sample(steered, host.become(joined), negative)
    torch.testing.assert_close(found, host.sample(attending(model, rule), unmarked(joined), negative), **NEAR)
    assert not torch.allclose(found, host.sample(model, unmarked(joined), negative), rtol=0, atol=1e-3)


def test_a_region_that_is_the_whole_picture_changes_no_bit(nodes):
    model = host.tiny()
    steered, joined = run(nodes["FastRoPE_Regions"], model, regions=masked(torch.ones(8, 8), guidance=2.5)).args
    assert torch.equal(host.sample(steered, host.become(joined)), host.sample(model, unmarked(joined)))
    ((_, options),) = joined
    assert options.keys() == {"pooled_output", "guidance", "model_conds"}


def test_regions_go_with_a_window_of_steps_and_with_other_nodes(nodes):
    node, grag = nodes["FastRoPE_Regions"], fr.GRAG(0.9, 1.4)
    first, joined = run(node, host.tiny(), regions=prompts()).args
    second, again = run(node, steer(host.tiny(), grag), regions=prompts()).args
    found = host.sample(steer(first, grag), host.become(joined))
    torch.testing.assert_close(host.sample(second, host.become(again)), found, rtol=0, atol=1e-6)
    late, other = run(node, host.tiny(), regions=prompts(), start_percent=0.5, layers="0-1").args
    outs = [host.sample(first, host.become(joined)), host.sample(late, host.become(other)), found]
    assert len({out.sum().item() for out in outs}) == 3


def test_both_prompts_may_have_regions(nodes):
    """Each node acts on the text that it joined."""
    node, model, (left, right) = nodes["FastRoPE_Regions"], host.tiny(), halves()
    first, positive = run(node, model, regions=[*host.conditioning(2), *masked(left)]).args
    both, negative = run(node, first, regions=[*host.conditioning(2, 5), *masked(right, 4, 6)]).args
    found = host.sample(both, host.become(positive), host.become(negative))
    rules = [oracle.dense(oracle.regions([set()] * 2 + [{0}] * 4 + [set()] * 24, [m], 6)) for m in
             (left[::4, ::4].flatten(), right.flatten())]  # fmt: skip

    expected = attending(attending(model, rules[0]), rules[1], [1])
    expected = host.sample(expected, unmarked(positive), unmarked(negative))
    torch.testing.assert_close(found, expected, **NEAR)


def test_a_text_is_padded_as_the_host_would(nodes):
    """FLUX.2: zeros before a text of fewer than 512 tokens."""
    model = host.tiny(model=type("Flux2", (host.BaseModel,), {}))
    _, joined = run(nodes["FastRoPE_Regions"], model, regions=prompts()).args
    mark = Joined.of(joined[0][1])
    assert (joined[0][0].shape[1], mark.padding) == (512, 503)
    assert not joined[0][0][:, :503].any()


# ---- NAG ------------------------------------------------------------------------------------------------------------

DIALS = dict(scale=4.0, tau=1.4, alpha=0.4)


def sides():
    """A prompt with a reference, and a shorter negative one."""
    return host.conditioning(5, 1, references=[COMMON], guidance=2.5), host.conditioning(3, 2)


def test_nag_equals_two_passes_over_one_picture(nodes):
    model, (positive, negative), x = host.tiny(), sides(), host.picture(batch=2, seed=6)
    steered, joined = run(nodes["FastRoPE_NAG"], model, positive=positive, negative=negative, **DIALS).args
    expected = attending(model, oracle.nag(**DIALS, sizes=(5, 3)))
    expected.add_wrapper_with_key("apply_model", "two passes", oracle.twice([positive[0][0], negative[0][0]]))
    found = host.sample(steered, host.become(joined), x=x)
    torch.testing.assert_close(found, host.sample(expected, unmarked(positive), x=x), **NEAR)
    assert not torch.allclose(found, host.sample(model, unmarked(positive), x=x), rtol=0, atol=1e-3)
    plain = host.prompt(8, 3, [0.5 * COMMON])
    with_guidance = host.sample(steered, host.become(joined), plain)
    assert not torch.equal(with_guidance, host.sample(model, unmarked(joined), plain))


def test_nag_keeps_its_window_and_its_layers(nodes):
    node, (positive, negative) = nodes["FastRoPE_NAG"], sides()
    ends = dict(scale=1.0), dict(end_percent=0.01), {}, dict(start_percent=0.5), dict(layers="0-1")
    pairs = [run(node, host.tiny(), positive=positive, negative=negative, **{**DIALS, **end}).args for end in ends]
    outs = [host.sample(model, host.become(joined)) for model, joined in pairs]
    assert torch.equal(outs[0], outs[1])
    assert len({out.sum().item() for out in outs}) == 4


def test_nag_regions_and_other_nodes_in_any_order(nodes):
    """Also on FLUX.2, where texts are padded in front."""
    (_, negative), grag = sides(), fr.GRAG(0.9, 1.4)

    def nag(model, given):
        (first, *others) = given
        model, joined = run(nodes["FastRoPE_NAG"], model, positive=[first], negative=negative, **DIALS).args
        return model, [*joined, *others]

    def regions(model, given):
        return run(nodes["FastRoPE_Regions"], model, regions=given).args

    for name in ("Flux", "Flux2"):
        found = []
        for order in ((nag, regions, grag), (regions, grag, nag), (grag, regions, nag), (regions,), (nag,)):
            model, given = host.tiny(model=type(name, (host.BaseModel,), {})), prompts()
            for node in order:
                model, given = (steer(model, node), given) if node is grag else node(model, given)
            found.append(host.sample(model, host.become(given[:1]), x=host.picture(8, 12)))
        for other in found[1:3]:
            torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)
        assert not any(torch.allclose(found[0], other, rtol=0, atol=1e-3) for other in found[3:])


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_half_a_wiring_is_told_before_the_run(nodes):
    steered, joined = run(nodes["FastRoPE_Regions"], host.tiny(), regions=prompts()).args
    with pytest.raises(
        ValueError, match="conditioning: expected at the sampler, that of the node Regions.*both outputs"
    ):
        host.sample(steered, host.prompt())
    with pytest.raises(ValueError, match="model: expected at the sampler, that of the node Regions.*both outputs"):
        host.sample(steer(host.tiny(), fr.GRAG(1.0, 1.0)), host.become(joined))
    ((text, options),) = joined
    with pytest.raises(ValueError, match="conditioning: expected the 9 text tokens that Regions joined"):
        host.sample(steered, host.become([[torch.cat([text, text], dim=1), options]]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda mask: [], "regions: expected a CONDITIONING"),
        (lambda mask: host.conditioning(), "regions: expected a prompt with a mask, from Conditioning .Set Mask."),
        (lambda mask: masked(0 * mask), "regions, prompt 1: Region.mask: expected values in 0..1, not all 0"),
        (lambda mask: masked(mask, strength=2.0), "prompt 1: expected a strength of its mask above 0 and at most 1"),
        (lambda mask: masked(mask, set_area_to_bounds=True), "prompt 1: expected set_cond_area: default"),
        (lambda mask: masked(mask.expand(2, -1, -1)), "prompt 1: expected one mask, received a batch of 2"),
        (lambda mask: [*masked(mask), *host.conditioning(area=(8, 8, 0, 0))], "prompt 2: expected a mask, from"),
        (lambda mask: [*masked(mask), *masked(mask, 0)], "prompt 2: expected a prompt with text tokens"),
        (lambda mask: [*host.conditioning(), *masked(mask, guidance=2.5)],
         "prompt 2: expected the guidance of the others; put the node that sets it behind Regions, received 2.5 bes"),
        (lambda mask: [*masked(mask), [torch.zeros(1, 4, 16), {}]], r"prompt 2: expected \(batch, channels\) of"),
        (lambda mask: masked(mask, attention_mask=torch.ones(1, 7)), "prompt 1: expected an attention_mask over its"),
    ],
)  # fmt: skip
def test_regions_that_make_no_sense_are_told_at_the_node(nodes, given, said):
    with pytest.raises(ValueError, match=said):
        run(nodes["FastRoPE_Regions"], host.tiny(), regions=given(torch.ones(4, 6)))
    _, joined = run(nodes["FastRoPE_Regions"], host.tiny(), regions=prompts()).args
    with pytest.raises(ValueError, match="prompt 1: expected no regions yet"):
        run(nodes["FastRoPE_Regions"], host.tiny(), regions=[*joined, *masked(torch.ones(4, 6))])


@pytest.mark.parametrize(
    ("positive", "negative", "said"),
    [
        (prompts, host.conditioning, "positive: expected one prompt; Regions joins several, received 3 of them"),
        (host.conditioning, prompts, "negative: expected one prompt"),
        (host.conditioning, lambda: host.conditioning(guidance=3.0),
         "negative, prompt 1: expected the guidance of the others; put the node that sets it behind NAG"),
        (host.conditioning, lambda: host.conditioning(references=[LEFT]), "negative: expected no reference latent bes"),
        (host.conditioning, lambda: [[torch.zeros(1, 4, 16), {}]], r"negative: expected \(batch, channels\) of the"),
    ],
)  # fmt: skip
def test_negative_prompts_that_make_no_sense_are_told_at_the_node(nodes, positive, negative, said):
    with pytest.raises(ValueError, match=said):
        run(nodes["FastRoPE_NAG"], host.tiny(), positive=positive(), negative=negative())


def test_nag_is_refused_where_it_cannot_work(nodes):
    node, (positive, negative) = nodes["FastRoPE_NAG"], sides()
    model = host.tiny(model=type("Lumina2", (host.BaseModel,), {}))
    model.model.diffusion_model.__class__ = type("NextDiT", (host.Flux,), {"pad_tokens_multiple": 32})
    with pytest.raises(NotImplementedError, match=r"Flux\.2 or Qwen-Image, received Z-Image, which mixes the words"):
        run(node, model, positive=positive, negative=negative)
    moved = host.tiny()
    moved.model.diffusion_model.params.txt_ids_dims = [0]
    moved.model.diffusion_model.pe_embedder.__class__ = type("Dynamic", (host.EmbedND,), {})
    elsewhere, joined = run(node, moved, positive=positive, negative=negative).args
    with pytest.raises(NotImplementedError, match="positions: expected the host's own.*NAG, on a model whose text"):
        host.sample(elsewhere, host.become(joined))
    steered, joined = run(node, host.tiny(), positive=positive, negative=negative).args
    with pytest.raises(ValueError, match="positive: expected a prompt without a negative one"):
        run(node, steered, positive=joined, negative=negative)
    with pytest.raises(ValueError, match="negative: expected a prompt of an encoder"):
        run(node, steered, positive=positive, negative=joined)
    for beside in (run(nodes["FastRoPE_Inspect"], steered).args[0], steer(steered, fr.UntwistingRoPE(reference=0))):
        with pytest.raises(NotImplementedError, match="NAG: expected neither Inspect attention nor Untwisting RoPE"):
            host.sample(beside, host.become(joined))
