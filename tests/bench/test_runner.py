"""The benchmark's runner: what it measures with, and whom it refuses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

import fastrope as fr
from fastrope import device as devices
from fastrope.bench import attention, runner, timing
from fastrope.bench.cases import CASES, PLAIN, chosen, crop
from fastrope.bench.environment import environment, slug
from fastrope.bench.frame import Selection, Session, Task
from fastrope.bench.peers import PEERS, Contestant, Peer
from fastrope.bench.problem import Problem, Unsupported
from fastrope.bench.rows import KEYS, read
from fastrope.bench.workloads import WORKLOADS

CPU = torch.device("cpu")
TINY = WORKLOADS["tiny"]
INTERPRETED = ("fastrope-triton", "fastrope-triton-applied")  # a second a call: some cases will do


@pytest.fixture(autouse=True)
def _one_warm_up(monkeypatch):
    monkeypatch.setattr(timing, "WARMUPS", 1)


def run(peers, cases, folder, workload=TINY) -> Session:
    session = Session(CPU, torch.float32, 1, environment(CPU), folder)
    tasks = [
        Task("attention", workload.name, c.name, partial(attention.measure, workload=workload, case=c, peers=peers))
        for c in cases
    ]
    session.run(tasks)
    return session


# ---- smoke -----------------------------------------------------------------------------------------------------------


def test_every_supported_peer_runs_every_case(tmp_path, capsys):
    peers = [p for name, p in PEERS.items() if name not in INTERPRETED]
    ran = set()
    for workload in (w for w in WORKLOADS.values() if w.small):
        session = run(peers, chosen(workload, None), tmp_path / workload.name, workload)
        assert session.problems == []
        ran |= {(row["workload"], row["case"], row["impl"]) for row in session.rows}
        assert read(session.path("attention")) == session.rows
        for row in session.rows:
            assert set(KEYS) <= set(row)
            assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
            assert row["max_err"] <= row["max_allowed"]
            assert row["gpu"] == "cpu"
            assert row["peak_mem_mib"] is None
            assert (row["rotation"] == "before") == (row["impl"] in ("flash", "fastrope-auto-applied"))
            assert row["ours"] == row["impl"].startswith("fastrope")
            own_plain = row["impl"] == "fastrope-auto" and row["case"] != PLAIN
            assert (row["plain_ms"] is not None) == own_plain
    for impl in ("fastrope-auto", "fastrope-auto-applied", "fastrope-sdpa", "careful-flash", "materialised"):
        assert {("tiny", case, impl) for case in CASES if case != "shared"} <= ran
        assert {("tiny-shared", PLAIN, impl), ("tiny-shared", "shared", impl)} <= ran
        assert ("tiny-masked", "all-per-query", impl) in ran
    assert {(w, PLAIN, "flash") for w in ("tiny", "tiny-masked", "tiny-shared")} <= ran
    printed = capsys.readouterr().out
    for reason in ("a score_mod cannot rotate", "no way to say any modulation", "cuDNN is for CUDA"):
        assert reason in printed


def test_the_fused_kernels_run_interpreted(tmp_path):
    peers = [replace(PEERS[name], own_plain=False) for name in INTERPRETED]
    reason = devices.kernel_obstacle(torch.empty(1))
    session = run(peers, [CASES["grag"]], tmp_path)
    assert session.problems == []
    assert len(session.rows) == (0 if reason else 2)


# ---- refusal ---------------------------------------------------------------------------------------------------------


def broken(name, change, **facts):
    def build(problem):
        right = PEERS["fastrope-sdpa"].build(problem)
        return Contestant(lambda: change(right.run()), problem)

    return Peer(name, "", build, **facts)


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


def biased(out):
    return out * 1.001


def test_who_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    timed = []
    interleaved = timing.interleaved
    monkeypatch.setattr(timing, "interleaved", lambda runs, *a: timed.extend(runs) or interleaved(runs, *a))
    peers = [
        broken("biased", biased), broken("nan", one_nan), broken("shape", lambda out: out[:, 1:]),
        broken("dtype", lambda out: out.double()), Peer("forgetful", "", forgets_modulations),
        Peer("raising", "", raises), Peer("unable", "", unable), broken("coarse", biased, approximate=True),
        PEERS["fastrope-sdpa"],
    ]  # fmt: skip
    session = run(peers, [CASES["grag"]], tmp_path)
    assert [row["impl"] for row in session.rows] == ["fastrope-sdpa"]
    assert set(timed) == {runner.MATMUL, "grag / fastrope-sdpa"}
    named = [problem.split(" / ")[3].split(":")[0] for problem in session.problems]
    assert named == ["biased", "nan", "shape", "dtype", "forgetful", "raising"]
    printed = capsys.readouterr().out
    assert "unable" in printed
    assert "coarse" in printed  # approximate by design: said, and no fault of the run


def test_a_wrong_plain_call_is_no_yardstick(tmp_path):
    def wrong_if_plain(problem):
        right = PEERS["fastrope-sdpa"].build(problem)
        return Contestant((lambda: right.run()) if problem.modulations else lambda: biased(right.run()), problem)

    session = run([Peer("one", "", wrong_if_plain, own_plain=True)], [CASES["grag"]], tmp_path)
    assert [(row["impl"], row["plain_ms"]) for row in session.rows] == [("one", None)]
    assert "one (plain)" in session.problems[0]


# ---- workloads and cases ---------------------------------------------------------------------------------------------


def test_flops_of_kontext_are_those_worked_out_by_hand():
    assert WORKLOADS["kontext"].flops == 4 * 24 * 8704 * 8704 * 128
    assert WORKLOADS["shared"].flops == 4 * 24 * 4608 * 8704 * 128
    assert WORKLOADS["qwen-edit"].flops == 4 * 24 * 8512 * (8512 + 8512 - 243) * 128


def test_workloads_have_the_sizes_of_their_models():
    sizes = {name: (w.batch, len(w.tokens), w.tokens.num_keys, w.heads, w.dim) for name, w in WORKLOADS.items()}
    assert sizes["kontext"] == (1, 8704, 8704, 24, 128)
    assert sizes["flux"] == (1, 4608, 4608, 24, 128)
    assert sizes["flux2"] == (1, 16896, 16896, 48, 128)
    assert sizes["tokens-33k"] == (1, 33280, 33280, 24, 128)
    assert sizes["shared"] == (1, 4608, 8704, 24, 128)
    assert sizes["qwen-edit"] == (2, 8512, 8512, 24, 128)
    assert (sizes["kontext-b2"][0], sizes["kontext-b4"][0], sizes["kontext-d64"][4]) == (2, 4, 64)
    for workload in WORKLOADS.values():
        assert sum(workload.axes_dim) == workload.dim
        assert all(name in CASES for name in workload.cases or ())


def test_padding_is_hidden_row_by_row():
    mask = WORKLOADS["tiny-masked"].key_mask(CPU)
    assert mask.shape == (2, 80)
    assert mask[0].all()
    assert mask[1].tolist() == [True] * 3 + [False] * 5 + [True] * 72
    assert WORKLOADS["tiny"].key_mask(CPU) is None


def test_a_shared_reference_stands_where_a_target_does():
    workload = WORKLOADS["tiny-shared"]
    keys, queries = workload.key_rope(CPU).angles, workload.rope(CPU).angles
    assert torch.equal(keys[: len(queries)], queries)
    alone = fr.RoPE.axial(fr.TokenLayout(0, (6, 6)).positions("flux"), workload.axes_dim).angles
    assert torch.equal(keys[len(queries) :], alone)
    assert workload.source == slice(72, 108)
    assert [case.name for case in chosen(workload, None)] == ["plain", "shared"]
    assert "shared" not in [case.name for case in chosen(TINY, None)]


@pytest.mark.parametrize("name", ["kontext", "flux", "flux2", "tiny"])
def test_cases_change_a_quarter_of_the_target(name):
    workload = WORKLOADS[name]
    target = workload.tokens.target.stop - workload.tokens.target.start
    quarter = target // 4
    assert int(crop(workload).sum()) == quarter
    (levels,) = CASES["loose-levels"].modulations(workload, CPU)
    (per_query,) = CASES["loose-per-query"].modulations(workload, CPU)
    (gain,) = CASES["crop-gain"].modulations(workload, CPU)
    for values, distinct in ((levels.scale, 5), (per_query.scale, quarter), (gain.gain, 5)):
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


@pytest.mark.parametrize("name", ["tiny", "tiny-masked", "tiny-shared"])
def test_an_applied_problem_is_the_same_call_rotated_before(name):
    case = CASES["shared" if name == "tiny-shared" else "all"]
    problem = Problem.make(WORKLOADS[name], case, CPU, torch.float64)
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
    times = timing.Times.of([(5.0, 1.0), (1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (4.0, 9.0), (100.0, 9.0)])
    assert (times.median, times.p20, times.p80, times.rounds, times.host) == (3.5, 2.0, 5.0, 6, 1.0)


def test_a_round_on_a_gpu_times_the_device_and_the_host(monkeypatch):
    """With events that count what was queued between them."""
    queued = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(queued)

        def elapsed_time(self, stop):
            return float(stop.at - self.at)

    class Flush:
        def zero_(self):
            queued.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    runs = {"one": lambda: queued.append("one"), "two": lambda: queued.extend(["two", "two"])}
    found = timing._round(runs, CPU, Flush())
    assert {name: device for name, (device, _) in found.items()} == {"one": 1.0, "two": 2.0}
    assert all(0 < host < 1000 for _, host in found.values())
    assert queued == ["flush"] * timing.SPACERS + ["one"] + ["flush"] * timing.SPACERS + ["two", "two"]


def test_a_folder_for_every_device():
    assert slug("NVIDIA H200") == "nvidia-h200"


def test_selection_of_peers():
    (task,) = attention.tasks(Selection(["tiny"], ["plain"], ["flash"], small=True))
    assert str(task) == "attention / tiny / plain"
    assert [peer.name for peer in task.measure.keywords["peers"]] == ["flash"]
    assert attention.tasks(Selection(peers=["diffusers"], small=True)) == []
