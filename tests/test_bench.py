"""The benchmark: what it measures with, whom it refuses, and that its tables come from rows alone."""

from __future__ import annotations

import json

import pytest
import torch

import fastrope as fr
from fastrope import bench
from fastrope.bench import report, runner, timing
from fastrope.bench.cases import CASES, crop
from fastrope.bench.peers import PEERS, Contestant, Peer
from fastrope.bench.problem import Problem, Unsupported
from fastrope.bench.workloads import WORKLOADS

CPU = torch.device("cpu")
TINY = WORKLOADS["tiny"]
INTERPRETED = ("fastrope-triton", "fastrope-triton-applied")  # a second a call: some cases will do


def run(peers, cases, tmp_path, repeats=1):
    out = tmp_path / "rows.jsonl"
    return runner.run([TINY], cases, peers, CPU, torch.float32, repeats, out, runner.environment(CPU)), out


# ---- smoke -----------------------------------------------------------------------------------------------------------


def test_every_supported_peer_runs_every_case(tmp_path, capsys):
    peers = [p for name, p in PEERS.items() if name not in INTERPRETED]
    outcome, out = run(peers, CASES.values(), tmp_path)
    assert outcome.problems == []
    ran = {(row["case"], row["impl"]) for row in outcome.rows}
    assert {(case, "fastrope-sdpa") for case in CASES} <= ran
    assert {(case, "materialised") for case in CASES if "continuous" not in case} <= ran
    assert ("plain", "flash") in ran
    printed = capsys.readouterr().out
    for reason in ("a score_mod cannot rotate", "no way to say any modulation", "passes over all logits"):
        assert reason in printed
    assert report.read(out) == outcome.rows
    for row in outcome.rows:
        assert set(report.KEYS) <= set(row)
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert row["max_err"] <= row["max_allowed"]
        assert row["gpu"] == "cpu"
        assert row["peak_mem_mib"] is None


def test_the_fused_kernels_run_interpreted(tmp_path):
    peers = [PEERS[name] for name in INTERPRETED]
    reason = fr.backends.triton.unsupported(torch.empty(1))
    outcome, _ = run(peers, [CASES["plain"], CASES["grag"]], tmp_path)
    assert outcome.problems == []
    assert len(outcome.rows) == (0 if reason else 4)


def test_the_command_writes_rows_elsewhere_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    arguments = ["--device", "cpu", "--case", "plain", "grag", "--peer", "fastrope-sdpa", "--repeats", "2"]
    for rows in (2, 4):  # appended
        assert bench.main([*arguments, "--out", str(out), "--rev", "abc"]) == 0
        assert len(out.read_text().splitlines()) == rows
    assert "2 rows in" in capsys.readouterr().out
    assert bench.main(["--report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| grag | fastrope-sdpa |") == 1
    assert "revision abc" in printed
    assert bench.main([*arguments]) == 0
    place = capsys.readouterr().out.split("rows in ")[1].strip()
    assert not place.startswith(str(bench.RESULTS))


def test_no_rows_to_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--report"]) == 2
    assert "no rows" in capsys.readouterr().err


# ---- refusal ---------------------------------------------------------------------------------------------------------


def broken(name, change):
    def build(problem):
        right = PEERS["fastrope-sdpa"].build(problem)
        return Contestant(lambda: change(right.run()), problem)

    return Peer(name, "", build)


def one_nan(out):
    out[0, -1, -1, -1] = torch.nan
    return out


def forgets_modulations(problem):
    q, k, v, rope = problem.q, problem.k, problem.v, problem.rope
    return Contestant(lambda: fr.attention(q, k, v, rope=rope), problem)


def raises(problem):
    raise RuntimeError("no such kernel")


def unable(problem):
    raise Unsupported("not today")


def test_who_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    timed = []
    interleaved = timing.interleaved
    monkeypatch.setattr(timing, "interleaved", lambda runs, *a: timed.extend(runs) or interleaved(runs, *a))
    peers = [
        broken("biased", lambda out: out * 1.001), broken("nan", one_nan), broken("shape", lambda out: out[:, 1:]),
        broken("dtype", lambda out: out.double()), Peer("forgetful", "", forgets_modulations),
        Peer("raising", "", raises), Peer("unable", "", unable), PEERS["fastrope-sdpa"],
    ]  # fmt: skip
    outcome, _ = run(peers, [CASES["grag"]], tmp_path)
    assert [row["impl"] for row in outcome.rows] == ["fastrope-sdpa"]
    assert set(timed) == {runner.MATMUL, "fastrope-sdpa"}
    named = [problem.split(" / ")[2].split(":")[0] for problem in outcome.problems]
    assert named == ["biased", "nan", "shape", "dtype", "forgetful", "raising"]
    assert "unable" in capsys.readouterr().out


def test_a_wrong_contestant_fails_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS, "biased", broken("biased", lambda out: out * 1.001))
    arguments = ["--device", "cpu", "--case", "plain", "--peer", "biased", "--out", str(tmp_path / "rows.jsonl")]
    assert bench.main(arguments) == 1
    assert (tmp_path / "rows.jsonl").read_text() == ""


# ---- workloads and cases ---------------------------------------------------------------------------------------------


def test_flops_of_kontext_are_those_worked_out_by_hand():
    assert WORKLOADS["kontext"].flops == 4 * 24 * 8704 * 8704 * 128
    assert len(WORKLOADS["flux"].tokens) == 4608


@pytest.mark.parametrize("name", ["kontext", "flux", "tiny"])
def test_cases_change_a_quarter_of_the_target(name):
    workload = WORKLOADS[name]
    target = workload.tokens.target.stop - workload.tokens.target.start
    quarter = target // 4
    assert int(crop(workload).sum()) == quarter
    (levels,) = CASES["loose-levels"].modulations(workload, CPU)
    (continuous,) = CASES["loose-continuous"].modulations(workload, CPU)
    (gain,) = CASES["crop-gain"].modulations(workload, CPU)
    for values, distinct in ((levels.scale, 5), (continuous.scale, quarter), (gain.gain, 5)):
        changed = (values != 1).nonzero().flatten()
        assert len(changed) == quarter
        assert len(values[changed].unique()) == distinct
        assert changed[0] >= workload.tokens.target.start
        assert changed[-1] < workload.tokens.target.stop
    assert int(gain.keys.sum()) == quarter
    assert levels.keys == workload.source


def test_long_sequences_are_compared_on_a_sample(monkeypatch):
    monkeypatch.setattr("fastrope.bench.problem.ALL_ROWS", 64)
    problem = Problem.make(TINY, CASES["all"], CPU, torch.float32)
    rows = problem._rows.tolist()
    assert {0, len(TINY.tokens) - 1} <= set(rows)
    assert len(rows) < len(TINY.tokens)
    assert set((crop(TINY).nonzero().flatten() + TINY.tokens.target.start).tolist()) <= set(rows)
    assert problem.check(fr.attention(problem.q, problem.k, problem.v, plan=problem.plan)).passed


def test_an_applied_problem_is_the_same_call_rotated_before():
    problem = Problem.make(TINY, CASES["all"], CPU, torch.float64)
    out = fr.attention(problem.q, problem.k, problem.v, plan=problem.plan)
    p = problem.applied
    torch.testing.assert_close(fr.attention(p.q, p.k, p.v, plan=p.plan), out)


# ---- clocks ----------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_rotate(monkeypatch):
    monkeypatch.setattr(timing, "warm_up", lambda run, device: 2000.0 if run is slow else 0.01)
    calls = []

    def fast():
        calls.append("fast")

    def slow():
        calls.append("slow")

    times = timing.interleaved({"fast": fast, "slow": slow}, CPU, 5)
    assert calls == ["fast", "slow", "slow", "fast", "fast", "slow", "fast", "fast"]
    assert (times["fast"].rounds, times["slow"].rounds) == (5, timing.LEAST_ROUNDS)


def test_times_are_median_and_spread():
    times = timing.Times.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (times.median, times.p20, times.p80, times.rounds) == (3.5, 2.0, 5.0, 6)


# ---- report ----------------------------------------------------------------------------------------------------------


def a_row(**changes) -> dict:
    row = dict.fromkeys(report.KEYS)
    row |= {
        "workload": "kontext", "case": "plain", "impl": "one", "ms_median": 2.0, "ms_p20": 1.9, "ms_p80": 2.1,
        "tflops": 465.5, "peak_pct": 59.0, "peak_mem_mib": 51.0, "max_err": 1e-3, "mean_err": 1e-4,
        "gpu": "Accelerator 9", "date": "2026-01-02T00:00:00+00:00", "kernel": "k|1", "dtype": "bfloat16",
    }  # fmt: skip
    return {**row, **changes}


def test_report_needs_rows_and_nothing_else():
    rows = [
        a_row(ms_median=9.0, date="2026-01-01T00:00:00+00:00"), a_row(),
        a_row(case="grag", ms_median=3.0), a_row(case="grag", impl="two", ms_median=2.5),
    ]  # fmt: skip
    text = report.render([json.loads(json.dumps(row)) for row in rows])
    assert "### kontext, bfloat16, Accelerator 9" in text
    assert "9.000" not in text  # an older row of the same contestant
    grag = [line for line in text.splitlines() if line.startswith("| grag")]
    assert [line.split(" | ")[1] for line in grag] == ["two", "one"]  # the fastest first
    assert "| 1.50 |" in grag[1]
    assert "|  |" in grag[0]  # no plain row of its own to compare with
    assert "k/1" in text
    assert report.render([]) == ""


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(a_row()) + "\n" + json.dumps({"workload": "kontext"}) + "\n")
    with pytest.raises(ValueError, match="rows.jsonl:2: expected a row with case, impl"):
        report.read(path)


def test_a_folder_for_every_device():
    assert report.slug("NVIDIA H200") == "nvidia-h200"
