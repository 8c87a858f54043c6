"""Every host of the table: the binding against a processor written from the formulas, on calls and real pipelines."""

from __future__ import annotations

import types

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
from tiny_hosts import (  # noqa: E402
    TEXT,
    TINY_HOSTS,
    assert_differ,
    assert_same,
    grag_like,
    loose_like,
    run,
)

ALL = pytest.mark.parametrize("host", TINY_HOSTS.values(), ids=TINY_HOSTS)
WITH_PIPELINE = {name: host for name, host in TINY_HOSTS.items() if host.pipeline}
PIPELINES = pytest.mark.parametrize("host", WITH_PIPELINE.values(), ids=WITH_PIPELINE)
KINDS = {"grag": grag_like, "loose": loose_like}
BOTH = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


# ---- calls -----------------------------------------------------------------------------------------------------------


@ALL
@BOTH
@pytest.mark.parametrize("rotation", ["op", "host"])
def test_modulated_forward_follows_the_formulas(host, kind, rotation):
    model, call = host.build().double(), host.call(host.layout)
    mods = kind(host.layout)
    stock = run(model, call)
    with host.by_formulas(model, host.attend(mods)):
        expected = run(model, call)
    with fr.apply(model, mods, rotation=rotation):
        out = run(model, call)
    assert_same(out, expected, 1e-10 if rotation == "op" else 1e-5)
    assert_differ(out, stock)
    assert torch.equal(run(model, call), stock)
