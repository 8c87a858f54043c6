"""Launch configurations: which tile, how many warps and stages, per kernel, architecture, dtype and head dim.

Pure and static: the same call always gets the same configuration, so results do not change between processes and
nothing is tuned at run time. The table below is what ``tests/test_compile.py`` compiles ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial

import torch

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx1100")
# Those that use the configurations of another; tests compile these for both.
LIKE = {"sm_86": "sm_89", "sm_120": "sm_80", "gfx1201": "gfx1100"}  # modulated loops of sm_89 spill on sm_120
MOST_CHANNELS = {"gfx1100": 128}  # of a head, where more spill; 256 elsewhere
LOOPS = ("attention", "attention_modulated", "attention_parts")
TMA_LOOPS = ("attention_tma", "attention_modulated_tma")  # keys and values through tensor descriptors
TMA_ARCHS = ("sm_90",)  # where these ship, for 16-bit inputs
POLYNOMIAL = ("polynomial", "polynomial_tma", "terms", "order")  # for 16-bit inputs of up to 128 channels
PROLOGUE = ("pack", "queries", "means", "reweight", "run_sums", "per_query_means", "scatter")
KERNELS = (*LOOPS, *TMA_LOOPS, "axis_blocks", *POLYNOMIAL, *PROLOGUE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes in tokens and (padded) channels, warps and software-pipeline stages of one launch; whether keys and
    values come through tensor descriptors, whether the loop weighs values one tile late, and a bound on the registers
    of a thread (0: the compiler's choice)."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    tma: bool = False
    pipelined: bool = False
    max_registers: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """Compiler options of the launch. A fused multiply-add rounds once where two operations round twice: closer to
        what is meant, and no kernel of these relies on the second rounding (exact products stay exact)."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


def arch_of(major: int, minor: int) -> str:
    """The configuration a CUDA compute capability uses: the nearest one whose tiles fit (sm_80: 68 KiB)."""
    if (major, minor) == (8, 0) or major == 12:
        return "sm_80"
    if major == 8:
        return "sm_89"
    if major in (9, 10, 11):
        return "sm_90" if major == 9 else "sm_100"
    return f"sm_{major}{minor}"


def unsupported(arch: str, head_dim: int = 0) -> str | None:
    """Why no kernel ships for an architecture, or there for heads of ``head_dim`` channels, or None."""
    if arch not in ARCHS:
        return f"no kernel configuration for {arch}; supported: {', '.join(ARCHS)}"
    most = MOST_CHANNELS.get(arch, 256)
    return None if head_dim <= most else f"no kernel configuration for heads of more than {most} channels on {arch}"


def ships(kernel: str, arch: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether :func:`select` has a configuration: descriptors are for few architectures, they and the polynomial for
    16-bit inputs; the polynomial of more than 128 channels spills, of more than 64 on gfx1100."""
    if (kernel.endswith("_tma") and arch not in TMA_ARCHS) or unsupported(arch, head_dim):
        return False
    if kernel in POLYNOMIAL and head_dim > (64 if arch == "gfx1100" else 128):
        return False
    return dtype != torch.float32 or kernel not in (*TMA_LOOPS, *POLYNOMIAL)


@cache
def select(kernel: str, arch: str, dtype: torch.dtype, head_dim: int, masked: bool = False) -> LaunchConfig:
    """The configuration of a launch.

    Args:
        kernel: one of ``KERNELS``.
        arch: one of ``ARCHS``.
        head_dim: 16 to 256, or to what ``MOST_CHANNELS`` has.
        masked: the call has a key mask, or biases of keys.

    Raises:
        ValueError: nothing ships for these.
    """
    if kernel not in KERNELS or arch not in ARCHS or dtype not in DTYPES or not 16 <= head_dim <= 256:
        raise ValueError(
            f"launch: expected a kernel of {KERNELS}, an architecture of {ARCHS}, float32, float16 or bfloat16 and "
            f"a head dim from 16 to 256, received {kernel!r}, {arch!r}, {dtype}, {head_dim}"
        )
    if not ships(kernel, arch, dtype, head_dim):
        expected = (
            f"16 bits, for descriptors one of {TMA_ARCHS}, for the polynomial a head dim up to 128 (gfx1100: 64), for "
            f"all a head dim up to {MOST_CHANNELS.get(arch, 256)}, for {kernel!r}"
        )
        raise ValueError(f"launch: expected {expected}, received {arch!r}, {dtype}, {head_dim}")
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    config = _SELECTORS[kernel](arch, dtype == torch.float32, block_d)
    if kernel in LOOPS and head_dim < block_d == 128 and dtype != torch.float32 and not arch.startswith("gfx"):
        config = replace(config, block_m=max(config.block_m // 2, 32))  # masks of padded channels take registers
    if masked and kernel == "attention_modulated_tma" and block_d == 128:
        config = replace(config, pipelined=False)  # faster
    if masked and kernel == "attention_tma" and block_d == 256:
        config = replace(config, block_n=32, num_stages=3)  # a mask takes registers, too
    return config


# Query rows, keys, warps, stages of the fused loop, for head blocks of up to 64, of 128 and of 256 channels: tiles that
# compile without spills under triton 3.8 and 3.9, and under 3.6 on sm_90 (each allocates registers differently).
_PLAIN_16_BIT = {
    "sm_80": ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
    "sm_89": ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
    "sm_90": ((128, 128, 8, 2), (128, 64, 8, 3), (64, 32, 8, 2)),
    "sm_100": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "gfx942": ((128, 64, 4, 1), (128, 64, 4, 1), (128, 32, 4, 1)),
    "gfx1100": ((128, 32, 8, 1), (64, 16, 8, 1)),
}
_MODULATED_16_BIT = {
    "sm_80": ((128, 64, 8, 3), (64, 32, 8, 2), (32, 32, 8, 2)),
    "sm_89": ((128, 64, 8, 3), (128, 32, 8, 2), (32, 32, 8, 2)),
    "sm_90": ((128, 64, 8, 3), (128, 32, 8, 2), (32, 32, 8, 2)),
    "sm_100": ((128, 64, 8, 3), (128, 32, 8, 2), (32, 32, 8, 2)),
    "gfx942": ((128, 64, 4, 1), (128, 64, 4, 1), (64, 32, 4, 1)),
    "gfx1100": ((128, 32, 8, 1), (64, 16, 8, 1)),
}
# Float32 outputs, parts that are merged, hold the registers of a longer epilogue.
_PARTS_16_BIT = {
    **_MODULATED_16_BIT,
    "sm_80": ((64, 64, 8, 2), *_MODULATED_16_BIT["sm_80"][1:]),
    "sm_89": ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    "sm_100": ((128, 64, 8, 3), (64, 64, 8, 2), (32, 32, 8, 2)),
}
# float32 products run on CUDA cores and keep their operands in registers.
_FLOAT32 = {
    **dict.fromkeys(("sm_80", "sm_89", "sm_90", "sm_100"), ((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1))),
    "gfx942": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "gfx1100": ((16, 32, 16, 1), (16, 32, 16, 1)),
}


def _registers(arch: str) -> int:
    """The most registers that a thread can have, as a bound. With it ptxas takes what it needs; without, it may prefer
    more programs on a multiprocessor, and spill for that. On sm_90 bounds are what was timed."""
    return 255 if arch.startswith("sm_") and arch != "sm_90" else 0


def _fused(table: dict[str, tuple], arch: str, float32: bool, block_d: int) -> LaunchConfig:
    row = (_FLOAT32 if float32 else table)[arch]
    block_m, block_n, num_warps, num_stages = row[max(block_d, 64).bit_length() - 7]
    if float32 and block_d <= 32 and arch != "gfx1100":
        num_warps = 4
    elif arch in ("sm_80", "sm_89") and block_d <= 32:
        block_m, block_n, num_warps, num_stages = 64, 64, 4, 2
    spills = block_d <= 32 and (arch, float32) in (("sm_80", True), ("sm_100", False))  # without a bound
    registers = _registers(arch) if spills else 0
    return LaunchConfig(block_m, block_n, block_d, num_warps, num_stages, max_registers=registers)


# Query rows, keys, warps, stages and whether pipelined, for head blocks as above: the fastest of those tried on an H200
# (bench/NOTEBOOK.md, decision 14). One warp group holds a tile, and several programs share a multiprocessor.
_TMA = {
    "attention_tma": ((64, 128, 4, 3, False), (64, 64, 4, 3, False), (128, 64, 8, 2, False)),
    "attention_modulated_tma": ((64, 128, 4, 3, False), (64, 64, 4, 3, True), (64, 64, 8, 2, True)),
}


def _tma(loop: str, arch: str, float32: bool, block_d: int) -> LaunchConfig:
    block_m, block_n, num_warps, num_stages, pipelined = _TMA[loop][max(block_d, 64).bit_length() - 7]
    return LaunchConfig(block_m, block_n, block_d, num_warps, num_stages, tma=True, pipelined=pipelined)


def _axis_blocks(arch: str, float32: bool, block_d: int) -> LaunchConfig:
    """``block_n`` is the keys of a block weighed at once: all 64, but for float32, whose operands are in registers."""
    if not float32:
        if arch == "gfx1100":  # there tiles of 64 channels take more registers than of 128
            return LaunchConfig(16, 64, block_d, 16, 1) if block_d <= 32 else LaunchConfig(16, 32, 128, 8, 1)
        return LaunchConfig(16, 64, block_d, 8, 1)
    if block_d <= 16 and not arch.startswith("gfx"):
        # On sm_90 and sm_100 four warps spill under triton 3.6, eight under 3.8; on the others eight do under 3.9.
        return LaunchConfig(16, 32, block_d, 16 if arch in ("sm_90", "sm_100") else 4, 1)
    if arch in ("sm_80", "sm_89"):
        return LaunchConfig(16, 64 if block_d <= 64 else 32, block_d, 8, 1)
    return LaunchConfig(16, 16, block_d, 8, 1)


# Query rows, keys, warps, stages, for head blocks of up to 64 and of 128 channels; where tensor cores take their left
# operand from registers, the terms of 64 queries are more than they hold.
_POLYNOMIAL = {
    "sm_80": ((64, 32, 8, 2), (32, 32, 8, 2)),
    "sm_89": ((64, 32, 8, 2), (32, 32, 8, 2)),
    "sm_90": ((128, 64, 8, 2), (128, 32, 8, 2)),
    "sm_100": ((128, 64, 8, 2), (64, 64, 8, 2)),
    "gfx942": ((64, 32, 8, 1), (64, 32, 8, 1)),
    "gfx1100": ((64, 32, 8, 1),),
}


def _polynomial(kernel: str, arch: str, float32: bool, block_d: int) -> LaunchConfig:
    if kernel == "terms":
        return LaunchConfig(32, 1, block_d, 8, 1)
    if kernel == "order":
        return LaunchConfig(1, max(16, 2048 // block_d), block_d, 4, 1)
    block_m, block_n, num_warps, num_stages = _POLYNOMIAL[arch][block_d == 128]
    if kernel == "polynomial_tma":
        block_n = 64
    return LaunchConfig(block_m, block_n, block_d, num_warps, num_stages, tma=kernel == "polynomial_tma")


def _pack(arch: str, float32: bool, block_d: int) -> LaunchConfig:
    return LaunchConfig(1, max(8, 2048 // block_d), block_d, 4, 1)


def _queries(arch: str, float32: bool, block_d: int) -> LaunchConfig:
    """On sm_90 with 128 registers a thread, so that a multiprocessor holds 512 threads, which is faster; float32 needs
    168."""
    block_m, num_warps = {16: (16, 4), 128: (32, 4), 256: (32, 8)}.get(block_d, (64, 4))
    registers = _registers(arch)
    if arch == "sm_90":
        registers = 168 if float32 else 128
    return LaunchConfig(block_m, 1, block_d, num_warps, 1, max_registers=registers)


def _means(arch: str, float32: bool, block_d: int) -> LaunchConfig:
    warps, stages = (8, 1) if arch == "gfx1100" else (4, 6)
    return LaunchConfig(1, 128, min(block_d, 32), warps, stages, max_registers=_registers(arch))


def _run_sums(arch: str, float32: bool, block_d: int) -> LaunchConfig:
    if block_d == 256:
        return LaunchConfig(1, 32, block_d, 8, 1)
    return LaunchConfig(1, min(64, 2048 // block_d), block_d, 4, 1)


def _per_query_means(arch: str, float32: bool, block_d: int) -> LaunchConfig:
    """``block_n`` is columns, of a head and a group each."""
    return LaunchConfig(32, 32, block_d, 4, 1)


def _scatter(arch: str, float32: bool, block_d: int) -> LaunchConfig:
    """``block_n`` is elements."""
    return LaunchConfig(1, 2048, block_d, 4, 1)


def _reweight(arch: str, float32: bool, block_d: int) -> LaunchConfig:
    return LaunchConfig(1, max(8, 4096 // block_d), block_d, 4, 1)


_SELECTORS = {
    "attention": partial(_fused, _PLAIN_16_BIT), "attention_modulated": partial(_fused, _MODULATED_16_BIT),
    "attention_parts": partial(_fused, _PARTS_16_BIT),
    **{loop: partial(_tma, loop) for loop in TMA_LOOPS},
    **{kernel: partial(_polynomial, kernel) for kernel in POLYNOMIAL},
    "axis_blocks": _axis_blocks, "pack": _pack, "queries": _queries, "means": _means, "reweight": _reweight,
    "run_sums": _run_sums, "scatter": _scatter, "per_query_means": _per_query_means,
}  # fmt: skip
