"""Launch configurations are pure, whole, and refuse what does not ship."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from fastrope import kernels
from fastrope.kernels import abi, config


@pytest.mark.parametrize("arch", config.ARCHS)
@pytest.mark.parametrize("kernel", config.KERNELS)
def test_configurations_are_pure_and_whole(kernel, arch):
    for dtype in config.DTYPES:
        for head_dim in range(16, 257, 2):
            if not kernels.ships(kernel, arch, dtype, head_dim):
                continue
            found = kernels.select(kernel, arch, dtype, head_dim)
            assert found == kernels.select(kernel, arch, dtype, head_dim)
            assert abi.QUERY_TILE % found.block_m == 0
            assert found.num_warps in (1, 2, 4, 8, 16)
            assert found.num_stages >= 1
            if kernel != "means":
                assert found.block_d >= head_dim
                assert found.block_d & (found.block_d - 1) == 0


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 6), "sm_89"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
     ((10, 3), "sm_100"), ((12, 0), "sm_89"), ((7, 5), "sm_75")],
)  # fmt: skip
def test_architectures(capability, arch):
    assert config.arch_of(*capability) == arch
    assert (config.unsupported(arch) is None) == (arch in config.ARCHS)


def test_unknown_launches_are_refused():
    for bad in (("attention", "sm_75", torch.float16, 64), ("attention", "sm_90", torch.float64, 64),
                ("attention", "sm_90", torch.float16, 512), ("conv", "sm_90", torch.float16, 64)):  # fmt: skip
        with pytest.raises(ValueError, match="expected a kernel"):
            kernels.select(*bad)
