"""Where the sources lie, what their modules are called, and a Python of their own for tests that need one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {  # of the clone, and the package that each becomes
    "fastrope": "fastrope", "kernels": "fastrope.kernels", "bindings": "fastrope.bindings", "bench": "fastrope.bench",
}  # fmt: skip


def sources(folder: str) -> list[Path]:
    """Python files of a top-level folder."""
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name that a source file is imported by."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


def run_python(code: str, *flags: str, **kwargs) -> str:
    """What a fresh interpreter prints; an error there is a failure here."""
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout
