"""Bound transformers on a device without float64, and under a default device that is not the model's."""

from __future__ import annotations

import contextlib

import pytest
import torch
from pretend_device import DEVICE, Elsewhere, moved, pretended
from torch.utils._pytree import tree_map

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS, assert_same, grag_like, loose_like
from tiny_transformers import run
from untwisting_calls import DIALS, apply, call_of, source_of

ALL = pytest.mark.parametrize("host", TINY_HOSTS.values(), ids=TINY_HOSTS)
DEFAULT = pytest.mark.parametrize("default", [False, True], ids=["", "default device"])


def there(values):
    """The same values on the pretended device."""
    return tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, values)


def here(out: torch.Tensor) -> torch.Tensor:
    """Of the pretended device, on the CPU."""
    assert isinstance(out, Elsewhere)
    return out.inner


def mods_of(host) -> list:
    return grag_like(host.layout) + loose_like(host.layout)


@DEFAULT
@ALL
def test_a_device_without_float64(host, default):
    """The default device of the user is that of the model, or none is set."""
    model, call, mods = host.build(), host.call(host.layout, dtype=torch.float32), mods_of(host)
    with fr.apply(model, mods):
        expected = run(model, call)
    with pretended(), DEVICE if default else contextlib.nullcontext():
        moved(model)
        for rotation in ("op", "host"):
            with fr.apply(model, mods, rotation=rotation):
                assert_same(here(run(model, there(call))), expected, 1e-5)


@ALL
def test_another_default_device_changes_nothing(host):
    """The model is on the CPU, and so must be all that is made for its calls."""
    model, call, mods = host.build(), host.call(host.layout, dtype=torch.float32), mods_of(host)
    with fr.apply(model, mods):
        expected = run(model, call)
    with pretended(), DEVICE, fr.apply(model, mods):
        assert torch.equal(run(model, call), expected)


@pytest.mark.parametrize("name", ["flux", "qwen", "z-image"])
def test_compiled_under_another_default_device(name):
    host = TINY_HOSTS[name]
    model, call, mods = host.build(), host.call(host.layout, dtype=torch.float32), mods_of(host)
    with fr.apply(model, mods):
        expected = run(model, call)
    with torch.device("meta"), fr.apply(model, mods):
        model.compile(backend="eager")
        assert_same(run(model, call), expected, 1e-5)


@pytest.mark.parametrize("carried", ["batched", "kept"])
@pytest.mark.parametrize("name", ["flux", "qwen", "z-image"])
def test_shared_references(name, carried):
    host = TINY_HOSTS[name]
    model = host.build()
    own, given = (tree_map(_single, call_of(host, 5, rows)) for rows in (2, 1))
    method = fr.UntwistingRoPE(**DIALS)
    with apply(model, carried, source_of(host, given), method):
        expected = run(model, own)
    with pretended(), DEVICE:
        moved(model)
        with apply(model, carried, source_of(host, there(given)), method):
            assert_same(here(run(model, there(own))), expected, 1e-5)


def _single(x):
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def test_looking_at_a_layer():
    host = TINY_HOSTS["kontext"]
    model, call, mods = host.build(), host.call(host.layout, dtype=torch.float32), mods_of(host)
    with fr.apply(model, mods) as handle, handle.inspect(layers=1) as record:
        run(model, call)
    expected = record.looks[0]
    with pretended(), DEVICE:
        moved(model)
        with fr.apply(model, mods) as handle, handle.inspect(layers=1) as record:
            run(model, there(call))
    assert record.looks[0].mass == pytest.approx(expected.mass, abs=1e-4)
    assert record.looks[0].distance == pytest.approx(expected.distance, rel=1e-3)
