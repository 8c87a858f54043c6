"""Every launch that a GPU would be asked for is legal, and there are no more of them than there need be.

The calls go through triton's own launch path over a driver of ours (``tests/launches/``), in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)

LANE = Path(__file__).parent / "launches" / "lane.py"
SLOW = ("sm_80", "sm_89", "sm_100", "sm_120")
PREPARED = ("pack", "pack", "means", "queries")
PER_QUERY = ("pack", "pack", "means", "run_sums", "per_query_means", "queries")
# What a call launches; between kernels of ours, torch's attention is not counted.
LAUNCHES = {
    "plain triton": ("pack", "pack", "attention"),
    "plain auto": ("pack", "pack"),
    "plain applied": ("attention",),
    "grag triton": ("pack", "means", "queries", "attention"),
    "grag auto": ("pack", "pack", "means", "reweight"),
    "bands auto": ("pack", "pack"),
    "bias triton": ("pack", "queries", "attention"),
    "bias auto": ("pack", "queries", "attention"),
    "key bias auto": ("pack", "pack", "attention"),
    "regions auto": ("pack", "queries", "attention"),
    "values auto": ("pack", "pack", "means", "pack"),
    "values triton": ("pack", "means", "pack", "pack", "attention"),
    "values joint": ("pack", "pack", "means", "pack"),
    "passes triton": ("pack", *("queries", "attention") * 2),
    "passes-per-query triton": ("pack", *("queries", "axis_block", "attention") * 2),
    "loose-levels triton": ("pack", "queries", "attention"),
    "loose-levels auto": ("pack", "queries", "attention", "pack", "scatter"),
    "all triton": (*PREPARED, "attention"),
    "all auto": (*PREPARED, "attention", "pack", "pack", "means", "reweight", "scatter"),
    "all-per-query triton": (*PER_QUERY, "axis_block", "attention"),
    "polynomial dim 128": (
        *PREPARED[:3],
        "pack",
        "run_sums",
        "per_query_means",
        "queries",
        "terms",
        "polynomial",
        "attention",
    ),
    "plain masked auto": ("pack",) * 6,  # q and k, then keys and values of either row
    "plain joint": ("pack", "pack", "pack"),
    "match": ("match",),
}


@cache
def rows(arch: str, folder: Path) -> list[dict]:
    """Rows of the lane for one architecture."""
    out = folder / f"{arch}.json"
    environment = {**os.environ, "STUB_FOLDER": str(folder), "TRITON_CACHE_DIR": str(folder / f"cache-{arch}")}
    environment.pop("STUB_ARCH", None)
    command = [sys.executable, "-W", "ignore", str(LANE), "--arch", arch, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("launches")


def names(row: dict) -> tuple[str, ...]:
    return tuple(name.removesuffix("_kernel") for name in row["launched"])


@pytest.mark.parametrize(
    "arch",
    [
        "sm_90",
        *(
            pytest.param(arch, marks=[
                pytest.mark.slow,
                pytest.mark.skipif("FASTROPE_COMPILE_ALL" not in os.environ, reason="FASTROPE_COMPILE_ALL=1"),
            ])
            for arch in SLOW
        ),
    ],
)  # fmt: skip
def test_every_launch_is_legal(arch, folder):
    found = rows(arch, folder)
    assert [row for row in found if row["error"]] == []
    assert len(found) > 50
    launched = Counter(name for row in found for name in names(row))
    expected = {"attention", "axis_block", "pack", "queries", "means", "reweight", "run_sums", "per_query_means",
                "scatter", "match", "terms", "polynomial"}  # fmt: skip
    assert set(launched) == expected


def test_no_more_launches_than_there_need_be(folder):
    found = {row["case"]: names(row) for row in rows("sm_90", folder)}
    assert {case: found[case] for case in LAUNCHES} == LAUNCHES


def test_calls_of_one_kind_share_kernels(folder):
    """Masks, grouped heads, raw or applied rotation, log-sum-exps: at most two kernels that the call before had not."""
    compiled = {row["case"]: row["compiled"] for row in rows("sm_90", folder)}
    assert compiled["all auto"] == compiled["all-per-query lse"] == compiled["all-per-query grouped"] == 0
    assert compiled["all applied"] == compiled["all lse"] == compiled["all grouped"] == 0
    assert compiled["all masked triton"] <= 2
    assert sum(compiled.values()) < 100


def test_a_check_compiles_nothing_that_its_call_does_not(folder):
    """Of kernels on a card without rows: it comes before the call, and costs some launches of the same kernels."""
    found = {row["case"]: row for row in rows("sm_90", folder)}
    for case in ("plain", "grag", "bands", "loose-levels", "loose-per-query", "crop-gain", "all", "all-per-query"):
        check, call = found[f"{case} verified"], found[f"{case} auto"]
        assert check["compiled"] == 0
        assert set(names(check)) == set(names(call))


def test_a_call_repeated_goes_to_the_binaries_that_triton_would_take(folder):
    found = rows("sm_90", folder)
    assert [row["case"] for row in found if row["again"] != row["launched"]] == []
    assert [row["case"] for row in found if row["direct"] != len(row["again"])] == []
    assert [(row["case"], row["other"]) for row in found if row["other"]] == []


def test_a_launch_hook_sees_every_launch(folder):
    """Such as that of triton's profiler."""
    found = [row for row in rows("sm_90", folder) if row["observed"] is not None]
    assert len(found) > 5
    assert [row["case"] for row in found if row["observed"] != row["launched"]] == []


def test_biases_take_no_more_memory_than_none(folder):
    """Our loop, against torch's attention on rotated q and k."""
    found = {row["case"]: row["peak"] for row in rows("sm_90", folder) if row["peak"]}
    without = found.pop("plain auto")
    assert len(found) == 3
    assert max(found.values()) <= 1.02 * without, (without, found)


def test_what_a_device_refuses_is_refused(folder):
    """The same calls where a block has less shared memory than the loops were made for."""
    rows("sm_90", folder)
    out = folder / "small.json"
    environment = {
        **os.environ, "STUB_ARCH": "sm_90", "STUB_SHARED": "49152", "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache-sm_90"), "LD_LIBRARY_PATH": str(folder),
        "LANE_CASES": "plain triton",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", str(LANE), "--arch", "sm_90", "--out", str(out)]
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (row,) = json.loads(out.read_text())
    assert "OutOfResources" in row["error"]
