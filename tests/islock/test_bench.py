"""The benchmark of matching runs where there is no GPU, and does not time what is wrong."""

from __future__ import annotations

import json

import pytest

from fastrope.backends import triton as backend
from fastrope.bench import match

needs_kernel = pytest.mark.skipif(not backend.interpreted(), reason="runs the interpreted kernel")


@needs_kernel
def test_rows_on_a_cpu(tmp_path):
    out = tmp_path / "rows.jsonl"
    assert match.main(["--out", str(out), "--repeats", "3", "--rev", "abc"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["impl"] for row in rows] == ["eager", "triton", "decode step"]
    step = rows[2]["ms_median"]
    for row in rows[:2]:
        assert row["share"] == row["ms_median"] / (row["ms_median"] + step)
    assert rows[2]["share"] is None
    for row in rows:
        assert row["ms_median"] > 0
        assert (row["gpu"], row["rev"], row["vocab"], row["rounds"]) == ("cpu", "abc", 1000, 3)


@needs_kernel
def test_a_wrong_contestant_is_not_timed(tmp_path, monkeypatch, capsys):
    original = match.problem

    def broken(*args):
        runs = original(*args)
        right = runs["eager"]()
        return {**runs, "triton": lambda: right._replace(tokens=right.tokens + 1)}

    monkeypatch.setattr(match, "problem", broken)
    out = tmp_path / "rows.jsonl"
    assert match.main(["--out", str(out), "--repeats", "3"]) == 1
    assert "smoke / triton: other tokens" in capsys.readouterr().err
    assert [json.loads(line)["impl"] for line in out.read_text().splitlines()] == ["eager", "decode step"]


def test_cases_have_the_sizes_of_their_hosts():
    sizes = {case.name: (case.vocab, case.image, case.dim) for case in match.CASES}
    assert sizes["llamagen"] == (16384, 16384, 8)
    assert sizes["lumina-mgpt"][1] == 8195 - 4 + 1
    for case in match.CASES:
        assert case.model is None or case.model.vocabulary == case.vocab
        assert case.image <= case.vocab
        assert case.lock.metric in ("l2", "cosine")
