"""The suite of token matching runs where there is no GPU, and does not time what is wrong."""

from __future__ import annotations

import pytest

from fastrope import bench
from fastrope import device as devices
from fastrope.bench import match
from fastrope.bench.rows import read

needs_kernel = pytest.mark.skipif(not devices.interpreted(), reason="runs the interpreted kernel")
ARGUMENTS = ["--suite", "match", "--repeats", "3", "--out"]


@needs_kernel
def test_rows_on_a_cpu(tmp_path):
    assert bench.main([*ARGUMENTS, str(tmp_path), "--rev", "abc"]) == 0
    rows = read(tmp_path / "match.jsonl")
    assert [row["impl"] for row in rows] == ["eager", "triton", "decode step"]
    step = rows[2]["ms_median"]
    for row in rows[:2]:
        assert row["share"] == row["ms_median"] / (row["ms_median"] + step)
    assert rows[2]["share"] is None
    for row in rows:
        assert row["ms_median"] > 0
        assert (row["gpu"], row["rev"], row["vocab"], row["rounds"]) == ("cpu", "abc", 1000, 3)


def changed(change):
    original = match.problem

    def problem(*args):
        runs = original(*args)
        return {**runs, "triton": lambda: change(runs["eager"]())}

    return problem


def test_a_wrong_contestant_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(match, "problem", changed(lambda right: right._replace(tokens=right.tokens + 1)))
    assert bench.main([*ARGUMENTS, str(tmp_path)]) == 1
    assert "match / smoke / triton: other tokens" in capsys.readouterr().err
    assert [row["impl"] for row in read(tmp_path / "match.jsonl")] == ["eager", "decode step"]


def test_a_kernel_that_is_not_there_is_unsupported(tmp_path, monkeypatch, capsys):
    def absent(right):
        raise NotImplementedError("no kernel here")

    monkeypatch.setattr(match, "problem", changed(absent))
    assert bench.main([*ARGUMENTS, str(tmp_path)]) == 0
    assert "unsupported: no kernel here" in capsys.readouterr().out
    assert [row["impl"] for row in read(tmp_path / "match.jsonl")] == ["eager", "decode step"]


def test_cases_have_the_sizes_of_their_hosts():
    sizes = {case.name: (case.vocab, case.image, case.dim) for case in match.HOSTS}
    assert sizes["llamagen"] == (16384, 16384, 8)
    assert sizes["lumina-mgpt"][1] == 8195 - 4 + 1
    for case in match.HOSTS:
        assert case.model is None or case.model.vocabulary == case.vocab
        assert case.image <= case.vocab
        assert case.lock.metric in ("l2", "cosine")
