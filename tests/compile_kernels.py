"""Compile every shipped kernel variant for every architecture, without a GPU, and say what it costs.

``python tests/compile_kernels.py --out table.json [--kernel K] [--arch A]`` runs in a process of its own, since
``TRITON_INTERPRET`` must be off when triton is imported. Each row: kernel, arch, dtype, head dim, variant, CPU seconds
that it took, registers, stack and spilled bytes, shared memory, whether wgmma was serialized, the order of products and
waits in a pipelined loop, whether multiply-adds were fused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # variants that are the same kernel have a log each
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # the same code, a tenth sooner
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="fastrope-aot-"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrope.kernels import abi, attention, axis_blocks, config, match, means, order, pack, polynomial, query_means

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_89": GPUTarget("cuda", 89, 32), "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
    "sm_86": GPUTarget("cuda", 86, 32), "sm_120": GPUTarget("cuda", 120, 32),
    "gfx1100": GPUTarget("hip", "gfx1100", 32), "gfx1201": GPUTarget("hip", "gfx1201", 32),
}  # fmt: skip
FUNCTIONS = {
    **{kernel: attention.attention_kernel for kernel in config.KERNELS if kernel.startswith("attention")},
    "axis_blocks": axis_blocks.axis_block_kernel,
    **dict.fromkeys(("polynomial", "polynomial_tma"), polynomial.polynomial_kernel),
    "terms": polynomial.terms_kernel, "order": order.order_kernel,
    "pack": pack.pack_kernel, "queries": pack.queries_kernel, "scatter": pack.scatter_kernel,
    "means": means.means_kernel, "reweight": means.reweight_kernel,
    "run_sums": query_means.run_sums_kernel, "per_query_means": query_means.per_query_means_kernel,
    "match": match.match_kernel,
}  # fmt: skip
KERNELS = (*config.KERNELS, "match")
ELEMENT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Head dims of the usual run, one per launch configuration and padded size; --all adds those that share a configuration
# with them, float16, which differs from bfloat16 in the instruction's type only, and float32 of kernels whose
# configuration is that of 16 bits (they multiply no matrices; in float32 they take fewer registers).
HEAD_DIMS = (16, 64, 128, 256)
MORE_HEAD_DIMS = (32, 96, 192)
# Codebook channels, of match: a row in one tile, and one walked through.
MATCH_DIMS = (8, 4096)
MORE_MATCH_DIMS = (1, 4, 64)
# Where the usual run has all flags. Elsewhere it has those that take the most registers: adjacent pairs, not halves,
# rows of two streams, not of one tensor, and biases of keys; and loops in all flags.
ALL_FLAGS_ON, ALL_FLAGS_AT = "sm_90", 128
HEAVIEST = ("STREAMS", "HAS_KEY_BIAS", "HAS_ACTIVE")
DTYPES = (torch.bfloat16, torch.float32)
ONE_FOR_ALL_DTYPES = (
    "pack", "queries", "means", "reweight", "run_sums", "per_query_means", "scatter", "order", "match",
)  # fmt: skip
INT_POINTERS = {
    "SEGMENTS", "SORTED_QUERIES", "TILE_BUCKET", "SOURCE", "BLOCK_KEYS", "BLOCK_A", "BLOCK_B", "BLOCK_C", "COLUMNS_A",
    "MEMBERS", "MEMBER_BOUNDS", "COLUMNS_B", "COLUMNS_C", "ROWS", "WINDOWS", "WINDOW",
    "COLUMNS", "CHANNELS", "TILES", "MEMBER", "BOUNDS", "PASS", "PAIR_RUNS", "RUN_KEYS", "RUN_GROUPS", "PLACES",
}  # fmt: skip
LONG_POINTERS = {"ANCHORS", "POSITION", "SEEDS", "KEYS", "TOKENS"}
DATA_POINTERS = {"Q", "K", "V", "X", "X2", "W", "W2", "OUT", "RESIDUAL", "LOGITS", "CODEBOOK"}
BOOL_POINTERS = {"ACTIVE", "ACCEPTED"}
UNIT_STRIDES = {"stride_qd", "stride_kd", "stride_vd", "stride_d", "stride_lv"}
NUMBERS = {"log2_scale", "tau", "eps", "eps2", "max_key_angle", "heads_ratio"}


FLAGS = {
    **{loop: {"MODULATED": (loop != "attention",), "HAS_KEY_BIAS": (False, True)} for loop in config.LOOPS},
    **{loop: {"MODULATED": (loop != "attention_tma",), "HAS_KEY_BIAS": (False, True)} for loop in config.TMA_LOOPS},
    "axis_blocks": {"HAS_KEY_BIAS": (False, True)},
    **{kernel: {"HAS_KEY_BIAS": (False, True)} for kernel in ("polynomial", "polynomial_tma")},
    "terms": {},
    "order": {},
    "pack": dict.fromkeys(("INTERLEAVED", "GATHER", "ROTATE", "STREAMS", "VALUES"), (False, True)),
    "queries": dict.fromkeys(("INTERLEAVED", "ROTATE", "STREAMS"), (False, True)),
    "means": {"HAS_KEY_BIAS": (False, True), "STREAMS": (False, True)},
    "reweight": {"INTERLEAVED": (False, True)},
    "run_sums": {"INTERLEAVED": (False, True), "HAS_KEY_BIAS": (False, True)},
    "per_query_means": {"INTERLEAVED": (False, True)},
    "scatter": {},
    "match": {"COSINE": (False, True), "HAS_ACTIVE": (False, True)},
}  # fmt: skip


def variants(kernel: str) -> list[dict]:
    """Every combination of flags a launcher can ask for."""
    flags = FLAGS[kernel]
    found = [dict(zip(flags, values, strict=True)) for values in itertools.product(*flags.values())]
    # Rows that are only gathered or joined have no pairs; queries that are not rotated come in one tensor.
    found = [v for v in found if v.get("ROTATE", True) or not v["INTERLEAVED" if kernel == "pack" else "STREAMS"]]
    return [v for v in found if not (v.get("VALUES") and v["ROTATE"])]  # values have no positions


def heaviest(variant: dict) -> bool:
    """Whether a variant has the flags that take the most registers, of those that it can have."""
    paired = variant.get("INTERLEAVED", True) or not variant.get("ROTATE", True)
    return paired and all(variant.get(flag, True) for flag in HEAVIEST)


def jobs(kernels, archs, everything: bool = False) -> list[tuple]:
    """(kernel, arch, dtype name, head dim, variant) of what ships."""
    found = []
    for kernel, arch in itertools.product(kernels, archs):
        dims, more = (MATCH_DIMS, MORE_MATCH_DIMS) if kernel == "match" else (HEAD_DIMS, MORE_HEAD_DIMS)
        dims = sorted(dims + more) if everything else dims
        if kernel == "scatter":  # knows rows, not heads
            dims = dims[:1]
        if kernel in ("means", "per_query_means"):  # work on few channels at once, whatever the head dim
            dims = [d for d in dims if d <= 64]
        for head_dim, dtype in itertools.product(dims, ELEMENT if everything else DTYPES):
            if kernel == "attention_parts" and dtype == torch.float32:  # the same as attention_modulated
                continue
            if kernel in ONE_FOR_ALL_DTYPES and dtype == torch.float32 and not everything:
                continue
            if kernel != "match" and not config.ships(kernel, config.LIKE.get(arch, arch), dtype, head_dim):
                continue
            # Pipelined loops without a mask take fewer registers and more shared memory.
            every = everything or (kernel in (*config.LOOPS, *config.TMA_LOOPS) and dtype != torch.float32)
            every |= arch == ALL_FLAGS_ON and head_dim == min(ALL_FLAGS_AT, dims[-1])
            found += [(kernel, arch, ELEMENT[dtype], head_dim, v) for v in variants(kernel) if every or heaviest(v)]
    return found


ROTATED = {"INTERLEAVED": True, "GATHER": True, "ROTATE": True, "STREAMS": False, "VALUES": False}
# Jobs whose machine code is read: what takes every query and key through the prologue of a call.
MACHINE_CODE = [
    (kernel, "sm_90", "bf16", dim, variant)
    for kernel, dim, variant in (
        ("pack", 128, ROTATED), ("pack", 128, {**ROTATED, "INTERLEAVED": False}),
        ("pack", 128, {**ROTATED, "STREAMS": True}),
        ("queries", 128, {"INTERLEAVED": True, "ROTATE": True, "STREAMS": False}),
        ("queries", 128, {"INTERLEAVED": True, "ROTATE": True, "STREAMS": True}),
        ("means", 64, {"HAS_KEY_BIAS": False, "STREAMS": False}), ("reweight", 128, {"INTERLEAVED": True}),
    )
]  # fmt: skip


def cpu_seconds() -> float:
    """Of this process and the compilers that it has run: what a busy machine does not change."""
    return sum(os.times()[:4])


def compile_one(job: tuple) -> dict:
    """Compile one variant and read its cost from the binary."""
    kernel, arch, element, head_dim, variant = job
    dtype = next(d for d, name in ELEMENT.items() if name == element)
    fn = FUNCTIONS[kernel]
    if kernel == "match":
        launch = match.select_match(config.LIKE.get(arch, arch), head_dim)
        constants = {"BLOCK_V": launch.block_v, "BLOCK_K": launch.block_k, "BLOCK_D": launch.block_d, **variant}
        block_m, block_n, num_stages, options = 1, launch.block_v, 1, launch.options
    else:
        launch = config.select(kernel, config.LIKE.get(arch, arch), dtype, head_dim, variant.get("HAS_KEY_BIAS", False))
        constants = {
            "HEAD_DIM": head_dim, "BLOCK_D": launch.block_d, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n,
            "QUERY_TILE": abi.QUERY_TILE, "TMA": launch.tma,
            "PIPELINED": launch.pipelined, "STAGES": launch.num_stages,
            "BLOCK_P": max(8, launch.block_d // 4), "WIDTH": 2 * max(8, launch.block_d // 4), **variant,
        }  # fmt: skip
        block_m, block_n, num_stages = launch.block_m, launch.block_n, launch.num_stages
        options = launch.options
    wide_out = kernel in ("means", "run_sums", "per_query_means", "attention_parts")
    described = _described(kernel, element, launch) if kernel != "match" and launch.tma else {}
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants or name in UNIT_STRIDES:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants.get(name, 1)
        elif name in described:
            signature[name] = described[name]
        elif name.isupper():
            kind = "i32" if name in INT_POINTERS else "i1" if name in BOOL_POINTERS else "fp32"
            kind = "i64" if name in LONG_POINTERS else kind
            own = name in DATA_POINTERS and not (name == "OUT" and wide_out)
            signature[name] = "*" + (element if own else kind)
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in NUMBERS else "i32"
            if name.startswith("stride_"):  # counts and table strides are not specialized
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)
    row = dict(kernel=kernel, arch=arch, dtype=element, head_dim=head_dim, variant=variant, block_m=block_m,
               block_n=block_n, block_d=launch.block_d, num_warps=launch.num_warps, num_stages=num_stages)  # fmt: skip
    log, start = io.StringIO(), cpu_seconds()
    try:
        with contextlib.redirect_stdout(log):
            binary = triton.compile(source, target=TARGETS[arch], options=options)
    except Exception as error:  # one bad variant must not hide the others
        while error.__cause__ is not None:  # of nested jit functions the innermost says what is wrong
            error = error.__cause__
        return {**row, "error": f"{type(error).__name__}: {error}"[-500:]}
    row["seconds"] = cpu_seconds() - start
    row["shared"] = binary.metadata.shared
    if kernel in config.TMA_LOOPS and launch.pipelined:
        row["order"] = order_of_products(binary.asm["ttgir"])
    if arch.startswith("gfx"):
        return {**row, **_amd_cost(binary)}
    code = machine_code(binary) if job in MACHINE_CODE else {}
    return {**row, **_nvidia_cost(binary, log.getvalue()), **code}


def _described(kernel: str, element: str, launch) -> dict[str, str]:
    """Types of the arguments that are tensor descriptors."""

    def of(kind: str, channels: int) -> str:
        return f"tensordesc<{kind}[1, 1, {launch.block_n}, {channels}]>"

    values = of(element, launch.block_d)
    if kernel in config.TMA_LOOPS:
        return {"K": values, "V": values}
    pairs = max(8, launch.block_d // 4)
    return {"K": of(element, 2 * pairs), "PHASE": of("fp32", pairs), "V": values}


def order_of_products(ttgir: str) -> str:
    """Products of the loop over keys and the waits for them, such as "dot wait dot"."""
    lines = ttgir.splitlines()
    product = next(i for i, line in enumerate(lines) if "warp_group_dot " in line)
    first = max(i for i in range(product) if "scf.for" in lines[i])
    indent = len(lines[first]) - len(lines[first].lstrip())
    last = next(i for i in range(product, len(lines)) if lines[i].startswith(" " * indent + "}"))
    found = (re.search(r"warp_group_dot(_wait)? ", line) for line in lines[first:last])
    return " ".join("wait" if match[1] else "dot" for match in found if match)


def _nvidia_cost(binary, log: str) -> dict:
    """What ptxas said while it made the binary (its options differ between releases of triton)."""
    stack, stores, loads = (
        int(re.search(rf"(\d+) bytes {name}", log).group(1)) for name in ("stack frame", "spill stores", "spill loads")
    )
    return dict(registers=int(re.search(r"Used (\d+) registers", log).group(1)), stack=stack, spills=stores + loads,
                serialized="serialized" in log, wgmma="wgmma" in binary.asm["ptx"],
                fused="fma.rn.f32" in binary.asm["ptx"])  # fmt: skip


def machine_code(binary) -> dict:
    """Instructions of a binary, its accesses of global memory by their width, and what innermost loops hold that makes
    threads wait for one another."""
    labels, found = {}, []
    for line in binary.asm["sass"].splitlines()[1:]:
        if label := re.match(r"(\w+):$", line):
            labels[label[1]] = len(found)
        elif "\t" in line:
            found.append(re.sub(r"^@!?U?P\w+ ", "", line.split("\t")[1]))
    jumps = [(labels.get(match[1], 0), n) for n, op in enumerate(found) if (match := re.match(r"BRA (\w+);", op))]
    back = [(first, last) for first, last in jumps if first < last]
    inner = [(a, b) for a, b in back if not any(a <= c and d < b for c, d in back)]
    in_loops = [op for first, last in inner for op in found[first:last]]
    loads = [op for op in found if op.startswith("LDG.")]
    return dict(
        instructions=sum(not op.startswith("NOP") for op in found) - 1,  # the last jumps to itself
        wide_loads=sum(op.startswith("LDG.E.128") for op in loads),
        narrow_loads=sum(op.startswith(("LDG.E.U16", "LDG.E.S16", "LDG.E.U8")) for op in loads),
        wide_stores=sum(op.startswith("STG.E.128") for op in found),
        reductions=sum(op.startswith(("SHFL", "REDUX")) for op in in_loops),
        barriers=sum(op.startswith("BAR") for op in in_loops), loops=len(inner),
    )  # fmt: skip


def _amd_cost(binary) -> dict:
    """Spills are bytes of scratch memory; moves between the register files of CDNA are not."""
    text = binary.asm["amdgcn"]

    def number(name: str) -> int:
        return max(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))

    scratch = number("private_segment_fixed_size")
    return dict(registers=number("vgpr_count"), stack=scratch, spills=scratch, serialized=False, wgmma=False)


def main() -> None:
    """Compile what the arguments select and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--kernel", action="append", choices=KERNELS)
    parser.add_argument("--arch", action="append", choices=TARGETS)
    parser.add_argument("--head-dim", action="append", type=int)
    parser.add_argument("--dtype", action="append")
    parser.add_argument("--all", action="store_true", help="every head block and dtype, not one per configuration")
    parser.add_argument("--machine-code", action="store_true", help="the kernels whose machine code is read, no others")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    archs = args.arch or (*config.ARCHS, *(config.LIKE if args.all else ()))
    todo = [j for j in jobs(args.kernel or KERNELS, archs, args.all)
            if (not args.head_dim or j[3] in args.head_dim) and (not args.dtype or j[2] in args.dtype)]  # fmt: skip
    todo = MACHINE_CODE if args.machine_code else todo
    with ProcessPoolExecutor(args.workers) as pool:
        rows = list(pool.map(compile_one, todo, chunksize=4))
    Path(args.out).write_text(json.dumps(rows, indent=0))
    print(f"{len(rows)} kernels compiled", file=sys.stderr)


if __name__ == "__main__":
    main()
