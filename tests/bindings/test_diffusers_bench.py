"""The benchmark of a Kontext step, as a smoke test: every contestant runs, is checked and leaves a row."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")
from fastrope.bench import kontext


def test_every_contestant_leaves_a_row(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert kontext.main(["--out", str(out), "--repeats", "2"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == list(kontext.NAMES)
    assert all(row["ms_median"] > 0 and "rev" in row for row in rows)


def test_a_wrong_contestant_is_not_timed(tmp_path, monkeypatch, capsys):
    import fastrope.api as api

    run = api.sdpa.run
    monkeypatch.setattr(
        api.sdpa, "run", lambda *args: (lambda out, lse: (out + torch.rand_like(out), lse))(*run(*args))
    )
    out = tmp_path / "rows.jsonl"
    assert kontext.main(["--out", str(out), "--repeats", "2"]) == 1
    assert [json.loads(line)["case"] for line in out.read_text().splitlines()] == ["stock", "neutral"]
    assert "GRAG: another output" in capsys.readouterr().err
