"""Regions: the biases they make, their errors. tests/methods/test_on_hosts.py holds them to a dense matrix."""

from __future__ import annotations

import math

import pytest
import torch
from watch import Watch

import fastrope as fr

TOKENS = fr.TokenLayout(text=4, target=(2, 4), references=[(2, 3)])
LEFT, RIGHT = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def site(tokens: fr.TokenLayout = TOKENS, **kwargs) -> fr.Site:
    return fr.Site(tokens, axes_dim=(4, 6, 6), **kwargs)


def two(**kwargs) -> fr.Regions:
    return fr.Regions([fr.Region(LEFT, slice(0, 1), [0]), fr.Region(RIGHT, slice(1, 3))], **kwargs)


def test_every_region_is_one_bias_of_its_keys():
    """Small masks are enlarged to the grid: two columns each. Text 3 is of no region."""
    found = {tuple(m.keys.nonzero().flatten().tolist()): m.bias.tolist() for m in two().modulations(site())}
    away, row = -math.inf, [0, 0, -math.inf, -math.inf]
    left = [0, away, away, 0, *row, *row, *[0] * 6]
    right = [away, 0, 0, 0, *reversed(row), *reversed(row), *[away] * 6]
    assert found == {(0, *range(12, 18)): left, (1, 2): right}


def test_text_may_stand_last():
    last = fr.TokenLayout(4, (2, 4), order="text-last", padding=2)
    (found,) = fr.Regions([fr.Region(LEFT, slice(1, 3))]).modulations(site(last))
    assert found.keys.nonzero().flatten().tolist() == [11, 12]
    assert found.bias.isinf().nonzero().flatten().tolist() == [2, 3, 6, 7]


def test_where_it_acts():
    method = two(layers=[1], text_tokens=4)
    assert [len(method.modulations(site(layer=n))) for n in range(2)] == [0, 2]
    assert method.modulations(site(layer=1))[0] is method.modulations(site(layer=1, step=3))[0]
    shorter = fr.TokenLayout(2, (2, 4), [(2, 3)])  # a negative prompt: the reference stays bound, text does not
    (found,) = method.modulations(site(shorter, layer=1))
    assert found.keys.nonzero().flatten().tolist() == list(range(10, 16))
    assert fr.Regions([fr.Region(torch.ones(5, 5), slice(0, 2))], local=True).modulations(site()) == []


def test_memory_grows_with_regions_and_not_with_pairs():
    large = fr.TokenLayout(64, (32, 32), [(32, 32)])
    masks = torch.rand(8, 32, 32, generator=torch.Generator().manual_seed(0))
    regions = [fr.Region(mask, slice(8 * n, 8 * n + 8)) for n, mask in enumerate(masks)]
    found = fr.Regions(regions).modulations(site(large))
    assert len(found) == 8
    assert all(m.bias.shape == m.keys.shape == (len(large),) for m in found)
    q, k, v = torch.randn(3, 1, len(large), 1, 16)
    plan = fr.plan(rope=fr.RoPE.axial(large.positions("flux"), axes_dim=(4, 6, 6)), modulations=found)
    with Watch() as watch:
        fr.attention(q, k, v, plan=plan, backend="sdpa")
    assert watch.largest < len(large) ** 2 * q.element_size() / 8, watch.where


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(mask=torch.zeros(2, 2)), "Region.mask: expected values in 0..1, not all 0"),
    (dict(mask=torch.full((2, 2), 2.0)), "Region.mask: expected values in 0..1"),
    (dict(mask=torch.ones(2, 2, 2)), "Region.mask: expected one mask"), (dict(mask="left"), "Region.mask"),
    (dict(text=3), "Region.text: expected a slice or None"), (dict(text=slice(None, 3)), "Region.text"),
    (dict(text=slice(3, 3)), "Region.text"), (dict(text=slice(0, 4, 2)), "Region.text"),
    (dict(references=0), "Region.references"), (dict(references=[0, 0]), "Region.references"),
])  # fmt: skip
def test_mistakes_of_a_region_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fr.Region(**{"mask": LEFT} | arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    (([],), "Regions.regions"), ((fr.Region(LEFT, slice(0, 1)),), "Regions.regions"),
    (([fr.Region(LEFT)],), "Regions.regions: expected text or references of some region, or local=True"),
    (([fr.Region(LEFT)], 1), "Regions.local"), (([fr.Region(LEFT)], True, 0), "Regions.text_tokens"),
])  # fmt: skip
def test_mistakes_of_regions_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fr.Regions(*arguments)


@pytest.mark.parametrize(("region", "message"), [
    (fr.Region(LEFT, slice(2, 5)), "Region.text: expected a slice of the 4 text tokens"),
    (fr.Region(LEFT, None, [1]), r"Region.references: expected references in \[0, 1\)"),
])  # fmt: skip
def test_sites_that_do_not_fit(region, message):
    with pytest.raises(ValueError, match=message):
        fr.Regions([region]).modulations(site())
