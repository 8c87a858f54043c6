"""``dev.py`` sets up once, says what is wrong, and hands arguments on. Nothing is installed here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """The script with a clone of its own, and a record of the commands it would run."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "fastrope.json")
    monkeypatch.setattr(module, "venv_python", lambda: module.commands and sys.version.split()[0])
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    module.commands, module.cpu_build, module.fails = [], True, ()

    def fake(command, **kwargs):
        words = [str(word) for word in command]
        module.commands.append(words)
        missing = words[-1].endswith("+cpu") and not module.cpu_build
        failed = missing or any(word in module.fails for word in words)
        return SimpleNamespace(
            returncode=int(failed), stderr="ERROR: No matching distribution found" if missing else ""
        )

    monkeypatch.setattr(module.subprocess, "run", fake)
    return module


def installed(dev) -> list[str]:
    return [words[-1] for words in dev.commands if "install" in words]


def test_first_run_installs_torch_then_the_package_then_runs(dev):
    assert dev.main(["test", "-k", "rope"]) == 0
    assert dev.commands[0][1:3] == ["-m", "venv"]
    assert installed(dev) == [f"torch=={dev.TORCH}+cpu", ".[test]"]
    assert Path(dev.commands[-1][0]).name == "pytest"
    assert dev.commands[-1][1] == "-n"
    assert dev.commands[-1][-2:] == ["-k", "rope"]


def test_without_a_cpu_build_the_general_one_is_announced(dev, capsys):
    dev.cpu_build = False
    assert dev.main(["demo", "--quick"]) == 0
    assert installed(dev) == [f"torch=={dev.TORCH}+cpu", f"torch=={dev.TORCH}", ".[demo]"]
    assert "several GB" in capsys.readouterr().out
    assert [Path(dev.commands[-1][0]).name, *dev.commands[-1][1:]] == ["fastrope", "demo", "--quick"]


def test_with_a_gpu_torch_comes_as_it_is(dev, monkeypatch):
    monkeypatch.setattr(dev, "has_nvidia_gpu", lambda: True)
    dev.main(["demo"])
    assert installed(dev) == [f"torch=={dev.TORCH}", ".[demo]"]


def test_an_environment_is_reused_until_something_changes(dev):
    dev.main(["test"])
    for command in ("test", "demo"):  # the tests bring what the demo needs
        dev.commands[:] = [["earlier"]]
        dev.main([command])
        assert not installed(dev)
    (dev.ROOT / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    dev.main(["demo"])
    assert installed(dev)[-1] == ".[test]"  # and an update keeps it


def test_the_demo_environment_grows_into_the_test_environment(dev):
    dev.main(["demo"])
    assert json.loads(dev.STAMP.read_text())["extras"] == ["demo"]
    dev.main(["test"])
    assert json.loads(dev.STAMP.read_text())["extras"] == ["demo", "docs", "test"]


def test_docs_are_built_strictly_and_beside_the_demo(dev):
    """Into a folder of the caller's, from one where the clone does not shadow the package."""
    dev.main(["demo"])
    assert dev.main(["docs", "reference"]) == 0
    assert installed(dev)[-1] == ".[demo,docs]"
    words = dev.commands[-1]
    assert words[1].startswith("-Werror")
    assert words[words.index("-o") + 1] == str(Path("reference").resolve())


@pytest.mark.parametrize(
    ("fails", "what"), [("venv", "making the virtual environment failed"), (".[test]", "installing fastrope failed")]
)
def test_a_failure_is_named_and_leaves_no_stamp(fails, what, dev):
    dev.fails = (fails,)
    with pytest.raises(dev.Failure, match=what):
        dev.main(["test"])
    assert not dev.STAMP.exists()


def test_exit_code_of_the_command_comes_back(dev):
    dev.fails = ("-n",)
    assert dev.main(["test"]) == 1


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 15, 0)])
def test_other_pythons_are_refused(version, dev, monkeypatch):
    monkeypatch.setattr(dev.sys, "version_info", version)
    found = ".".join(map(str, version))
    with pytest.raises(dev.Failure, match=f"expected 3.10 to 3.14, received {found}"):
        dev.main(["test"])


@pytest.mark.parametrize("argv", [[], ["build"]])
def test_usage(argv):
    done = subprocess.run([sys.executable, str(ROOT / "dev.py"), *argv], capture_output=True, text=True)
    assert done.returncode == 2
    assert "python3 dev.py test" in done.stdout
