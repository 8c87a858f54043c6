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
EVERYTHING = "FASTROPE_COMPILE_ALL" in os.environ  # every case of tests/gpu, not some of each; minutes for a target
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
        "pack",
        "pack",
        "means",
        "pack",
        "order",
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

# The same of the tests of tests/gpu: what their calls may launch, by the word among their arguments that decides it. A
# call with every modulation takes two passes. An alternative is that of another layout, dtype or length, of a head dim
# that 8 does not divide, or of rotations that were applied before.
ALL = (*PREPARED, "attention", "queries", "attention")
VALUES = ("pack", "means", "pack", "means")  # with means of values, which the pass that packs these needs
AXIS_BLOCKS = (*PER_QUERY, "axis_block", "attention", "queries", "axis_block", "attention")
RUNS, TERMS = ("run_sums", "per_query_means"), ("queries", "terms", "polynomial", "attention")
POLYNOMIAL = ("pack", "pack", "means", "pack", "order", *RUNS, *TERMS, *TERMS)
POLYNOMIAL_APPLIED = ("pack", "pack", "means", "order", *RUNS, *TERMS, *TERMS)
FOLDED = ("pack", "pack", "means", "reweight")
PADDED = ("pack", *FOLDED)
OF_TESTS = {
    "test_flux_kontext": {
        "plain": [("pack", "pack", "attention"), ("attention",)],
        "grag": [("pack", "means", "queries", "attention"), ("means", "queries", "attention")],
        "bands": [("pack", "queries", "attention"), ("queries", "attention")],
        "loose-levels": [("pack", "queries", "attention")],
        "loose-per-query": [
            ("pack", "pack", "order", *TERMS), ("order", *TERMS), ("pack", "queries", "axis_block", "attention"),
            ("queries", "axis_block", "attention"),
        ],
        "crop-gain": [("pack", "pack", "queries", "attention")],
        "all": [(*PREPARED, "attention")],
        "all-per-query": [
            ("pack", "pack", "means", "pack", "order", *RUNS, *TERMS),
            ("pack", "pack", "means", "order", *RUNS, *TERMS),
            (*PER_QUERY, "axis_block", "attention"),
        ],
    },
    "test_head_dims_of_a_polynomial": {"": [POLYNOMIAL]},
    "test_head_dims": {"levels": [ALL], "distinct": [AXIS_BLOCKS]},
    "test_biases_and_values": {
        "levels": [(*VALUES, *ALL[-4:])], "distinct": [(*VALUES, *RUNS, *AXIS_BLOCKS[-6:])],
    },
    "test_lengths": {"": [ALL], "17": [ALL[1:]], "1": [("pack", "means", "queries", "attention")]},
    "test_strides_with_nan_between_and_behind": {
        "False": [ALL, ("pack", "pack", "attention")], "True": [ALL, ("attention",)],
    },
    "test_masked_keys_may_hold_nan": {"levels": [ALL], "distinct": [AXIS_BLOCKS]},
    "test_offsets_beyond_int32": {"": [ALL, ("pack", "pack", "pack", "attention")]},
    "test_the_same_bits_every_time": {"levels": [ALL], "distinct": [AXIS_BLOCKS]},
    "test_flux_kontext_folded": {"plain": [("pack", "pack")], "grag": [FOLDED], "bands": [("pack", "pack")]},
    "test_flux_kontext_split": {
        "loose-levels": [("pack", "queries", "attention", "pack", "scatter")],
        "crop-gain": [("pack", "pack", "queries", "attention", "pack", "scatter")],
        "loose-per-query": [("pack", "pack", "order", *TERMS, "pack", "scatter")],
        "all": [(*PREPARED, "attention", *FOLDED, "scatter")],
        "all-per-query": [("pack", "pack", "means", "pack", "order", *RUNS, *TERMS, *FOLDED, "scatter")],
    },
    "test_head_dims_folded": {"False": [("pack", "pack"), ("pack", "pack", "pack")], "True": [PADDED]},
    "test_lengths_folded": {"": [PADDED], "1": [FOLDED], "17": [FOLDED]},
    "test_strides_folded": {"False": [("pack", "pack"), (), ("pack", "pack", "pack")], "True": [PADDED, FOLDED]},
    "test_streams_fold_into_the_keys": {"": [PADDED]},
    "test_head_dims_split": {
        "levels": [(*ALL, *FOLDED, "scatter"), (*ALL, *PADDED, "scatter")],
        "polynomial": [(*POLYNOMIAL, *FOLDED, "scatter"), (*POLYNOMIAL, *PADDED, "scatter")],
    },
    "test_strides_split": {
        "levels": [(*ALL, *FOLDED, "scatter")],
        "polynomial": [(*POLYNOMIAL, *FOLDED, "scatter"), (*POLYNOMIAL_APPLIED, *FOLDED, "scatter")],
    },
    "test_a_captured_graph_replays_on_new_values": {
        "levels": [ALL], "distinct": [AXIS_BLOCKS], "folded": [PADDED], "split": [(*ALL, *FOLDED, "scatter")],
        "polynomial": [(*POLYNOMIAL, *FOLDED, "scatter")],
    },
    "test_other_paths_do_not_synchronise": {
        "folded": [PADDED], "split": [(*ALL, *FOLDED, "scatter")], "polynomial": [(*POLYNOMIAL, *FOLDED, "scatter")],
    },
    "test_the_hot_path_does_not_synchronise": {"levels": [ALL], "distinct": [AXIS_BLOCKS]},
    "test_lengths_share_kernels": {"levels": [ALL], "distinct": [POLYNOMIAL]},
    "test_layouts_share_kernels": {"": [ALL]},
    "test_parity_with_the_reference_on_the_cpu": {"": [("match",)]},
    "test_no_call_waits_for_the_device": {"": [("match",)]},
    "test_one_binary_for_all_sizes": {"": [("match",)]},
}  # fmt: skip
RARE = {"test_lengths_share_kernels", "test_layouts_share_kernels"}  # not in every run: they compile for long


@cache
def rows(arch: str, folder: Path) -> list[dict]:
    """Rows of the lane for one architecture: calls of its own, then those of ``tests/gpu``, which have a "test"."""
    out = folder / f"{arch}.json"
    environment = {**os.environ, "STUB_FOLDER": str(folder), "TRITON_CACHE_DIR": str(folder / f"cache-{arch}")}
    environment.pop("STUB_ARCH", None)
    command = [sys.executable, "-W", "ignore", str(LANE), "--arch", arch, "--out", str(out), *["--all"] * EVERYTHING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("launches")


def listed(folder: Path) -> list[dict]:
    """Of the lane's own calls."""
    return [row for row in rows("sm_90", folder) if "test" not in row]


def of_tests(folder: Path) -> list[dict]:
    """Of the calls of ``tests/gpu``."""
    return [row for row in rows("sm_90", folder) if "test" in row]


def names(row: dict) -> tuple[str, ...]:
    return tuple(name.removesuffix("_kernel") for name in row["launched"])


@pytest.mark.parametrize(
    "arch",
    [
        "sm_90",
        *(
            pytest.param(arch, marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not EVERYTHING, reason="FASTROPE_COMPILE_ALL=1"),
            ])
            for arch in SLOW
        ),
    ],
)  # fmt: skip
def test_every_launch_is_legal(arch, folder):
    found = rows(arch, folder)
    assert [row for row in found if row["error"]] == []
    assert sum("test" in row for row in found) > 100
    assert sum("test" not in row for row in found) > 50
    launched = Counter(name for row in found for name in names(row))
    expected = {"attention", "axis_block", "pack", "queries", "means", "reweight", "run_sums", "per_query_means",
                "scatter", "match", "terms", "polynomial", "order"}  # fmt: skip
    assert set(launched) == expected


def test_no_more_launches_than_there_need_be(folder):
    found = {row["case"]: names(row) for row in listed(folder)}
    assert {case: found[case] for case in LAUNCHES} == LAUNCHES


def test_calls_of_one_kind_share_kernels(folder):
    """Masks, grouped heads, raw or applied rotation, log-sum-exps: at most two kernels that the call before had not."""
    compiled = {row["case"]: row["compiled"] for row in listed(folder)}
    assert compiled["all auto"] == compiled["all-per-query lse"] == compiled["all-per-query grouped"] == 0
    assert compiled["all applied"] == compiled["all lse"] == compiled["all grouped"] == 0
    assert compiled["all masked triton"] <= 2
    assert sum(compiled.values()) < 65


def test_a_check_compiles_nothing_that_its_call_does_not(folder):
    """Of kernels on a card without rows: it comes before the call, and costs some launches of the same kernels."""
    found = {row["case"]: row for row in listed(folder)}
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
    found = [row for row in listed(folder) if row["observed"] is not None]
    assert len(found) > 5
    assert [row["case"] for row in found if row["observed"] != row["launched"]] == []


def test_biases_take_no_more_memory_than_none(folder):
    """Our loop, against torch's attention on rotated q and k."""
    found = {row["case"]: row["peak"] for row in listed(folder) if row["peak"]}
    without = found.pop("plain auto")
    assert len(found) == 3
    assert max(found.values()) <= 1.02 * without, (without, found)


def test_calls_of_tests_on_a_gpu_launch_no_more_than_they_need(folder):
    found = {}
    for row in of_tests(folder):
        kind = next((word for word in row["arguments"].values() if word in OF_TESTS[row["test"]]), "")
        found.setdefault((row["test"], kind), set()).add(names(row))
    allowed = {where: set(OF_TESTS[where[0]][where[1]]) for where in found}
    assert {where: more for where, launched in found.items() if (more := launched - allowed[where])} == {}
    assert {test for test, _ in found} == set(OF_TESTS) - (set() if EVERYTHING else RARE)


def test_calls_of_tests_on_a_gpu_cover_what_is_told_apart(folder):
    """Of dtypes, head dims and layouts of inputs."""
    found: dict[str, set] = {}
    for row in of_tests(folder):
        for name, word in row["arguments"].items():
            found.setdefault(name, set()).add(word)
    assert found["dtype"] == {"bfloat16", "float16", "float32"}
    assert found["dim"] >= {"64", "96", "128", "256"}
    assert found["layout"] == {"contiguous", "heads_first", "fused", "padded", "transposed", "expanded"}


def test_calls_of_tests_on_a_gpu_share_kernels(folder):
    found = of_tests(folder)
    assert [row["case"] for row in found if row["compiled"] > len(row["launched"])] == []
    assert sum(row["compiled"] for row in found) < (450 if EVERYTHING else 80)


def test_a_graph_could_capture_a_call_made_again(folder):
    """Calls of ``tests/gpu`` read nothing on the host then, and compile nothing."""
    found = of_tests(folder)
    assert [(row["case"], row["reads"]) for row in found if row["reads"]] == []
    captured = [row for row in found if row["test"] == "test_a_captured_graph_replays_on_new_values"]
    first = {row["case"]: n for n, row in reversed(list(enumerate(captured)))}.values()
    assert [row["case"] for n, row in enumerate(captured) if n not in first and row["compiled"]] == []
    assert len(captured) > 4 * len(first)


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
