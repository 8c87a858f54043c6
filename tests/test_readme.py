"""Every python snippet of the README runs, in order, in one namespace.

What a snippet takes for granted (a pipeline, say) comes from an HTML comment in front of it, invisible to readers::

    <!-- test
    pipe = ...
    -->
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"^```python[^\n]*\n(?P<shown>.*?)^```|^<!-- test\n(?P<hidden>.*?)^-->", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[str]:
    """Snippets, each padded with empty lines so that tracebacks carry the line numbers of the README."""
    found = []
    for match in BLOCK.finditer(text):
        kind = match.lastgroup
        found.append("\n" * text.count("\n", 0, match.start(kind)) + match[kind])
    return found


def test_snippets_run(tmp_path, monkeypatch):
    if not README.exists():
        pytest.skip("there is no README.md")
    snippets = blocks(README.read_text(encoding="utf-8"))
    assert snippets, "README.md shows no python"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec", dont_inherit=True), namespace)


def test_blocks_are_found_with_their_lines():
    text = "a\n```python\nx = 1\n```\n<!-- test\ny = 2\n-->\n```bash\nls\n```\n```python title\nz = 3\n```\n"
    assert blocks(text) == ["\n\nx = 1\n", "\n" * 5 + "y = 2\n", "\n" * 11 + "z = 3\n"]
