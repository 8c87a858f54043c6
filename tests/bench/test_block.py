"""The suite of whole blocks: everybody starts and ends at the same place, and is held to the same reference."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

import fastrope as fr
from fastrope import bench
from fastrope.bench import block, timing
from fastrope.bench.cases import CASES
from fastrope.bench.problem import Unsupported
from fastrope.bench.rows import read
from fastrope.bench.workloads import WORKLOADS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def problem(case: str, dtype=torch.float32) -> block.BlockProblem:
    return block.BlockProblem.of(WORKLOADS["tiny"], CASES[case], CPU, dtype)


def test_rows_of_all_cases_come_of_the_same_rounds(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    calls, interleaved = [], timing.interleaved
    monkeypatch.setattr(timing, "interleaved", lambda runs, *a: calls.append(set(runs)) or interleaved(runs, *a))
    assert bench.main(["--suite", "block", "--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "block.jsonl")
    found = {(row["case"], row["impl"]) for row in rows}
    assert found == {("plain", "diffusers")} | {
        (case, impl) for case in block.NAMES for impl in ("fastrope-auto", "careful-flash")
    }
    (timed,) = calls
    assert timed == {"matmul", *(f"{case} / {impl}" for case, impl in found)}
    assert all(row["max_err"] <= row["max_allowed"] for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_stock_processor_is_held_to_the_reference(dtype):
    pytest.importorskip("diffusers")
    some = problem("plain", dtype)
    contestant = block.stock(some, lambda f: f)
    image, text = contestant.run()
    assert (image.shape, text.shape) == ((1, 128, 64), (1, 8, 64))
    assert some.check((image, text)).passed
    assert not some.check((image.roll(1, dims=1), text)).passed
    with pytest.raises(Unsupported, match="modulates nothing"):
        block.stock(problem("all"), lambda f: f)


@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("forgets", ["weight", "image", "rotation"])
def test_whoever_forgets_a_step_is_refused(case, forgets):
    some = problem(case)
    q, k, v = some.inputs()
    if forgets == "weight":
        bare = [fr.Stream(*s[:3], fr.Norm(None, 1e-6), fr.Norm(None, 1e-6)) for s in some.streams]
        q, k, v = block.join(bare)
    if forgets == "image":
        q, k, v = (torch.cat([x[:, :8], x[:, 8:].flip(1)], dim=1) for x in (q, k, v))
    plan = fr.plan(rope=some.rope.as_applied(forgets == "rotation"), modulations=some.modulations)
    assert not some.check(fr.attention(q, k, v, plan=plan)).passed
    assert some.check(fr.attention(*some.inputs(), plan=some.plan)).passed


def test_the_floor_is_attention_alone(monkeypatch):
    monkeypatch.setattr(block, "SDPBackend", SimpleNamespace(CUDNN_ATTENTION=SDPBackend.FLASH_ATTENTION))
    contestant = block.floor(problem("plain"))
    assert contestant.problem.check(contestant.run()).passed
    assert contestant.problem.rope.applied
    with pytest.raises(Unsupported):
        block.floor(problem("all"))


def test_without_diffusers_the_others_are_measured(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert bench.main(["--suite", "block", "--case", "plain", "--repeats", "1", "--out", str(tmp_path)]) == 0
    assert "diffusers is not installed" in capsys.readouterr().out
    assert {row["impl"] for row in read(tmp_path / "block.jsonl")} == {"fastrope-auto", "careful-flash"}
