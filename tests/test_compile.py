"""Every shipped kernel variant compiles for every architecture, without spills and within shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "kernels.md"
BACKENDS = ROOT / "docs" / "backends.md"  # what compilation costs
SHARED_MEMORY = {
    "sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536, "gfx1100": 65536
}  # fmt: skip
ARCHS = tuple(SHARED_MEMORY)
CONSUMER_CARDS = {"sm_86": 101376, "sm_120": 101376, "gfx1201": 65536}  # with configurations of others
SHARED_MEMORY |= CONSUMER_CARDS


def compile_rows(folder: Path, *arguments: str) -> list[dict]:
    """Rows of ``compile_kernels.py``; a process of its own, since triton is interpreted in this one."""
    out = folder / "rows.json"
    script = str(ROOT / "tests" / "compile_kernels.py")
    command = [sys.executable, "-W", "ignore", script, "--out", str(out), *arguments]
    # A cache of our own: what an earlier run left behind must not stand in for compiling.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def describe(row: dict) -> str:
    flags = ", ".join(name for name, on in row["variant"].items() if on) or "plain"
    return f"{row['kernel']} {row['arch']} {row['dtype']} D={row['head_dim']} {flags}"


def problems(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        if "error" in row:
            found.append(f"{describe(row)}: {row['error']}")
            continue
        if row["spills"] or row["stack"]:
            found.append(f"{describe(row)}: spills {row['spills']} bytes, stack {row['stack']}")
        if row["shared"] > SHARED_MEMORY[row["arch"]]:
            found.append(f"{describe(row)}: {row['shared']} bytes of shared memory")
        if row["serialized"]:
            found.append(f"{describe(row)}: wgmma serialized")
        # A tile's values are weighed behind the only wait, so that this product runs on until the next tile's.
        if row.get("order", "dot wait dot") != "dot wait dot":
            found.append(f"{describe(row)}: softmax waits for both products ({row['order']})")
        if row["kernel"] == "match" and row.get("fused"):  # its noise would differ from the reference's
            found.append(f"{describe(row)}: fused multiply-adds")
        tensor_core_loop = row["kernel"].startswith(("attention", "polynomial")) and row["dtype"] != "fp32"
        if row["arch"] == "sm_90" and tensor_core_loop and row["block_m"] >= 64 and not row["wgmma"]:
            found.append(f"{describe(row)}: no wgmma")
    return found


def render(rows: list[dict]) -> str:
    """The table of the docs: the costliest variant of each kernel, head dim and architecture."""
    lines = [
        "# Kernels, as compiled", "",
        "`tests/test_compile.py` compiles every kernel ahead of time, without a GPU. With `FASTROPE_WRITE_DOCS=1` it",
        "writes this page; otherwise it compares the page with what it compiled. One row stands for all variants of a",
        "kernel (with or without a mask, rotated or not). A cell gives the tile (query rows x keys), the warps, the",
        "stages, and the largest shared memory in KiB. All compile with zero spilled bytes: in every run all flags for",
        "`sm_90` at head dim 128 and elsewhere those that take the most registers; with `FASTROPE_COMPILE_ALL=1` all",
        "flags, dtypes and head blocks. The table says nothing about speed.", "",
        "Loops with `_tma` read keys and values through tensor descriptors. When pipelined, they multiply a tile of",
        "weights with its values one tile late, so that this product can overlap the next softmax; the test checks the",
        "order in the intermediate code. `polynomial` and `terms` serve per-query scales in 16 bits. `axis_blocks`",
        "serves them in float32 and where the polynomial does not fit.", "",
        "`match` is anchor token matching. Its tiles are rows x vocabulary entries, and its head dim is the number of",
        "codebook channels. A kernel without rows in fp32 has one configuration for all dtypes.", "",
        "| kernel | dtype | head dim | " + " | ".join(ARCHS) + " |", "|---|---|---|" + "---|" * len(ARCHS),
    ]  # fmt: skip
    keys = []
    for row in rows:
        key = (row["kernel"], row["dtype"], row["head_dim"])
        if key not in keys:
            keys.append(key)
    for key in keys:
        cells = []
        for arch in ARCHS:
            same = [r for r in rows if (r["kernel"], r["dtype"], r["head_dim"]) == key and r["arch"] == arch]
            if not same:
                cells.append("")
                continue
            first = same[0]
            cells.append(
                f"{first['block_m']} x {first['block_n']}, {first['num_warps']}w, {first['num_stages']}s, "
                f"{max(r['shared'] for r in same) / 1024:.0f}"
            )
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@pytest.mark.compile
def test_every_configuration_compiles_without_spills(tmp_path):
    """Every kernel and launch configuration, and every flag on one architecture; then the table of the docs against
    what was compiled."""
    rows = compile_rows(tmp_path)
    assert len(rows) > 500
    assert {r["arch"] for r in rows} == set(ARCHS)
    assert problems(rows) == []
    stated = re.search(r"on one CPU core: ([\d.]+) s and ([\d.]+) s", BACKENDS.read_text(encoding="utf-8"))
    for modulated, figure in enumerate(stated.groups()):  # of another machine
        assert seconds(rows, bool(modulated)) < 10 * float(figure)
    table, (before, after) = render(rows), parts()
    if os.environ.get("FASTROPE_WRITE_DOCS") == "1":
        TABLE.write_text(table + after)
    import triton

    if triton.__version__ == "3.9.0":  # shared memory differs a little between releases
        assert before == table, "run with FASTROPE_WRITE_DOCS=1 and commit docs/kernels.md"


FEW_CHANNELS = ("means", "per_query_means")  # work on few channels at once, whatever the head dim


def seconds(rows: list[dict], modulated: bool) -> float:
    """What a first call on sm_90 compiles, in bfloat16 at head dim 128: a
    plain one, which folds into the keys, or a modulated one of the fused loop."""
    kernels = [("pack", {"GATHER", "ROTATE"})]
    if modulated:
        kernels += [("pack", {"GATHER"}), ("means", set()), ("queries", {"ROTATE"}), ("terms", set())]
        kernels += [("order", set()), ("run_sums", set()), ("per_query_means", set())]
        kernels += [("polynomial_tma", set()), ("attention_modulated_tma", {"MODULATED"})]
    else:
        kernels += [("pack", {"ROTATE"})]
    found = {
        (row["kernel"], frozenset(name for name, on in row["variant"].items() if on)): row["seconds"]
        for row in rows
        if (row["arch"], row["dtype"], row["head_dim"])
        == ("sm_90", "bf16", 64 if row["kernel"] in FEW_CHANNELS else 128)
    }
    return sum(found[kernel, frozenset(flags)] for kernel, flags in kernels)


MACHINE_CODE = "\n## Machine code of the prologue\n"


def parts() -> tuple[str, str]:
    """The page up to the section on machine code, and that section."""
    page = TABLE.read_text(encoding="utf-8")
    place = page.index(MACHINE_CODE)
    return page[:place], page[place:]


def render_machine_code(rows: list[dict]) -> str:
    columns = {
        "channels": "channels a thread", "instructions": "instructions", "registers": "registers",
        "wide_loads": "128-bit loads", "narrow_loads": "loads of 16 bits", "wide_stores": "128-bit stores",
        "reductions": "reductions in loops", "barriers": "barriers in loops",
    }  # fmt: skip
    lines = [
        MACHINE_CODE,
        "Of `sm_90`, bfloat16, read from what ptxas made (`nvdisasm`): instructions as they stand, whichever branches",
        "a call takes, beside the channels that a thread holds (of `means`: reads in a turn of its loop), and what",
        "stands in innermost loops. `queries` has a body for every query variant, and one for the means of groups.",
        "`means` copies keys through a ring in shared memory, which takes two barriers for 128 keys; nothing is added",
        "up across threads before its end.", "",
        "| kernel | head dim | flags | " + " | ".join(columns.values()) + " |",
        "|---|---|---|" + "---:|" * len(columns),
    ]  # fmt: skip
    for row in rows:
        flags = ", ".join(name for name, on in row["variant"].items() if on) or "plain"
        row["channels"] = max(row["block_m"], row["block_n"]) * row["block_d"] // (32 * row["num_warps"])
        cells = " | ".join(str(row[name]) for name in columns)
        lines.append(f"| {row['kernel']} | {row['head_dim']} | {flags} | {cells} |")
    return "\n".join(lines) + "\n"


@pytest.mark.compile
def test_machine_code_of_the_prologue(tmp_path):
    """Channels are read 16 bytes at a time, once; nothing is summed across threads in a loop."""
    rows = compile_rows(tmp_path, "--machine-code")
    assert problems(rows) == []
    rotated, halves, streamed, queries, queries_streamed, means, reweight = rows
    assert max(rotated["instructions"], halves["instructions"]) <= 280
    assert [row["narrow_loads"] for row in (rotated, halves, queries, means, reweight)] == [0] * 5
    assert max(row["narrow_loads"] for row in (streamed, queries_streamed)) <= 2  # the weights of two norms
    assert [row["wide_loads"] for row in (rotated, halves, streamed)] == [6, 6, 8]  # channels; cosines and sines
    assert queries["instructions"] <= 1040
    assert means["loops"] > 0
    assert (means["reductions"], means["barriers"]) == (0, 2)
    section = render_machine_code(rows)
    if os.environ.get("FASTROPE_WRITE_DOCS") == "1":
        TABLE.write_text(parts()[0] + section)
    import triton

    if triton.__version__ == "3.9.0":
        assert parts()[1] == section, "run with FASTROPE_WRITE_DOCS=1 and commit docs/kernels.md"


def test_seconds_are_of_what_a_first_call_compiles():
    row = {"arch": "sm_90", "dtype": "bf16", "head_dim": 128, "seconds": 1.0}
    on = [("pack", "GATHER ROTATE"), ("pack", "GATHER"), ("pack", "ROTATE"), ("queries", "ROTATE"), ("terms", ""),
          ("polynomial_tma", ""), ("attention_modulated_tma", "MODULATED"), ("run_sums", ""),
          ("order", ""), ("match", "")]  # fmt: skip
    rows = [{**row, "kernel": kernel, "variant": dict.fromkeys(flags.split(), True)} for kernel, flags in on]
    rows += [{**row, "kernel": kernel, "head_dim": 64, "variant": {"HAS_KEY_BIAS": False}} for kernel in FEW_CHANNELS]
    rows += [{**rows[0], "arch": "sm_80"}]
    counts = re.search(r"compiles (\d+) kernels, a modulated one (\d+) at most", BACKENDS.read_text(encoding="utf-8"))
    assert [seconds(rows, False), seconds(rows, True)] == [float(n) for n in counts.groups()]


@pytest.mark.compile
def test_padded_heads_of_hoppers_loops(tmp_path):
    """Head dims between powers of two mask channels as well, which takes registers of the loops that have none left."""
    loops = ("attention_tma", "attention_modulated_tma", "polynomial_tma")
    kernels = [part for loop in loops for part in ("--kernel", loop)]
    dims = [part for dim in ("96", "192") for part in ("--head-dim", dim)]
    rows = compile_rows(tmp_path, "--all", "--arch", "sm_90", "--dtype", "bf16", *kernels, *dims)
    assert len(rows) == 10
    assert problems(rows) == []


@pytest.mark.compile
def test_consumer_cards(tmp_path):
    """The loops that have most in registers; the whole set, with every other architecture's, behind the switch."""
    kernels = [part for kernel in ("attention_modulated", "polynomial") for part in ("--kernel", kernel)]
    archs = [part for arch in CONSUMER_CARDS for part in ("--arch", arch)]
    rows = compile_rows(tmp_path, "--dtype", "bf16", "--head-dim", "128", *kernels, *archs)
    assert {row["arch"] for row in rows} == set(CONSUMER_CARDS)
    assert len(rows) == 8
    assert problems(rows) == []


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.skipif(
    "FASTROPE_COMPILE_ALL" not in os.environ, reason="every head block and dtype: FASTROPE_COMPILE_ALL=1"
)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_head_block_and_dtype_compiles(arch, tmp_path):
    rows = compile_rows(tmp_path, "--all", "--arch", arch)
    assert len(rows) > 600
    assert problems(rows) == []


def test_a_spilling_kernel_is_caught():
    row = dict(kernel="attention", arch="sm_90", dtype="bf16", head_dim=128, variant={"HAS_KEY_BIAS": True}, spills=4,
               stack=8, shared=300000, serialized=True, wgmma=False, order="dot dot wait", block_m=128)  # fmt: skip
    fused = {**row, "kernel": "match", "fused": True}
    text = "\n".join(problems([row, {**row, "error": "boom"}, fused]))
    for sign in ("spills 4", "300000 bytes", "serialized", "no wgmma", "waits for both", "boom", "fused multiply-adds"):
        assert sign in text
