"""Prompts that nodes join, in the real ComfyUI, held to independent computations. Needs ``COMFYUI_PATH``."""

from __future__ import annotations

import comfyui_models as real
import comfyui_oracle as oracle
import pytest
import torch
from comfyui_models import NEAR, report

import fastrope as fr
from fastrope.bindings.comfyui.marks import new_number
from fastrope.bindings.comfyui.patching import steer
from fastrope.bindings.comfyui.texts import join_negative, join_regions


def half_masks(size):
    """A soft mask over the left half of a picture, and a hard one over the right half."""
    left, right = torch.zeros(1, *size), torch.zeros(1, *size)
    left[..., : size[1] // 2 - 2], left[..., size[1] // 2 - 2 : size[1] // 2] = 1.0, 0.3
    right[..., size[1] // 2 :] = 1.0
    return left, right


def prompts(name, size):
    """What the host's own nodes make of three prompts; those of the halves have references, the last one both."""
    from nodes import ConditioningCombine, ConditioningSetMask

    left, right = half_masks(size)
    references = [real.latent(name, 4, 6, seed=9), real.latent(name, 6, 4, seed=8)] if name in real.EDITS else []
    whole = real.conditioning(name, 3, seed=20)
    parts = [real.conditioning(name, 4, 21, references[:1]), real.conditioning(name, 6, 22, references)]
    parts = [ConditioningSetMask().append(part, mask, "default", 1.0)[0] for part, mask in zip(parts, (left, right))]  # noqa: B905
    return ConditioningCombine().combine(whole, ConditioningCombine().combine(*parts)[0])[0]


def regional(model, name, **dials):
    """What the node Regions gives, and the weights of every query and key."""
    grid, patch = ((8, 12), 1) if name == "flux2" else ((4, 6), 2)
    number = new_number()
    method, joined = join_regions(model.model, prompts(name, (16, 24)), number, **dials)
    masks = [torch.nn.functional.interpolate(m[None], grid, mode="area").flatten() for m in half_masks((16, 24))]
    text = {"flux2": 512, "z-image": 32}.get(name, 13)
    first = text - 13 if name == "flux2" else 0
    filler = {"z-image": 8}.get(name, 0)
    owners = [set()] * (first + 3) + [{0}] * 4 + [{1}] * 6 + [set()] * (text - first - 13 + grid[0] * grid[1] + filler)
    if name in real.EDITS:
        owners += [{0, 1}] * (24 // patch**2) + [{1}] * (24 // patch**2)
    return steer(model, method, number=number), joined, oracle.regions(owners, masks, text, dials.get("local", False))


def unmarked(joined):
    ((text, options),) = joined
    return [[text, {key: value for key, value in options.items() if key != "model_conds"}]]


@pytest.mark.parametrize("name", real.MODELS)
@pytest.mark.parametrize("local", [False, True], ids=["", "local"])
def test_regions_equal_a_dense_mask(name, local, capsys):
    model = real.patcher(name)
    steered, joined, weight = regional(model, name, local=local)
    negative = real.conditioning(name, 13, seed=3, references=joined[0][1].get("reference_latents", ()))
    rule = oracle.dense(weight)

    def positive_alone(q, k, v, options, ids):
        plain = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        apart = options["cond_or_uncond"] == [0]
        return rule(q, k, v, options, ids) if apart else oracle.softmax(plain, v)

    found = real.sample(steered, name, joined, negative, cfg=2.0, noise=real.latent(name, batch=2))
    run = dict(negative=[*negative], cfg=2.0, noise=real.latent(name, batch=2))
    apart = [[unmarked(joined)[0][0], {**unmarked(joined)[0][1], "model_conds": {"apart": Apart()}}]]
    expected = real.sample(oracle.patched(model, positive_alone), name, apart, **run)
    report(capsys, f"Regions, {name}, local {local}", found, expected)
    assert not torch.allclose(found, real.sample(model, name, unmarked(joined), **run), rtol=0, atol=1e-3)
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("name", real.MODELS)
def test_regions_go_with_other_nodes_in_any_order(name, capsys):
    grag = fr.GRAG(0.9, 1.4) if name in real.EDITS else fr.GRAG(1.0, 1.0, 1.2, 0.8)

    found = []
    for order in ("rgf", "fgr", "grf"):
        model, joined = real.patcher(name), None
        for node in order:
            if node == "r":
                model, joined, _ = regional(model, name)
            else:
                model = steer(model, grag) if node == "g" else real.foreign(model)
        found.append(real.sample(model, name, joined))
    report(capsys, f"Regions, GRAG and a foreign override in three orders, {name}", found[1], found[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2e-6)
    alone, joined, _ = regional(real.patcher(name), name)
    assert not torch.allclose(real.sample(alone, name, joined), found[0], rtol=0, atol=1e-3)


DIALS = dict(scale=4.0, tau=1.4, alpha=0.4)


def opposed(model, name, **dials):
    """What the node NAG gives for a prompt and a shorter negative one, and both prompts."""
    references = [real.latent(name, 4, 6, seed=9)] if name in real.EDITS else []
    positive, negative = real.conditioning(name, 5, 20, references), real.conditioning(name, 3, 21)
    number = new_number()
    count, joined = join_negative(model.model, positive, negative, number)
    return steer(model, fr.NAG(**{**DIALS, **dials}, negative=count), number=number), joined, positive, negative


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen"])
@pytest.mark.parametrize("batch", [1, 2])
def test_nag_equals_two_passes_over_one_picture(name, batch, capsys):
    model = real.patcher(name)
    steered, joined, positive, negative = opposed(model, name)
    texts = [each[0][0] for each in (positive, negative)]
    if name == "flux2":
        texts = [torch.nn.functional.pad(text, (0, 0, 512 - text.shape[1], 0)) for text in texts]
    expected = oracle.patched(model, oracle.nag(**DIALS, sizes=[text.shape[1] for text in texts]))
    expected.add_wrapper_with_key("apply_model", "two passes", oracle.twice(texts))
    run = dict(noise=real.latent(name, batch=batch))
    found, expected = real.sample(steered, name, joined, **run), real.sample(expected, name, positive, **run)
    report(capsys, f"NAG, {name}, batch {batch}", found, expected)
    assert not torch.allclose(found, real.sample(model, name, positive, **run), rtol=0, atol=1e-3)
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen"])
def test_nag_beside_other_nodes_in_any_order_and_compiled(name, capsys):
    real.comfy()
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    grag, found = fr.GRAG(0.9, 1.4), []
    first, joined, *_ = opposed(real.patcher(name), name)
    second, again, *_ = opposed(steer(real.patcher(name), grag), name)
    for model, text in ((steer(first, grag), joined), (second, again)):
        found.append(real.sample(model, name, text))
    compiled = second.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    found.append(real.sample(compiled, name, again))
    report(capsys, f"NAG and GRAG in both orders, {name}", found[1], found[0])
    report(capsys, f"NAG and GRAG, compiled, {name}", found[2], found[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=2e-4)
    assert not torch.allclose(real.sample(first, name, joined), found[0], rtol=0, atol=1e-3)


def test_nag_and_regions_in_both_orders(capsys):
    found = []
    for order in ("nr", "rn"):
        model, given = real.patcher("flux2"), prompts("flux2", (16, 24))
        for node in order:
            number = new_number()
            if node == "n":
                count, joined = join_negative(model.model, given[:1], real.conditioning("flux2", 3, 21), number)
                model, given = steer(model, fr.NAG(**DIALS, negative=count), number=number), [*joined, *given[1:]]
            else:
                method, given = join_regions(model.model, given, number)
                model = steer(model, method, number=number)
        found.append(real.sample(model, "flux2", given))
    report(capsys, "NAG and Regions in both orders, flux2", found[1], found[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-6)


class Apart:
    """A condition that keeps a text out of the batches of others."""

    cond = 0

    def process_cond(self, batch_size, **kwargs):
        return self

    def can_concat(self, other):
        return other is self

    def concat(self, others):
        return self.cond

    def size(self):
        return [1]
