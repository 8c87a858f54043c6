"""``fastrope doctor --gpu`` without a GPU: it goes on after calls that fail, hang or lose the device, and says so."""

from __future__ import annotations

import json
import os

import pytest
import torch

from fastrope import cli
from fastrope.bench import first_run

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
    assert [row["name"] for row in rows] == [job.name for job in first_run.jobs("cpu")]


def test_a_wrong_result_is_told_with_what_helps(tmp_path, here, monkeypatch):
    def check(job, device):
        return job.case != "all" or os.environ.get("FASTROPE_TMA") == "0", "3.00 of the largest error allowed"

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
    assert '1 of 6 checks FAILED: use backend="sdpa", and report this page.' in page


def test_a_call_that_hangs_has_a_name(tmp_path, here, monkeypatch):
    step, jobs = first_run._step, [job.name for job in first_run.jobs("cpu")]
    monkeypatch.setattr(first_run, "check", lambda job, device: (True, "fine"))

    def hangs(arguments, folder, device, *more):
        if arguments[0] == "parity" and arguments[-1] == "0":
            (folder / "parity.jsonl").write_text(json.dumps({"job": 0, "name": jobs[0]}) + "\n")
            return "stopped after 1 s"
        return step(arguments, folder, device, *more)

    monkeypatch.setattr(first_run, "_step", hangs)
    passed, page, rows = run(tmp_path)
    assert not passed
    assert len(rows) == 5
    assert f"* check {jobs[0]}: did not return" in page


def test_a_process_that_takes_too_long_is_stopped():
    assert first_run._process(["import time", "time.sleep(60)"], 1, CPU) == "stopped after 1 s"


def test_a_file_that_grows_keeps_a_process_alive(tmp_path):
    out = tmp_path / "rows"
    lines = ["import time", f"[open({str(out)!r}, 'a').write('x') and time.sleep(0.5) for _ in range(4)] and 0"]
    assert first_run._process(lines, 1, CPU, out) == 0


@pytest.mark.slow
def test_a_dry_run_goes_through_every_step(tmp_path, capsys):
    pytest.importorskip("triton")
    assert cli.main(["doctor", "--gpu", "--dry-run", "--out", str(tmp_path)]) == 0
    assert "All 6 checks passed." in capsys.readouterr().out
    page = (tmp_path / "gpu.md").read_text()
    for sign in ("| plain, triton |", "| all, auto |", "### attention: tiny", "### block: tiny"):
        assert sign in page


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--gpu"])
    assert stopped.value.code == 2
    assert "--dry-run" in capsys.readouterr().err
