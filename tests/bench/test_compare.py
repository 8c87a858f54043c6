"""Two revisions in turns: the other's library under this benchmark, its rows beside ours."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
from bench_rows import a_row

from fastrope import bench
from fastrope.bench import compare

ROOT = Path(__file__).resolve().parents[2]


def test_revisions_side_by_side():
    def row(rev, ms, impl="one"):
        return a_row(rev=rev, impl=impl, ms_median=ms, ms_p20=ms - 0.1, ms_p80=ms + 0.1)

    rows = [row("new", 2.0), row("old", 3.0), row("old", 3.2), row("new", 2.1), row("new", 5.0, "same"),
            row("old", 5.1, "same"), row("new", 1.0, "only here")]  # fmt: skip
    text = compare.render(rows)
    assert text.startswith("### new over old")
    lines = [line for line in text.splitlines() if " plain " in line]
    assert len(lines) == 2
    assert "| 2.050 (1.900 - 2.200) | 3.100 (2.900 - 3.300) | 0.661 | faster |" in lines[0]
    assert lines[1].endswith("| 0.980 |  |")  # the spreads meet
    assert "slower" in compare.render([row("new", 3.0), row("old", 2.0)])
    assert "found new" in compare.render([row("new", 1.0)])


def other_checkout(folder: Path, change) -> Path:
    """The library of this clone with a change in the sdpa backend."""
    for name in ("fastrope", "kernels", "bindings"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "fastrope" / "backends" / "sdpa.py"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    return folder


def test_another_checkout_runs_under_this_benchmark(tmp_path, capfd):
    """One that is wrong is found out, so it is the other's library that runs."""
    other = other_checkout(
        tmp_path / "other", lambda text: text.replace("return out.to(dtype),", "return (out * 1.01).to(dtype),")
    )
    out = tmp_path / "rows"
    arguments = ["--device", "cpu", "--workload", "tiny", "--case", "plain", "--peer", "fastrope-sdpa", "materialised"]
    code = bench.main([*arguments, "--repeats", "1", "--turns", "1", "--out", str(out), "--against", str(other)])
    printed = capfd.readouterr()
    rows = [json.loads(line) for line in (out / "attention.jsonl").read_text().splitlines()]
    assert code == 1
    assert "other: exit code 1" in printed.err
    assert "wrong: max" in printed.out
    assert [row["impl"] for row in rows if row["rev"] == "other"] == ["materialised"]
    assert [row["impl"] for row in rows if row["rev"] != "other"] == ["fastrope-sdpa", "materialised"]
    assert "3 rows in" in printed.out
    assert "| materialised |" in printed.out


def test_turns_go_back_and_forth(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(compare, "unpack", lambda rev, folder: (ROOT, "old"))
    monkeypatch.setattr(compare, "revision", lambda *a, **k: "new")
    monkeypatch.setattr(
        compare.subprocess, "run", lambda command, **k: ran.append(command) or subprocess.CompletedProcess(command, 0)
    )
    compare.run("old", ["--quick"], 2, tmp_path, budget=100.0)
    assert [command[command.index("--rev") + 1] for command in ran] == ["new", "old", "old", "new"]
    budgets = [float(command[command.index("--budget") + 1]) for command in ran]
    assert budgets[0] == pytest.approx(25.0, abs=1.0)
    assert budgets[-1] == pytest.approx(100.0, abs=5.0)
    assert all("--quick" in command for command in ran)
    monkeypatch.setattr(compare, "unpack", lambda rev, folder: (ROOT, "new"))
    with pytest.raises(ValueError, match="expected another revision"):
        compare.run("new", [], 1, tmp_path)


def test_a_revision_is_unpacked(tmp_path):
    if compare.revision() is None:
        pytest.skip("no clone")
    sources, name = compare.unpack("HEAD~1", tmp_path / "sources")
    assert len(name) == 12
    assert (sources / "fastrope" / "__init__.py").is_file()
    assert (sources / "kernels").is_dir()
    package = compare.site(sources, tmp_path / "site") / "fastrope"
    assert (package / "kernels" / "__init__.py").is_file()
    assert (package / "bench").resolve() == ROOT / "bench"


def test_a_clone_runs_without_being_installed(tmp_path):
    """Without ``site`` Python reads no ``.pth``, so that an editable installation is not found."""
    places = [*site.getsitepackages(), *sys.path[1:]]
    path = os.pathsep.join(p for p in places if p.endswith("site-packages"))
    command = [sys.executable, "-S", str(ROOT / "bench" / "run.py"), "--suite", "attention", "--workload", "tiny",
               "--case", "plain", "--peer", "fastrope-sdpa", "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, env={"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 rows in" in done.stdout


def test_a_folder_within_a_clone_is_called_by_its_name(tmp_path):
    """The enclosing clone's revision is not its own."""
    folder = tmp_path / "clone" / "build" / "other"
    (folder / "fastrope").mkdir(parents=True)
    (folder / "fastrope" / "__init__.py").touch()
    subprocess.run(["git", "init", "-q", str(tmp_path / "clone")], check=True)
    assert compare.unpack(str(folder), tmp_path / "unused") == (folder, "other")


def test_neither_revision_nor_folder():
    with pytest.raises(ValueError, match=r"^--against: expected a revision of this clone or a folder"):
        bench.main(["--device", "cpu", "--against", "no-such-branch"])


def test_arguments_of_the_comparison_stay_behind():
    argv = [
        "--against",
        "HEAD~1",
        "--suite",
        "attention",
        "--turns=3",
        "--budget",
        "9",
        "--resume",
        "--out",
        "x",
        "--quick",
    ]
    assert bench._less(argv) == ["--suite", "attention", "--quick"]
