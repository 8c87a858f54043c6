"""A host of someone else's, with another pairing, order and processor, added to the table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_formulas import Attention
from diffusers_hosts import assert_differ, assert_same, grag_like, loose_like
from tiny_transformers import run

from fastrope.bindings.diffusers import BoundProcessor, Host, JointSequence, Stream, hosts, register_host

AXES, THETA, HEADS = (4, 6, 6), 100.0, 2
LAYOUT = fr.TokenLayout(5, (3, 5), [(2, 3)], order="text-last")


def turn(x, angles):
    """Rotation of pairs (c, c + D/2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class PlainProcessor:
    """The made-up library's own."""

    _attention_backend = None

    def __call__(self, attn, x, angles):
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in attn.qkv(x).chunk(3, dim=-1))
        q, k, v = (y.transpose(1, 2) for y in (turn(q, angles), turn(k, angles), v))
        return attn.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ReferenceProcessor:
    """By the formulas; their pairs are neighbours, so channels are put side by side first."""

    def __init__(self, attend):
        self.attend = attend

    def __call__(self, attn, x, angles):
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in attn.qkv(x).chunk(3, dim=-1))
        q, k = (torch.stack(y.chunk(2, dim=-1), dim=-1).flatten(-2) for y in (q, k))
        return attn.out(self.attend(q, k, v))


class TheirProcessor(BoundProcessor):
    """What such a library writes to be bound."""

    def __call__(self, attn, x, angles):
        if self.unmodulated():
            return self.original(attn, x, angles)
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in attn.qkv(x).chunk(3, dim=-1))
        out = self.attend([Stream(q, k, v, None, None)], angles)
        return self.original(attn, x, angles) if out is None else attn.out(out)

    @staticmethod
    def rotate(x, table):
        return turn(x, table)


class Layer(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.processor = PlainProcessor()

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, x, angles):
        return x + self.processor(self, x, angles)


class MadeUpTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleDict({"attention": Layer(HEADS * 16)}) for _ in range(3))

    def forward(self, tokens, where, time=None, return_dict=True):
        angles = self.angles(where)
        for stage in self.stages:
            tokens = stage["attention"](tokens, angles)
        return (tokens,)

    @staticmethod
    def angles(where):
        frequencies = [THETA ** (-torch.arange(0, d, 2, device=where.device).double() / d) for d in AXES]
        return torch.cat([where[:, a, None].double() * f for a, f in enumerate(frequencies)], dim=1)


PlainProcessor.__module__ = MadeUpTransformer.__module__ = "made_up.models"

HOST = Host(
    transformer="MadeUpTransformer",
    package="made_up",
    processors={"PlainProcessor": TheirProcessor},
    blocks={"stages": "joint"},
    identify=lambda model, call: (call["where"],),
    describe=lambda where: JointSequence(where.cpu(), lambda: LAYOUT),
    axes_dim=lambda model: AXES,
    theta=lambda model: THETA,
    cosines=lambda model, sequence, device: model.angles(sequence.positions.to(device)).cos(),
    pairing="half",
    hidden="tokens",
    timestep="time",
)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(hosts, "HOSTS", list(hosts.HOSTS))
    with torch.no_grad():
        return MadeUpTransformer().double().eval()


def positions() -> torch.Tensor:
    plain = fr.TokenLayout(5, (3, 5), [(2, 3)])
    found = plain.positions("flux")
    return torch.cat([found[plain.text_tokens :], found[plain.text]])


@pytest.mark.parametrize("rotation", ["op", "host"])
def test_a_registered_host_is_bound(model, rotation):
    call = {"tokens": torch.randn(2, len(LAYOUT), HEADS * 16).double(), "where": positions()}
    with pytest.raises(ValueError, match=r"^pipe: expected .*, received MadeUpTransformer$"):
        fr.apply(model)
    assert register_host(HOST) is HOST
    mods, stock = grag_like(LAYOUT) + loose_like(LAYOUT), run(model, call)
    attend = Attention(positions(), AXES, THETA, mods)
    for stage in model.stages:
        stage["attention"].set_processor(ReferenceProcessor(attend))
    expected = run(model, call)
    for stage in model.stages:
        stage["attention"].set_processor(PlainProcessor())
    with fr.apply(model, mods, rotation=rotation) as handle:
        assert_same(run(model, call), expected, 1e-10)
        handle.update()
        assert torch.equal(run(model, call), stock)
    assert_differ(expected, stock)


def test_what_is_no_row_is_refused(model):
    register_host(HOST)
    with pytest.raises(ValueError, match=r"^host: expected a transformer that is not in the table, received MadeUp"):
        register_host(HOST)
    with pytest.raises(ValueError, match=r"^host: expected a fastrope.bindings.diffusers.Host, received str"):
        register_host("FluxTransformer2DModel")
    for name, value in (("processors", {"PlainProcessor": PlainProcessor}), ("processors", {}), ("blocks", {}),
                        ("blocks", {"stages": "triple"})):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^Host\.{name}: expected"):
            replace(HOST, **{name: value})


def test_a_row_that_says_the_wrong_thing_is_noticed(model):
    """The angles it leads to are held against the model's own."""
    register_host(replace(HOST, theta=lambda model: 10_000.0))
    call = {"tokens": torch.randn(1, len(LAYOUT), HEADS * 16).double(), "where": positions()}
    with fr.apply(model, grag_like(LAYOUT)), pytest.raises(NotImplementedError, match=r"rotary embedding of made_up"):
        run(model, call)
