"""What tests of commands share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    """Every command runs in a folder of its own, on as many threads as the tiny model gets."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def only_line(capsys):
    """A check that one line of stderr names the command, and that it starts with what is given."""

    def check(command: str, start: str) -> None:
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastrope ")]
        assert len(said) == 1
        assert said[0].startswith(f"fastrope {command}: {start}")

    return check
