"""pyright over the package as it is installed, and annotations of all that is public."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from source_tree import FOLDERS, ROOT


@pytest.fixture
def installed(tmp_path):
    """The folders of the clone as the package they become, with the configuration of pyproject.toml."""
    for folder, package in FOLDERS.items():
        target = tmp_path.joinpath(*package.split("."))
        shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def check(folder, *options: str) -> dict:
    if importlib.util.find_spec("basedpyright") is None:
        pytest.skip("basedpyright is not installed: it comes with the extra test")
    command = [sys.executable, "-m", "basedpyright", "--project", str(folder), "--outputjson", *options]
    done = subprocess.run([*command, "--pythonpath", sys.executable], capture_output=True, text=True, cwd=folder)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_the_package_has_no_type_errors(installed):
    report = check(installed, "--level", "error")
    assert report["summary"]["filesAnalyzed"] > 80
    found = [
        f"{x['file'].rpartition('/fastrope/')[2]}:{x['range']['start']['line'] + 1}: {x['message']}"
        for x in report["generalDiagnostics"]
    ]
    assert not found, "\n".join(found)


def test_an_error_would_be_seen(installed):
    """In a caller's code, too: what the package says of its types reaches it, and numbers may be dials."""
    (installed / "fastrope" / "caller.py").write_text(
        "import torch\n"
        "import fastrope as fr\n"
        "x = torch.zeros(1, 8, 2, 16)\n"
        "shape: tuple[int, ...] = fr.attention(x, x, x).shape\n"
        "out, lse = fr.attention(x, x, x, return_lse=True)\n"
        "method = fr.GRAG(bias=1, delta=1.1)\n"
        "wrong: int = fr.attention(x, x, x)\n"
        "fr.LogitGain('loud')\n",
    )
    config = (
        (installed / "pyproject.toml").read_text().replace('include = ["fastrope"]', 'include = ["fastrope/caller.py"]')
    )
    (installed / "pyproject.toml").write_text(config)
    lines = [
        x["range"]["start"]["line"] + 1 for x in check(installed)["generalDiagnostics"] if x["severity"] == "error"
    ]
    assert lines == [7, 8]
