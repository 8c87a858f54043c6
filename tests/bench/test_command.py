"""The command and its frame: what is run, in which order, for how long, and where the rows go."""

from __future__ import annotations

import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
from bench_rows import a_row

from fastrope import bench, cli
from fastrope.bench import attention, block, suites
from fastrope.bench.environment import environment, revision
from fastrope.bench.frame import Selection, Session, Task
from fastrope.bench.peers import PEERS, Contestant, Peer
from fastrope.bench.rows import read
from fastrope.bench.workloads import WORKLOADS

CPU = torch.device("cpu")
ARGUMENTS = ["--device", "cpu", "--workload", "tiny", "--case", "plain", "grag", "--peer", "fastrope-sdpa"]


def session(folder, **facts) -> Session:
    return Session(CPU, torch.float32, 1, {**environment(CPU, "abc"), **facts}, folder)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_rows_elsewhere_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "new"
    for rows in (2, 4):  # appended
        assert bench.main([*ARGUMENTS, "--repeats", "2", "--out", str(out), "--rev", "abc"]) == 0
        assert len(read(out / "attention.jsonl")) == rows
    assert "2 rows in" in capsys.readouterr().out
    assert bench.main(["--report", str(out / "attention.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| grag | fastrope-sdpa |") == 1
    assert "revision abc" in printed
    assert printed.count("not measured") > 10  # the bars are those of a GPU


def test_a_smoke_test_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    """Neither among the results nor in the temporary folder, with ``--out`` or without."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert bench.main([*ARGUMENTS, "--repeats", "1"]) == 0
    assert "2 rows, not kept: --out FOLDER keeps them" in capsys.readouterr().out
    assert bench.main([*ARGUMENTS, "--repeats", "1", "--out", "rows"]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["attention.jsonl", "rows", "temporary"]


@pytest.mark.parametrize(("words", "message"), [
    (["--report", "none.jsonl"], "none.jsonl: No such file or directory"),
    (["--report", "text.txt"], "text.txt:1: expected a row of JSON, received 'text'"),
    (["--page", "none.md"], "none.md: No such file or directory"),
    (["--device", "nowhere"], "--device: "), (["--out", "text.txt"], "--out: expected a folder, received text.txt"),
    (["--against", "no-such-branch"], "--against: expected a revision of this clone"),
])  # fmt: skip
def test_problems_are_named_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("text")
    assert cli.main(["bench", *ARGUMENTS, *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"fastrope bench: {message}")


def test_pictures_are_not_replaced_unasked(tmp_path):
    pytest.importorskip("matplotlib")
    from fastrope.bench import plots

    (first,) = plots.draw([a_row()], tmp_path / "plots")
    with pytest.raises(ValueError, match=r"^--plots: .* is there already"):
        plots.draw([a_row()], tmp_path / "plots")
    first.write_bytes(b"")
    assert plots.draw([a_row()], tmp_path / "plots", force=True) == [first]
    assert first.stat().st_size > 1000


def test_a_wrong_contestant_fails_the_command(tmp_path, monkeypatch, capsys):
    def biased(problem):
        right = PEERS["fastrope-sdpa"].build(problem)
        return Contestant(lambda: right.run() * 1.001, problem)

    monkeypatch.setitem(PEERS, "biased", Peer("biased", "", biased))
    arguments = ["--device", "cpu", "--case", "plain", "--peer", "biased", "--quick", "--out", str(tmp_path)]
    assert bench.main(arguments) == 1
    assert not (tmp_path / "attention.jsonl").exists()
    assert "problem: attention / tiny / plain / biased: WrongResult: wrong" in capsys.readouterr().err


def test_rows_say_which_triton_whatever_its_distribution_is_called(monkeypatch):
    triton = pytest.importorskip("triton")

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert environment(CPU, "abc")["triton"] == triton.__version__
    monkeypatch.setitem(sys.modules, "triton", None)
    assert environment(CPU, "abc")["triton"] is None


@pytest.mark.parametrize(("option", "known"), [("workload", "kontext"), ("case", "loose-levels"), ("peer", "cudnn")])
def test_names_nobody_knows_are_answered_with_those_there_are(option, known, capsys):
    assert cli.main(["bench", f"--{option}", "tyni"]) == 2
    message = capsys.readouterr().err
    assert f"--{option}: expected some of" in message
    assert known in message
    assert "received tyni" in message


@pytest.mark.parametrize("option", ["--repeats", "--turns"])
@pytest.mark.parametrize("number", ["0", "-3", "two"])
def test_counts_are_counts(option, number, capsys):
    with pytest.raises(SystemExit):
        bench.main([f"{option}={number}"])
    assert f"{option}: expected a whole number of at least 1, received {number}" in capsys.readouterr().err


def test_no_rows_to_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--report"]) == 2
    assert "no rows" in capsys.readouterr().err


def test_a_second_run_measures_what_the_first_left_out(tmp_path, capsys):
    out = ["--out", str(tmp_path), "--rev", "abc", "--repeats", "1"]
    assert bench.main([*ARGUMENTS[:5], "plain", *ARGUMENTS[7:], *out]) == 0
    assert bench.main([*ARGUMENTS, *out, "--resume"]) == 0
    assert "measured already: attention / tiny / plain\n" in capsys.readouterr().out
    assert [row["case"] for row in read(tmp_path / "attention.jsonl")] == ["plain", "grag"]
    assert bench.main([*ARGUMENTS, *out, "--resume", "--rev", "def"]) == 0
    assert [row["rev"] for row in read(tmp_path / "attention.jsonl")] == ["abc", "abc", "def", "def"]


@pytest.mark.parametrize("suite", [attention, block])
def test_cases_come_in_the_order_in_which_they_are_asked_for(suite):
    asked = ["grag", "plain", "bands"]
    tasks = suite.tasks(Selection(workloads=["tiny"], cases=asked))
    cases = (
        [task.case for task in tasks] if suite is attention else [c.name for c in tasks[0].measure.keywords["cases"]]
    )
    assert cases == asked


# ---- order and budget ------------------------------------------------------------------------------------------------


def test_what_tells_most_comes_first():
    tasks = suites.tasks(list(suites.SUITES), Selection())
    order = list(dict.fromkeys((task.suite, task.workload) for task in tasks))
    assert order[:3] == [("attention", "kontext"), ("block", "kontext"), ("attention", "tokens-33k")]
    assert order[-1] == ("shared", "flux-1024px")
    assert {task.case for task in tasks[:8]} == {
        "plain", "grag", "bands", "loose-levels", "loose-per-query", "crop-gain", "all", "all-per-query",
    }  # fmt: skip
    assert {name for suite, name in order if suite == "attention"} == {
        w.name for w in WORKLOADS.values() if not w.small
    }
    small = suites.tasks(list(suites.SUITES), Selection(small=True))
    assert {task.suite for task in small} == set(suites.SUITES)


class Clock:
    """Seconds that only tasks spend."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def task(self, name: str, seconds: float, suite: str = "attention", error: Exception | None = None) -> Task:
        def measure(session: Session) -> None:
            self.now += seconds
            session.emit(suite, [a_row(workload=name)])
            if error is not None:
                raise error

        return Task(suite, name, None, measure)


def test_a_budget_begins_nothing_that_would_end_later(tmp_path):
    clock, run = Clock(), session(tmp_path)
    tasks = [clock.task("a", 30), clock.task("b", 40), clock.task("c", 10), clock.task("d", 5, suite="block"),
             clock.task("e", 90, suite="block"), clock.task("f", 1, suite="block")]  # fmt: skip
    run.run(tasks, budget=100, clock=clock)
    # After 70 s the longest of the suite, 40 s, would end too late; of the other suite 5 s are known, and overrun.
    assert [row["workload"] for row in run.rows] == ["a", "b", "d", "e"]
    assert [task.workload for task in run.skipped] == ["c", "f"]
    assert [row["workload"] for row in read(run.path("attention"))] == ["a", "b"]


def test_without_a_budget_nothing_is_skipped(tmp_path):
    clock, run = Clock(), session(tmp_path)
    run.run([clock.task("a", 1e9), clock.task("b", 1e9)], clock=clock)
    assert len(run.rows) == 2
    assert run.skipped == []


def test_a_broken_suite_costs_the_others_nothing(tmp_path):
    clock, run = Clock(), session(tmp_path)
    run.run([clock.task("a", 1, error=ModuleNotFoundError("No module named 'diffusers'")), clock.task("b", 1)])
    assert [row["workload"] for row in run.rows] == ["a", "b"]
    assert run.problems == ["attention / a: ModuleNotFoundError: No module named 'diffusers'"]


def test_a_lost_device_ends_the_run(tmp_path):
    clock, run = Clock(), session(tmp_path)
    run.run([clock.task("a", 1, error=RuntimeError("CUDA error: an illegal memory access")), clock.task("b", 1)])
    assert run.lost
    assert [task.workload for task in run.skipped] == ["b"]


def test_the_command_says_what_it_skipped(tmp_path, capsys):
    assert bench.main([*ARGUMENTS, "--budget", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "skipped for the budget: attention / tiny / plain" in printed
    assert "0 rows in" in printed


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch, capsys):
    measure = attention.measure

    def interrupted(session, case, **others):
        measure(session, case=case, **others)
        if case.name == "plain":
            raise KeyboardInterrupt

    monkeypatch.setattr(attention, "measure", interrupted)
    assert bench.main([*ARGUMENTS, "--out", str(tmp_path)]) == 130
    assert len(read(tmp_path / "attention.jsonl")) == 1
    assert "interrupted" in capsys.readouterr().err


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_every_row_says_where_it_comes_from(tmp_path):
    run = session(tmp_path, gpu="Accelerator 9")
    run.emit("match", [{"workload": "w", "case": "c", "impl": "i", "dtype": "float16"}])
    (row,) = read(run.path("match"))
    assert (row["suite"], row["gpu"], row["rev"], row["dtype"], row["tflops"]) == (
        "match", "Accelerator 9", "abc", "float16", None,
    )  # fmt: skip


def test_rows_of_other_revisions_and_devices_are_not_the_same_measurement(tmp_path):
    run = session(tmp_path)
    task = Task("attention", "kontext", "plain", partial(print))
    assert run.measured([task], [tmp_path]) == []
    for changes in ({"rev": "def"}, {"gpu": "other"}, {"dtype": "float16"}, {"case": "grag"}, {"workload": "flux"}):
        row = {**a_row(rev="abc", gpu="cpu", dtype="float32"), **changes}
        Session(CPU, torch.float32, 1, {}, tmp_path).emit("attention", [row])
        assert run.measured([task], [tmp_path]) == [], changes
    Session(CPU, torch.float32, 1, {}, tmp_path).emit("attention", [a_row(rev="abc", gpu="cpu", dtype="float32")])
    assert run.measured([task], [tmp_path]) == [task]
    assert run.measured([task], [tmp_path / "none", tmp_path]) == [task]


def test_a_revision_that_is_none(tmp_path):
    assert revision("no-such-branch") is None
    assert revision(folder=tmp_path) is None
