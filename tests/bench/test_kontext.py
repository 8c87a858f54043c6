"""The suite of Kontext steps, as a smoke test: every contestant runs, is checked and leaves a row."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("diffusers")
from fastrope import bench
from fastrope.bench import kontext
from fastrope.bench.rows import read

ARGUMENTS = ["--suite", "kontext", "--repeats", "2", "--out"]


def test_every_contestant_leaves_a_row(tmp_path):
    assert bench.main([*ARGUMENTS, str(tmp_path)]) == 0
    rows = read(tmp_path / "kontext.jsonl")
    assert [row["case"] for row in rows] == list(kontext.CASES)
    assert all(row["ms_median"] > 0 and row["rounds"] == 2 for row in rows)
    assert [row["x_stock"] for row in rows] == [row["ms_median"] / rows[0]["ms_median"] for row in rows]


def test_a_wrong_contestant_is_not_timed(tmp_path, monkeypatch, capsys):

    from fastrope.backends import sdpa

    run = sdpa.run
    monkeypatch.setattr(sdpa, "run", lambda *args: (lambda out, lse: (out + torch.rand_like(out), lse))(*run(*args)))
    assert bench.main([*ARGUMENTS, str(tmp_path)]) == 1
    assert [row["case"] for row in read(tmp_path / "kontext.jsonl")] == ["stock", "neutral"]
    assert "kontext / smoke / GRAG: another output" in capsys.readouterr().err


def test_without_diffusers_there_is_nothing_to_measure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert bench.main([*ARGUMENTS, str(tmp_path)]) == 0
    assert "unsupported: diffusers is not installed" in capsys.readouterr().out
    assert not (tmp_path / "kontext.jsonl").exists()


def test_cases_are_chosen(tmp_path):
    assert bench.main([*ARGUMENTS, str(tmp_path), "--case", "GRAG"]) == 0
    (row,) = read(tmp_path / "kontext.jsonl")
    assert (row["case"], row["x_stock"]) == ("GRAG", None)
