"""The snippet of docs/islock.md runs, and the page says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fastrope import ISLock
from fastrope.islock import reference

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "islock.md").read_text(encoding="utf-8")


def test_the_snippet_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    namespace = {"__name__": "page"}
    exec(compile(code, "docs/islock.md", "exec", dont_inherit=True), namespace)
    match = namespace["match"]
    assert match.tokens.shape == match.accepted.shape == (2,)
    assert match.window.tolist() == [namespace["lock"].window(255, 256)] * 2


def test_the_page_states_the_defaults():
    lock = ISLock()
    assert f'| {lock.candidates} | {lock.alpha} | {lock.tau} | `"{lock.metric}"`' in PAGE
    assert f"more than {reference.LIMIT:.0f} below the maximum" in PAGE
    assert torch.tensor(-reference.LIMIT).exp() == 0
    assert torch.tensor(1.0 - reference.LIMIT).exp() > 0
