"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastrope
from fastrope import cli, debug, doctor


@pytest.fixture(scope="module")
def report():
    return doctor.report()


def test_doctor_reports_what_is_installed(report):
    assert report["fastrope"] == fastrope.__version__
    assert report["packages"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu"
    json.dumps(report)


def test_doctor_says_per_dtype_what_runs_and_why(report):
    rows = {row["dtype"]: row for row in report["backends"]}
    assert set(rows) == {"bfloat16", "float16", "float32", "float64"}
    for row in rows.values():
        assert row["auto"] in ("triton", "sdpa")
        assert row["reason"]
        assert row["obstacles"]["sdpa"] is None
        assert row["obstacles"]["eager"] is None
    assert "float64" in rows["float64"]["obstacles"]["triton"]


def test_doctor_checks_itself(report):
    assert {check["dtype"] for check in report["self_check"]} == {"bfloat16", "float16", "float32", "float64"}
    assert all(check["passed"] for check in report["self_check"]), report["self_check"]


def test_doctor_text_names_everything_in_the_report(report):
    text = doctor.render(report)
    for word in ("packages", "devices", "bindings", "self-check", "auto takes", "triton", "sdpa", "eager", "passed"):
        assert word in text


@pytest.mark.parametrize("host", doctor.BINDINGS)
def test_doctor_says_how_to_get_a_missing_host(host, monkeypatch):
    for name in [n for n in sys.modules if n.startswith((f"{host}.", f"fastrope.bindings.{host}"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, host, None)
    assert doctor._importable(host) == f'{host} is not installed: pip install "fastrope[{host}]"'


def test_doctor_prints_json_and_nothing_else(capsys, monkeypatch, report):
    monkeypatch.setattr(doctor, "report", lambda: report)
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report


def test_doctor_exits_with_1_when_a_backend_computes_the_wrong_thing(capsys, monkeypatch):
    monkeypatch.setattr(debug, "deviation", lambda *args: (0.5, 1e-3))
    assert cli.main(["doctor"]) == 1
    assert "FAILED: error 5.00e-01, allowed 1.00e-03" in capsys.readouterr().out


def test_doctor_reports_a_backend_that_raises(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fastrope.api, "run_plan", broken)
    checks = doctor.report()["self_check"]
    assert not any(check["passed"] for check in checks)
    assert checks[0]["problem"] == "RuntimeError: no such kernel"


def test_doctor_describes_gpus(monkeypatch):
    properties = SimpleNamespace(name="Accelerator", major=9, minor=0, total_memory=80 * 2**30, gcnArchName="")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    expected = {"device": "cuda:0", "name": "Accelerator", "arch": "sm_90", "memory_gib": 80.0}
    assert doctor._devices()[1:] == [expected]


def test_doctor_runs_without_triton():
    code = "import sys; sys.modules['triton'] = None; from fastrope.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cannot run: triton is not installed" in done.stdout


def test_delegated_commands_get_their_own_arguments(monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "fastrope.demo", SimpleNamespace(main=seen.append))
    assert cli.main(["demo", "--out", "pictures", "--quick", "--help"]) == 0
    assert seen == [["--out", "pictures", "--quick", "--help"]]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("fastrope.bench", "this installation has no module fastrope.bench"),
        ("matplotlib", 'fastrope bench: matplotlib is not installed: pip install "fastrope[bench]"'),
        ("diffusers", 'fastrope bench: diffusers is not installed: pip install "fastrope[diffusers]"'),
    ],
)
def test_a_missing_module_is_named(missing, message, capsys, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", absent)
    assert cli.main(["bench"]) == 2
    assert message in capsys.readouterr().err


def test_a_module_missed_while_running_is_named_too(capsys, monkeypatch):
    def main(argv):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setitem(sys.modules, "fastrope.demo", SimpleNamespace(main=main))
    assert cli.main(["demo"]) == 2
    assert 'pip install "fastrope[demo]"' in capsys.readouterr().err


def test_a_command_without_main_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastrope.bench", SimpleNamespace())
    assert cli.main(["bench"]) == 2
    assert "this installation has no fastrope.bench.main" in capsys.readouterr().err


def test_a_bug_in_a_command_is_not_mistaken_for_a_missing_module(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'fastrope.gone'", name="fastrope.gone")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["bench"])


@pytest.mark.parametrize("argv", [[], ["unknown"], ["doctor", "--unknown"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: fastrope" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"fastrope {fastrope.__version__}"
