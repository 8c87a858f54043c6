"""``fastrope doctor --gpu`` without a GPU: it goes on after calls that fail, hang or lose the device, and says so."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest
import torch

import fastrope as fr
from fastrope import card, cli, kernels, rules
from fastrope.bench import first_page, first_run, routes
from fastrope.bench.cases import CASES
from fastrope.bench.problem import Problem
from fastrope.bench.workloads import WORKLOADS

CPU = torch.device("cpu")


@pytest.fixture
def here(monkeypatch):
    """Steps in this process; no rows of other suites."""
    monkeypatch.setattr(
        first_run, "_step",
        lambda arguments, folder, device, *_: first_run.main([*arguments, "--out", str(folder), "--device", "cpu"]),
    )  # fmt: skip
    monkeypatch.setattr(first_run, "_process", lambda *_: 0)
    monkeypatch.setattr(first_run, "kernels", lambda out, device: 0)


def run(tmp_path) -> tuple[bool, str, list[dict]]:
    said: list[str] = []
    passed = first_run.run(tmp_path, CPU, say=said.append)
    rows = [json.loads(line) for line in (tmp_path / "parity.jsonl").read_text().splitlines()]
    return passed, (tmp_path / "gpu.md").read_text(), [row for row in rows if "passed" in row]


def test_all_is_well(tmp_path, here, monkeypatch):
    monkeypatch.setattr(first_run, "check", lambda job, device: (True, "fine"))
    passed, page, rows = run(tmp_path)
    assert passed
    assert "All 6 checks passed." in page
    assert f"kernels {card.digest(kernels)}" in page  # what fastrope/verification.py names, once it is measured
    assert [row["name"] for row in rows] == [job.name for job in first_run.jobs(CPU)]


def test_a_wrong_result_is_told_with_what_helps(tmp_path, here, monkeypatch):
    def check(job, device):
        return not job.name.startswith("all ") or os.environ.get(
            "FASTROPE_TMA"
        ) == "0", "3.00 of the largest error allowed"

    monkeypatch.setattr(first_run, "check", check)
    passed, page, _ = run(tmp_path)
    assert not passed
    assert "2 of 6 checks FAILED: set FASTROPE_TMA=0, and report this page." in page
    assert "* check all auto: 3.00 of the largest error allowed" in page
    assert "FASTROPE_TMA" not in os.environ


def test_switches_of_the_user_stay(tmp_path, here, monkeypatch):
    monkeypatch.setenv("FASTROPE_TMA", "0")
    monkeypatch.setattr(first_run, "check", lambda job, device: (os.environ["FASTROPE_TMA"] == "0", "fine"))
    assert run(tmp_path)[0]
    assert os.environ["FASTROPE_TMA"] == "0"


def test_results_of_before_are_kept(tmp_path, here, monkeypatch):
    monkeypatch.setattr(first_run, "check", lambda job, device: (True, "fine"))
    (tmp_path / "attention.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="--force"):
        run(tmp_path)
    assert (tmp_path / "attention.jsonl").read_text() == "mine"


@pytest.mark.parametrize("error", ["CUDA error: an illegal memory access", "Triton Error [CUDA]: an illegal address"])
def test_it_goes_on_with_the_next_call_after_a_lost_device(tmp_path, here, monkeypatch, error):
    """In a new process: in the old one nothing runs any more."""
    lost, step = [], first_run._step
    monkeypatch.setattr(first_run, "_step", lambda *call: lost.clear() or step(*call))

    def check(job, device):
        if job.name == "plain auto" or lost:
            lost.append(job)
            raise RuntimeError(error)
        return True, "fine"

    monkeypatch.setattr(first_run, "check", check)
    passed, page, rows = run(tmp_path)
    assert not passed
    assert [row["job"] for row in rows] == list(range(6))
    assert "1 of 6 checks FAILED: set FASTROPE_KERNELS=0 (torch's operations alone), and report this page." in page


def test_a_call_that_hangs_has_a_name(tmp_path, here, monkeypatch):
    step, jobs = first_run._step, [job.name for job in first_run.jobs(CPU)]
    monkeypatch.setattr(first_run, "check", lambda job, device: (True, "fine"))

    def hangs(arguments, folder, device, *more):
        if arguments[0] == "parity" and arguments[-1] == "0":
            (folder / "parity.jsonl").write_text(json.dumps({"job": 0, "name": jobs[0]}) + "\n")
            return "it hung"
        return step(arguments, folder, device, *more)

    monkeypatch.setattr(first_run, "_step", hangs)
    passed, page, rows = run(tmp_path)
    assert not passed
    assert len(rows) == 5
    assert f"* check {jobs[0]}: did not return" in page


def test_a_process_that_takes_too_long_is_stopped(tmp_path):
    assert first_run._process(["import time", "time.sleep(60)"], 1, CPU, tmp_path) == first_run.TIME_IS_UP


@pytest.mark.parametrize(
    ("limit", "hangs", "expected"), [(60, 1.0, 0), (1, 60, "its time was up"), (60, 0.01, "it hung")]
)
def test_a_file_that_grows_is_no_hang_and_no_reason_to_go_on_for_ever(limit, hangs, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(first_run, "HANGS", hangs)
    monkeypatch.setitem(first_run.PATIENCE, "cpu", 1)
    out = tmp_path / "rows"
    lines = ["import time", f"[open({str(out)!r}, 'a').write('x') and time.sleep(0.4) for _ in range(4)] and 0"]
    assert first_run._process(lines, limit, CPU, tmp_path, out) == expected


def test_a_check_that_time_cuts_off_did_not_fail(tmp_path, here, monkeypatch):
    jobs = [job.name for job in first_run.jobs(CPU)]

    def slow(arguments, folder, device, *more):
        if arguments[0] == "parity":
            rows = [{"job": 0, "name": jobs[0], "passed": True}, {"job": 1, "name": jobs[1]}]
            (folder / "parity.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return first_run.TIME_IS_UP

    monkeypatch.setattr(first_run, "_step", slow)
    passed, page, _ = run(tmp_path)
    assert not passed
    assert "1 of 6 checks ran and passed; the others did not run. Run it again" in page
    assert "* the checks ended early: its time was up" in page


def test_a_process_that_fails_says_why(tmp_path):
    """And finds no kernels hidden from its checks."""
    lines = ["import os", "1 / 0 if os.environ['FASTROPE_VERIFY'] == '0' else 3"]
    assert first_run._process(lines, 60, CPU, tmp_path) == 1
    assert first_run._last_error(tmp_path) == "ZeroDivisionError: division by zero"


def test_a_process_imports_what_this_one_imports(tmp_path, monkeypatch):
    """In a clone, too, whose folder of that name has no kernels."""
    (tmp_path / "fastrope").mkdir()
    (tmp_path / "fastrope" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])  # no string: Python passes over it
    lines = ["from fastrope.bench import first_run", f"0 if first_run.__file__ == {first_run.__file__!r} else 3"]
    assert first_run._process(lines, 60, CPU, tmp_path) == 0


def test_the_whole_of_it_takes_less_than_three_minutes():
    assert sum(first_run.LIMITS.values()) <= 170


def test_switches_that_change_nothing_are_not_tried(monkeypatch):
    job = first_run.jobs(CPU)[0]
    for arch, expected in (("sm_89", ("FASTROPE_POLYNOMIAL",)), ("sm_90", first_run.SWITCHES)):
        monkeypatch.setattr(first_run.devices, "architecture", lambda device, arch=arch: arch)
        assert first_run._switches(job, torch.device("cuda", 0)) == expected
    assert first_run._switches(replace(job, switches={"FASTROPE_TMA": "0"}), CPU) == ()


# ---- routes and rules ------------------------------------------------------------------------------------------------


def test_a_broken_call_leaves_the_times_of_others(tmp_path, monkeypatch):
    measure = routes.measure

    def broken(call, device):
        if call.case == "all":
            raise RuntimeError("PTXAS error\nmore")
        return measure(call, device)

    monkeypatch.setattr(routes, "measure", broken)
    monkeypatch.setattr(routes.timing, "WARMUPS", 1)
    first_run.kernels(tmp_path / "kernels.jsonl", CPU)
    *others, last = first_page.read_rows(tmp_path / "kernels.jsonl")
    assert last == {"case": "all", "error": "RuntimeError: PTXAS error"}
    assert {row["route"] for row in others} == {"sdpa", "loop"}
    page = "\n".join(first_page._kernel_table([last, *others]))
    assert "| all | | | | RuntimeError: PTXAS error |" in page
    assert "| plain | sdpa, of `auto` |" in page


def times(family: str, **ms: float) -> list[dict]:
    rest = {"case": family, "family": family, "auto": False, "host_ms": 0.1, "kernels": []}
    return [rest | {"route": route, "ms": t} for route, t in ms.items()]


def test_the_fastest_route_of_a_family_over_its_calls():
    rows = [*times("unmodulated", split=1.0, loop=1.2), *times("unmodulated", split=2.0, loop=1.4),
            *times("keys", sdpa=1.01, loop=1.0), *times("rotation", sdpa=1.0),
            {"case": "masked", "error": "failed"}]  # fmt: skip
    found = {rule.family: rule for rule in routes.fastest(rows)}
    assert {name: rule.route for name, rule in found.items()} == {"unmodulated": "loop", "keys": "sdpa"}
    assert found["unmodulated"].reason == "the fastest of loop 1.3 ms, split 1.41 ms"
    assert found["unmodulated"].basis == "measured here"


def test_every_family_that_has_routes_in_16_bits_is_measured():
    problems = [(call, WORKLOADS[call.workload], call.case) for call in routes.calls("cuda")]
    found = set()
    for call, workload, case in problems:
        small = replace(workload, tokens=fr.TokenLayout(4, (6, 6), references=[(6, 6)]))
        small = replace(small, prompts=small.prompts and (4, 2))
        problem = Problem.make(small, CASES[case], CPU, torch.bfloat16)
        plan = (problem.applied if call.applied else problem).plan
        found.add(rules.family_of(plan.lowered, torch.bfloat16).name)
    assert found >= {family.name for family in rules.FAMILIES} - {"float32", "other"}


@pytest.mark.parametrize("passes", [True, False])
def test_rules_are_written_where_all_checks_passed(passes, tmp_path, here, monkeypatch):
    monkeypatch.setattr(first_run, "check", lambda job, device: (passes, "fine"))
    monkeypatch.setattr(
        first_run, "kernels",
        lambda out, device: out.write_text("\n".join(map(json.dumps, times("unmodulated", split=1.2, loop=1.0)))) and 0,
    )  # fmt: skip
    monkeypatch.setattr(card, "key", lambda device: "this card")
    monkeypatch.setattr(card, "folder", lambda: tmp_path / "cache")
    first_run.run(tmp_path / "out", CPU, write=True, say=lambda _: None)
    said = (tmp_path / "out" / "gpu.md").read_text().splitlines()[-1]
    if passes:
        assert said == f"Rules written to {tmp_path / 'cache' / 'rules.json'}: unmodulated by loop."
        (rule,) = card.read(rules.FILE)["this card"]
        assert (rule["family"], rule["route"], rule["basis"]) == ("unmodulated", "loop", "measured here")
    else:
        assert said == "No rules written: a check failed or did not run."
        assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_dry_run_goes_through_every_step(tmp_path, capsys):
    pytest.importorskip("triton")
    assert cli.main(["doctor", "--gpu", "--dry-run", "--out", str(tmp_path)]) == 0
    assert "All 6 checks passed." in capsys.readouterr().out
    page = (tmp_path / "gpu.md").read_text()
    for sign in ("| plain | loop |", "| all | sdpa, of `auto` |", "### attention: tiny", "### block: tiny"):
        assert sign in page


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--gpu"])
    assert stopped.value.code == 2
    assert "--dry-run" in capsys.readouterr().err
