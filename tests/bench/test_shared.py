"""The suite of shared steps runs where there is no GPU, and does not time what is wrong."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("diffusers")
from diffusers import FluxTransformer2DModel

from fastrope import bench
from fastrope.bench import flux_model, shared
from fastrope.bench.rows import read

ARGUMENTS = ["--suite", "shared", "--repeats", "3", "--out"]


def test_rows_on_a_cpu(tmp_path):
    assert bench.main([*ARGUMENTS, str(tmp_path), "--rev", "abc"]) == 0
    rows = read(tmp_path / "shared.jsonl")
    assert [row["impl"] for row in rows] == list(shared.PEERS)
    for row in rows:
        assert row["ms_median"] > 0
        assert row["x_plain"] == row["ms_median"] / rows[0]["ms_median"]
        assert (row["gpu"], row["rev"], row["rounds"]) == ("cpu", "abc", 3)
        kept = row["impl"].startswith("kept")
        assert (row["cache_mib"] is not None) is kept
    layers, tokens, width = 3, 15, 2 * 16
    assert rows[3]["cache_mib"] == 4 * layers * (2 * tokens * width + 4 * width) / 2**20


def test_a_wrong_contestant_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared, "TOLERANCE", -1.0)
    assert bench.main([*ARGUMENTS, str(tmp_path)]) == 1
    assert "shared / smoke / kept: another output than the batched step's" in capsys.readouterr().err
    assert [row["impl"] for row in read(tmp_path / "shared.jsonl")] == ["plain", "plain, batch 2", "batched"]


def test_the_full_workload_is_flux():
    """Whose defaults are those of FLUX.1-dev."""
    defaults = {n: p.default for n, p in inspect.signature(FluxTransformer2DModel.__init__).parameters.items()}
    full = flux_model.FULL
    assert full.blocks == (defaults["num_layers"], defaults["num_single_layers"])
    assert full.axes == defaults["axes_dims_rope"]
    assert (full.heads, sum(full.axes)) == (defaults["num_attention_heads"], defaults["attention_head_dim"])
    assert (full.channels, full.joint, full.pooled) == tuple(
        defaults[name] for name in ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    )
