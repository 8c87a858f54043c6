"""Nodes that join prompts, against doubles of the host's classes: Regions."""

from __future__ import annotations

import comfyui_doubles as host
import comfyui_oracle as oracle
import pytest
import torch
from comfyui_doubles import run_node as run

import fastrope as fr
from fastrope.bindings.comfyui.patching import steer
from fastrope.bindings.comfyui.texts import Joined

NEAR = dict(rtol=0, atol=5e-6)
COMMON, LEFT, RIGHT = (host.picture(4, 6, seed=n) for n in (5, 6, 7))


@pytest.fixture
def nodes(monkeypatch):
    """Node classes by their ids."""
    return host.node_classes(monkeypatch)


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
        (lambda mask: [*masked(mask), *masked(mask, 0)], "prompt 2: expected a prompt with text tokens"),
        (lambda mask: [*host.conditioning(), *masked(mask, guidance=2.5)],
         "prompt 2: expected the guidance of the prompt for the whole.*behind Regions, received 2.5 beside None"),
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
