"""Shared attention on a GPU: rows of the batch, keys kept on the device and on the host, against the CPU in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from untwisting_calls import DIALS, call_of, source_of

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS, assert_same
from tiny_transformers import run

from fastrope.bindings.image import prefetch

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "z-image"])
@pytest.mark.parametrize("place", ["batched", None, "cpu"])
@pytest.mark.parametrize("rotation", ["op", "host"])
def test_a_gpu_shares_as_the_cpu_does(name, place, rotation):
    """The reference stays on the CPU; it is moved to where it is needed."""
    host = TINY_HOSTS[name]
    exact, text = host.build().double(), 20 if name == "z-image" else 5
    model = copy.deepcopy(exact).float().to(DEVICE)
    call, source = call_of(host, text, 2), source_of(host, call_of(host, text + 1, 1))
    there = {key: move(value) for key, value in call.items()}
    outputs = []
    for each, arguments in ((exact, call), (model, there)):
        reference = source if place == "batched" else fr.ReferenceCache(source, device=place)
        with fr.apply(each, fr.UntwistingRoPE(**DIALS), reference=reference, rotation=rotation) as handle:
            for step in (0, 1, 0):  # filled, filled, found
                handle.set_step(step, 2)
                outputs.append(run(each, arguments).double().cpu())
    for found, expected in zip(outputs[3:], outputs[:3], strict=True):
        assert_same(found, expected, 5e-3)
    if place == "cpu":
        kept = next(iter(reference._snapshots.values())).layers[0]
        assert kept.k.device.type == "cpu"
        assert kept.k.is_pinned()


def test_keys_on_the_host_come_on_a_stream_of_their_own(monkeypatch):
    """Whatever the computation is busy with, also after a run that broke off with a copy under way."""
    host = TINY_HOSTS["flux"]
    model = host.build().float().to(DEVICE)
    call = {key: move(value) for key, value in call_of(host, 5, 2).items()}
    source = source_of(host, call_of(host, 6, 1, (40, 40)))
    source.arguments["img_ids"] = fr.TokenLayout(0, (40, 40)).positions("flux").double()
    made, real = [], prefetch.copy_of
    monkeypatch.setattr(prefetch, "copy_of", lambda *given: made.append(real(*given)) or made[-1])
    outputs, busy = [], torch.randn(2048, 2048, device=DEVICE)

    def work(*_):
        for _ in range(20):
            busy @ busy

    for place in (None, "cpu"):
        with fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=fr.ReferenceCache(source, device=place)) as handle:
            handle.set_step(0, 2)
            watches = [block.register_forward_pre_hook(work) for block in model.transformer_blocks]
            outputs += [run(model, call) for _ in range(3)]
            stop = model.single_transformer_blocks[0].register_forward_pre_hook(broken)
            with pytest.raises(RuntimeError, match="broken off"):
                run(model, call)
            stop.remove()
            outputs.append(run(model, call))
            for watch in watches:
                watch.remove()
    assert all(type(copy) is prefetch.StreamedCopy for copy in made)
    assert len(made) == 4 * 4 + 3
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def broken(*_):
    raise RuntimeError("broken off")


def move(value):
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        return [x.float().to(DEVICE) for x in value]
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE, torch.float32 if value.is_floating_point() else value.dtype)
    return value
