"""Devices that users set: one without float64, and a default device that is not the call's."""

from __future__ import annotations

import ast
import contextlib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pretend_device
import pytest
import torch
from numerics import axial, every_modulation, generator, grid, skip_unless_runnable, tensors
from pretend_device import DEVICE, Elsewhere, pretended
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map

import fastrope as fr
from fastrope import device as devices
from fastrope.device import on_device, widest_float
from fastrope.methods.maps import as_map
from fastrope.methods.saliency import feature_energy
from fastrope.planning import build

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("demo", "commands", "lab")  # these run by themselves, where nobody has set a default device
BACKENDS = ("eager", "sdpa")


def there(values):
    """The same values on the pretended device, float64 as float32."""
    return tree_map(lambda x: on_device(x, DEVICE) if isinstance(x, torch.Tensor) else x, values)


def call(masked: bool) -> tuple[tuple, dict]:
    """q, k, v and the other arguments, with modulations of each kind."""
    g = generator(3)
    q, k, v = tensors(g, batch=2, queries=21, keys=21, heads=4, key_heads=2, dim=16)
    rope = axial(grid(21, 5), 16)
    arguments = dict(rope=rope, modulations=every_modulation(g, 21, 21, 16, "slice", batch=2))
    return (q, k, v), arguments | {"key_mask": torch.arange(21).expand(2, -1) < 19 if masked else None}


def moved(arguments: dict) -> dict:
    """The arguments on the pretended device."""
    rope = arguments["rope"]
    modulations = [type(m)(*(there(getattr(m, f.name)) for f in fields(m))) for m in arguments["modulations"]]
    return {"rope": fr.RoPE(there(rope.angles), there(rope.axis), rope.pairing), "modulations": modulations,
            "key_mask": there(arguments["key_mask"])}  # fmt: skip


def test_the_pretended_device_is_like_the_real_one():
    x = torch.ones(3, dtype=torch.float64)
    with pretended():
        y = there(x)
        for forbidden in (lambda: x.to(DEVICE), lambda: y.double(), lambda: y.to("cpu", torch.float64)):
            with pytest.raises(TypeError, match="doesn't support"):
                forbidden()
        with pytest.raises(RuntimeError, match="same device"):
            y + x.float()
        assert (y.device, y.dtype, (y + 1).sum().item()) == (DEVICE, torch.float32, 6)
        with DEVICE:
            assert isinstance(torch.zeros(2), Elsewhere)


def test_the_widest_dtype():
    assert {widest_float(device) for device in (None, "cpu", "cuda:1")} == {torch.float64}
    assert {widest_float(device) for device in ("mps", DEVICE)} == {torch.float32}


@pytest.mark.parametrize("default", [False, True], ids=["", "default device"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_without_float64(backend, masked, default):
    qkv, arguments = call(masked)
    expected = fr.attention(*qkv, **arguments, backend=backend, return_lse=True)
    with pretended(), DEVICE if default else contextlib.nullcontext():
        found = fr.attention(*there(qkv), **moved(arguments), backend=backend, return_lse=True, debug=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


def test_plans_with_other_numbers_on_a_device_without_float64():
    qkv, arguments = call(masked=False)
    plan = fr.plan(**arguments)
    numbers, weight = [(1.3, 0.8)] * len(plan.resolved.groups), torch.linspace(0.8, 1.2, 8, dtype=torch.float64)
    expected = fr.attention(*qkv, plan=plan.with_groups(numbers))
    only = dict(rope=arguments["rope"], modulations=[fr.BandWeight(torch.full((8,), 1.1))], key_mask=None)
    weighted = fr.attention(*qkv, plan=fr.plan(**only).with_weight(weight))
    with pretended(), DEVICE:
        out = fr.attention(*there(qkv), plan=fr.plan(**moved(arguments)).with_groups(numbers))
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)
        out = fr.attention(*there(qkv), plan=fr.plan(**moved(only)).with_weight(weight))
        torch.testing.assert_close(out.cpu(), weighted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_another_default_device_changes_nothing(backend):
    """Everything is on the CPU but what nobody has given a device."""
    skip_unless_runnable(backend)
    qkv, arguments = call(masked=True)
    if backend == "triton":  # interpreted calls take seconds
        arguments |= {"modulations": arguments["modulations"][3:4], "key_mask": None}
    norm = fr.Norm(torch.ones(16), 1e-6)
    streams = [fr.Stream(*(x[:, span] for x in qkv), norm, norm) for span in (slice(0, 9), slice(9, 21))]
    expected = fr.attention(*qkv, **arguments, backend=backend)
    joint = fr.joint_attention(streams, plan=fr.plan(**arguments), backend=backend)
    build._CACHE.clear()
    with torch.device("meta"):
        assert torch.equal(fr.attention(*qkv, **arguments, backend=backend), expected)
        assert torch.equal(fr.joint_attention(streams, plan=fr.plan(**arguments), backend=backend), joint)


@pytest.mark.parametrize(
    ("least", "most", "said"),
    [
        ((65536, 1, 1, 16), (65535, 1, 1, 16), "more than 65535 batch rows"),
        ((1, 1, 32768, 16), (1, 1, 32767, 16), "half as many heads"),
        ((1, 2**24, 1, 128), (1, 2**24 - 1, 1, 128), "int32"),
        (None, (262144, 8), ""),  # a codebook of anchor token matching
    ],
)
def test_kernels_have_limits(monkeypatch, least, most, said):
    """Of a grid of programs and of offsets; torch's attention takes such calls."""
    monkeypatch.setattr(devices, "interpreted", lambda: False)
    monkeypatch.setattr(devices, "architecture", lambda _: "sm_90")
    x = SimpleNamespace(dtype=torch.float16, device=torch.device("cuda", 0), shape=most)
    assert devices.kernel_obstacle(x) is None
    if least is not None:
        x.shape = least
        assert said in devices.kernel_obstacle(x)


def test_maps_and_energies_come_from_any_device():
    image, mask = torch.rand(3, 16, 16, dtype=torch.float64), torch.ones(16, 16, dtype=torch.bool)
    network = torch.nn.Conv2d(3, 4, 3)
    expected = feature_energy(image, mask, network).detach()
    with pretended():
        assert torch.equal(as_map("map", there(image[0])), as_map("map", image[0].float()))
        found = feature_energy(image, mask, pretend_device.moved(network))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found.dtype, found.device.type) == (torch.float64, "cpu")


def _last(name: ast.expr) -> str:
    return ast.unparse(name).rpartition(".")[2]


def test_internal_tensors_name_their_device():
    """Left to torch, they land on the default device of the user, which need not be the call's."""
    factories = {f.__name__ for f in _device_constructors()}
    unnamed = []
    for folder in ("fastrope", "kernels", "bindings"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT)
            if inside.parts[1] in PROGRAMS:
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            modules = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and "Module" in map(_last, n.bases))
            own = {id(node) for module in modules for node in ast.walk(module)}  # weights go where the user makes them
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call) or id(node) in own or not isinstance(node.func, ast.Attribute):
                    continue
                made = ast.unparse(node.func.value) == "torch" and node.func.attr in factories
                if made and not any(k.arg in ("device", None) for k in node.keywords):
                    unnamed.append(f"{inside}:{node.lineno}: {ast.unparse(node)}")
    assert not unnamed, "give them a device:\n" + "\n".join(unnamed)
