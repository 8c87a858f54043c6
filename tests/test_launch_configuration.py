"""Launch configurations are pure, whole, and refuse what does not ship."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from fastrope import device, kernels
from fastrope.kernels import abi, config, launch, means


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
     ((10, 3), "sm_100"), ((12, 0), "sm_80"), ((7, 5), "sm_75")],
)  # fmt: skip
def test_architectures(capability, arch):
    assert config.arch_of(*capability) == arch
    assert (config.unsupported(arch) is None) == (arch in config.ARCHS)


@pytest.mark.parametrize(
    ("name", "arch"),
    [("gfx90a", "gfx942"), ("gfx942", "gfx942"), ("gfx950", "gfx942"), ("gfx1030", "gfx1030"), ("gfx1100", "gfx1100"),
     ("gfx1151", "gfx1100"), ("gfx1201", "gfx1100"), ("gfx1250", "gfx1250")],
)  # fmt: skip
def test_architectures_of_amd(name, arch, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(device, "interpreted", lambda: False)
    monkeypatch.setattr(device, "capability", lambda where: name)
    assert device.architecture.__wrapped__(torch.device("cuda")) == arch
    assert (config.unsupported(arch) is None) == (arch in config.ARCHS)


def test_heads_that_no_tile_holds_are_named():
    most = [config.MOST_CHANNELS.get(arch, 256) for arch in config.ARCHS]
    for arch, dim in zip(config.ARCHS, most, strict=True):
        assert config.unsupported(arch, dim) is None
        assert f"more than {dim} channels on {arch}" in config.unsupported(arch, dim + 1)
        assert kernels.ships("attention", arch, torch.bfloat16, dim)
    assert min(most) == 128
    with pytest.raises(ValueError, match="a head dim up to 128, for 'attention', received 'gfx1100'"):
        kernels.select("attention", "gfx1100", torch.bfloat16, 130)


def test_unknown_launches_are_refused():
    for bad in (("attention", "sm_75", torch.float16, 64), ("attention", "sm_90", torch.float64, 64),
                ("attention", "sm_90", torch.float16, 512), ("conv", "sm_90", torch.float16, 64)):  # fmt: skip
        with pytest.raises(ValueError, match="expected a kernel"):
            kernels.select(*bad)


class Kernel:
    """Stands in for a jitted kernel of two tensors and a count; keeps what it is launched with."""

    arg_names = ("X", "Y", "count")

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda **arguments: self.launched.append((grid, arguments))


@pytest.fixture
def described(monkeypatch):
    """A description of launches of :class:`Kernel`, which notes for which layouts and facts it is asked."""
    monkeypatch.setattr(launch, "_PREPARED", {})
    kernel, asked = Kernel(), []

    def describe(at, *facts):
        asked.append((at, facts))
        return launch.Launch(kernel, (at["X"].shape[0],), {"count": facts[0], "num_warps": 4}, {"Y": "X"})

    return kernel, asked, describe


def test_a_launch_is_described_once_for_what_it_depends_on(described):
    kernel, asked, describe = described
    x = torch.zeros(4, 8)
    for other in (x, torch.ones(4, 8)):
        launch.launch(describe, {"X": other, "Y": None}, 3)
    assert len(asked) == 1
    assert asked[0][0]["X"] == launch.Layout(torch.float32, (4, 8), (8, 1), 0)
    assert asked[0][0]["Y"] is None
    assert [arguments["X"] is arguments["Y"] for _, arguments in kernel.launched] == [True, True]
    assert kernel.launched[1][1]["X"].sum() == 32
    different = [
        {"X": x, "Y": x}, {"X": x.half(), "Y": None}, {"X": x[:2], "Y": None}, {"X": torch.zeros(8, 4).T, "Y": None},
        {"X": torch.zeros(33)[1:].view(4, 8), "Y": None},
    ]  # fmt: skip
    for n, tensors in enumerate(different, start=2):
        launch.launch(describe, tensors, 3)
        launch.launch(describe, tensors, 3)
        assert len(asked) == n
    launch.launch(describe, {"X": x, "Y": None}, 4)
    assert [kernel.launched[-1][0], kernel.launched[-1][1]["count"]] == [(4, 1, 1), 4]


def test_a_launch_names_the_leading_parameters_in_their_order(described):
    _, _, describe = described
    with pytest.raises(TypeError, match="expected tensors"):
        launch.launch(describe, {"Y": None, "X": torch.zeros(4)}, 3)


def test_launches_that_come_and_go_do_not_pile_up(described, monkeypatch):
    monkeypatch.setattr(launch, "MOST_PREPARED", 8)
    for n in range(1, 30):
        launch.launch(described[2], {"X": torch.zeros(n), "Y": None}, 3)
        assert len(launch._PREPARED) <= 8


def test_groups_beyond_what_a_grid_has_in_its_second_axis():
    """A device takes 65535 there."""
    layouts = {"OUT": (1, 1, 8000, 9, 64), **dict.fromkeys(("X", "X2"), (1, 8000, 1, 64)), "GROUPS": (1, 8000, 3)}
    at = {name: launch.Layout(torch.float32, shape, (1,) * len(shape), 0) for name, shape in layouts.items()}
    select = kernels.select("means", "sm_90", torch.bfloat16, 64)
    assert means._means({**at, "KEY_BIAS": None}, False, 0, select).grid == (2 * 8000 * 9,)
