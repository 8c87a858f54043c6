"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastrope
from fastrope import cli, debug, doctor
from fastrope.commands import running


@pytest.fixture(scope="module")
def report():
    return doctor.report()


def test_doctor_reports_what_is_installed(report):
    assert report["fastrope"] == fastrope.__version__
    assert report["packages"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu"
    json.dumps(report)


def test_doctor_finds_triton_whatever_its_distribution_is_called(monkeypatch):
    versions = {"triton-windows": "3.6.0.post24"}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"triton": ["triton-windows"]})
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    found = doctor._versions()
    assert found["triton"] == "3.6.0.post24"
    assert found["diffusers"] is None


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
    def broken(*args, **named):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(doctor, "attention", broken)
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


# ---- what goes wrong is told in one line -----------------------------------------------------------------------------

TORCH_CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


def raising(error: BaseException):
    def main(argv):
        raise error

    return SimpleNamespace(main=main)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
@pytest.mark.parametrize(("error", "code", "message"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 2, "out of memory; "),
    (MemoryError(), 2, "out of memory; "), (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "out of memory; "),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), 2, "out of memory; "),
    (RuntimeError(TORCH_CPU), 2, "out of memory; "), (RuntimeError("MPS backend out of memory"), 2, "out of memory; "),
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device", "a.png"), 2, "a.png: No space left on device"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "none.jsonl"), 2, "none.jsonl: No such file"),
    (ValueError("--delta: expected a number\nand more"), 2, "--delta: expected a number"),
    (NotImplementedError(), 2, "NotImplementedError"), (ImportError("torchvision is needed"), 2, "torchvision is"),
], ids=repr)  # fmt: skip
def test_problems_are_told_in_one_line(error, code, message, command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, cli.COMMANDS[command].module, raising(error))
    assert cli.main([command]) == code
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"fastrope {command}: {message}")
    assert "out of memory" not in line or cli.COMMANDS[command].smaller in line


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), AssertionError(), TypeError("x"), ZeroDivisionError()]
)
def test_faults_of_our_own_are_not_hidden(error, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastrope.demo", raising(error))
    with pytest.raises(type(error)):
        cli.main(["demo"])


def python(code: str, command: str = "{}", **environment: str) -> subprocess.CompletedProcess:
    """The command line in a shell, around a ``doctor`` that runs ``code``."""
    script = (
        "import sys, types; fake = types.ModuleType('fastrope.doctor'); sys.modules['fastrope.doctor'] = fake\n"
        f"def main(argv):\n    {code}\nfake.main = main\nfrom fastrope.cli import main\nsys.exit(main(['doctor']))"
    )
    run = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}"
    bash = ["bash", "-c", "set -o pipefail; " + command.format(run)]
    return subprocess.run(bash, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize(("command", "code", "message"), [
    ("{} | head -c 1 > /dev/null", 141, ""),
    ("{} > /dev/full", 2, "fastrope doctor: [Errno 28] No space left on device\n"),
])  # fmt: skip
def test_a_stdout_that_takes_no_more(command, code, message):
    if "/dev/full" in command and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    done = python("print('x' * 10_000_000)" if code == 141 else "print('x')", command)
    assert (done.returncode, done.stderr) == (code, message)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_terminals_without_the_characters():
    done = python(r"print('caf\u00e9-\u732b.png', '\udce9'); raise ValueError('\u732b')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (2, "caf\\xe9-\\u732b.png \\udce9\n")
    assert done.stderr == "fastrope doctor: \\u732b\n"


def test_streams_are_left_as_they_were(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastrope.demo", SimpleNamespace(main=lambda argv: 0))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["demo"]) == 0
    assert stream.errors == "strict"
    monkeypatch.setattr(sys, "stdout", None)  # closed by the caller
    assert cli.main(["demo"]) == 0


@pytest.mark.parametrize("command", ["edit", "style", "sweep", "ar-edit", "evidence", "demo", "bench"])
def test_tildes_are_the_home_folder(command, monkeypatch):
    """The shell leaves that of ``--out=~/a`` alone."""
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USERPROFILE", "/home/somebody")
    assert running.file_path("~/a b.png") == Path("/home/somebody/a b.png")
    source = Path(importlib.import_module(cli.COMMANDS[command].module).__file__).read_text(encoding="utf-8")
    assert "type=Path" not in source
