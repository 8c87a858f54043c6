"""The methods on every host that edits pictures: against the binding's reference processors, and steered, where the
estimate is decoded by whatever the pipeline does with its latents."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import fastrope as fr

diffusers = pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).resolve().parents[1] / "bindings"))
import diffusers_hosts as hosts  # noqa: E402
import tiny_pipelines  # noqa: E402
import tiny_transformers  # noqa: E402
from methods.oracle import dilated  # noqa: E402

EDITORS = {
    "kontext": (tiny_pipelines.kontext_pipeline, tiny_pipelines.kontext_generate),
    "flux2": (tiny_pipelines.flux2_pipeline, tiny_pipelines.flux2_generate),
    "qwen edit": (partial(tiny_pipelines.qwen_pipeline, diffusers.QwenImageEditPipeline), tiny_pipelines.qwen_generate),
    "qwen edit plus": (tiny_pipelines.qwen_pipeline, tiny_pipelines.qwen_generate),
}


def through(pipe, call_as):
    """A pipeline whose calls are handed to ``call_as``."""

    class Through(type(pipe)):
        def __call__(self, **arguments):
            return call_as(**arguments)

    Through.__module__ = type(pipe).__module__
    found = object.__new__(Through)
    found.__dict__.update(pipe.__dict__)
    return found


WITH_REFERENCES = {name: host for name, host in hosts.TINY_HOSTS.items() if host.layout.reference_grids}
ON_HOSTS = pytest.mark.parametrize("host", WITH_REFERENCES.values(), ids=WITH_REFERENCES)


def check(host, method, mods, **arguments) -> None:
    """A method on a call of two rows equals the reference processors with modulations put down by hand."""
    model, call = host.build().double(), host.call(host.layout)
    with host.by_formulas(model, host.attend(mods, **arguments)):
        expected = tiny_transformers.run(model, call)
    with fr.apply(model, method) as handle:
        handle.set_step(0)
        out = tiny_transformers.run(model, call)
    hosts.assert_same(out, expected, 1e-10)
    hosts.assert_differ(out, tiny_transformers.run(model, call))


@ON_HOSTS
def test_grag(host):
    """Text of 5 tokens, a target of 3 x 5, references of 2 x 3 and 4 x 3."""
    spans = [slice(20, 26), slice(26, 38)][: len(host.layout.reference_grids)]
    deltas = [0.6, 1.4][: len(spans)]
    check(
        host,
        fr.GRAG(bias=1.2, delta=deltas, text_delta=0.9),
        [fr.BiasDelta(1.2, delta, keys=span) for delta, span in zip(deltas, spans, strict=True)]
        + [fr.BiasDelta(1.0, 0.9, keys=slice(0, 5))],
    )


# Text of 5 tokens, a target of 3 x 5, references of 2 x 3 and 4 x 3. One or two hosts, because the plans are the same.
PER_TOKEN = torch.zeros(38, dtype=torch.float64)
PER_TOKEN[1], PER_TOKEN[3] = math.log(3), -math.inf
BIASES = {
    "strength": (
        fr.ReferenceStrength([3, 0]),
        [fr.LogitBias(math.log(3), keys=slice(20, 26)), fr.LogitBias(-math.inf, keys=slice(26, 38))],
    ),
    "words": (fr.PromptWeights({1: 3, 3: 0}), [fr.KeyBias(PER_TOKEN)]),
    "negative words": (
        fr.PromptWeights([1, -2, 1, 1, 0.5], on="values"),
        [fr.ValueGain(-2.0, keys=slice(1, 2)), fr.ValueGain(0.5, keys=slice(4, 5))],
    ),
    "values": (
        fr.GRAG(1.2, 0.7, references=[1], value_bias=0.8, value_delta=1.6),
        [fr.BiasDelta(1.2, 0.7, keys=slice(26, 38)), fr.BiasDelta(0.8, 1.6, keys=slice(26, 38), on="values")],
    ),
    "temperature": (
        fr.Temperature(2),
        [fr.LogitGain(torch.full_like(PER_TOKEN, math.sqrt(math.log(15) / math.log(2))))],
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_strength(name):
    check(hosts.TINY_HOSTS["flux2"], *BIASES[name])


SOFT = torch.zeros(6, 10)
SOFT[:, :4], SOFT[:, 4:6] = 1.0, 0.25  # on 3 x 5 cells: columns 0 and 1 inside, column 2 at a quarter
OF_KEY = {0: {0}, 1: {0}, 2: {1}, 3: {1, 2}} | {j: {0} for j in range(20, 26)} | {j: {1} for j in range(26, 38)}


def weight_of(query: int, region: int) -> float:
    """How much a token takes part in one of the three regions of :func:`dense`."""
    if not 5 <= query < 20:
        return float(region in OF_KEY.get(query, {0, 1, 2}))
    row, column = divmod(query - 5, 5)
    return [(1.0, 1.0, 0.25, 0.0, 0.0)[column], float(column in (2, 3)), float(row == 2 and column == 3)][region]


def dense(local: bool) -> torch.Tensor:
    """The biases of every pair, one after the other."""
    found = torch.zeros(1, 38, 38, dtype=torch.float64)
    for i in range(38):
        for j in range(38):
            if j in OF_KEY:
                most = max(weight_of(i, region) for region in OF_KEY[j])
                found[0, i, j] = math.log(most) if most > 0 else -math.inf
            elif local and 5 <= i < 20 and 5 <= j < 20:
                mine, theirs = ({r for r in range(3) if weight_of(n, r) > 0} for n in (i, j))
                found[0, i, j] = 0.0 if not theirs or mine & theirs else -math.inf
    return found


@pytest.mark.parametrize("local", [False, True])
def test_regions(local):
    """Three regions and two references: text 3 is of two regions, text 4 and column 4 of none."""
    columns, cell = torch.zeros(3, 5, dtype=torch.bool), torch.zeros(3, 5)
    columns[:, 2:4], cell[2, 3] = True, 1
    method = fr.Regions(
        [
            fr.Region(SOFT, text=slice(0, 2), references=[0]),
            fr.Region(columns.numpy(), text=slice(2, 4), references=(1,)),
            fr.Region(cell, text=slice(3, 4)),
        ],
        local=local,
    )
    check(hosts.TINY_HOSTS["flux2"], method, [], bias=dense(local))


@ON_HOSTS
def test_looserope(host):
    """Rows with maps of their own; the paste is in the last reference, whose grid is not the target's."""
    last = len(host.layout.reference_grids) - 1
    rows, columns = grid = [(2, 3), (4, 3)][last]
    start = [20, 26][last]
    g = torch.Generator().manual_seed(0)
    saliency = torch.rand(2, 3, 5, generator=g, dtype=torch.float64)
    mask = torch.zeros(2, 12, 15, dtype=torch.bool)  # whole cells of all three grids
    mask[0, 6:12, 5:10] = mask[1, 0:6, 0:5] = True
    mods, scale, masks = [], torch.ones(2, len(host.layout), dtype=torch.float64), []
    for row in range(2):
        on_target = dilated(mask[row].view(3, 4, 5, 3).float().mean(dim=(1, 3)) >= 0.25, 1).flatten()
        share = mask[row].view(rows, 12 // rows, columns, 15 // columns).float().mean(dim=(1, 3))
        masks.append((on_target, dilated(share >= 0.25, 1).flatten()))
        scale[row, 5:20][on_target] = (0.9 * saliency[row].flatten())[on_target]
    mods.append(fr.QueryScale(scale, keys=slice(start, start + grid[0] * grid[1]), axes=(1, 2)))
    for row, (on_target, on_reference) in enumerate(masks):
        gain = torch.ones(2, len(host.layout), dtype=torch.float64)
        x = 2 * 0.9 * saliency[row].flatten() - 1
        gain[row, 5:20][on_target] = (0.65 + 0.695 * (torch.tanh(6.5 * x) + 1) / 2)[on_target]
        mods.append(fr.LogitGain(gain, keys=start + on_reference.nonzero().flatten()))
    method = fr.LooseRoPE(saliency, mask, boost=0.9, levels="continuous", reference=last, dilation=1)
    check(host, method, mods)


@pytest.mark.parametrize("name", EDITORS)
def test_steered(name):
    build, generate = EDITORS[name]
    pipe, seen, records = build(), [], []
    method = fr.LooseRoPE(torch.zeros(3, 5), torch.ones(3, 5), levels=None, boost=0.5, crop_curve=None)
    other = fr.LooseRoPE(torch.full((3, 5), 0.5), torch.ones(3, 5), levels=None, boost=1.0, crop_curve=None)

    def judge(composite, estimate):
        seen.append(np.asarray(estimate))
        return "suppression" if len(seen) == 1 else "success"

    def steered(**arguments):
        records.append(fr.steer(pipe, other, judge, moves={"neglect": 0, "suppression": 0.4}, **arguments))
        return records[-1].output

    found = generate(through(pipe, steered), steps=4, batch=1)
    assert [t.value for t in records[0].tries] == pytest.approx([1.0, 1.4])
    with fr.apply(pipe, records[0].method):
        expected = generate(pipe, steps=4, batch=1)
    assert torch.equal(found, expected)
    with fr.apply(pipe, method):
        assert not torch.equal(generate(pipe, steps=4, batch=1), expected)
    assert all(picture.shape[2] == 3 and picture.std() > 0 for picture in seen)
    assert not np.array_equal(*seen)  # the same noise under another boost
