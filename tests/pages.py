"""The command lines of the pages in docs/: found, parsed, and with ``--model tiny`` carried out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from fastrope.cli import main

DOCS = Path(__file__).resolve().parents[1] / "docs"
BASH = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    """The text of a page."""
    return (DOCS / name).read_text(encoding="utf-8")


def commands_of(*names: str) -> list[str]:
    """The commands that pages show, in order."""
    shown = [text for name in names for text in BASH.findall(page(name))]
    return [line for text in shown for line in text.splitlines() if line.strip()]


def carry_out(command: str, modules: dict, steps: int, folder: Path, monkeypatch, capsys) -> None:
    """Parse a command with the parser of its module; run it in a folder where it is of the tiny model, and see that it
    writes what it says."""
    program, name, *arguments = shlex.split(command)
    assert program == "fastrope"
    if modules[name]._parser().parse_args(arguments).model != "tiny":
        return
    monkeypatch.chdir(folder)
    assert main([name, *arguments, "--steps", str(steps)]) == 0
    written = capsys.readouterr().out.split()
    assert written
    assert all(Path(path).stat().st_size > 0 for path in written)
