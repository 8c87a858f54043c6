"""The generator: known answers, range, accuracy, and the same bits in the kernel."""

from __future__ import annotations

import pytest
import torch

from fastrope import device as devices
from fastrope.islock import reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastrope.kernels import match  # noqa: E402

# Counter, key and words of the published test vectors of Philox 4x32-10 (Random123, kat_vectors).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    seed = key[0] | key[1] << 32
    seed -= 2**64 if seed >= 2**63 else 0
    found = reference.philox(*(torch.tensor([c]) for c in counter), torch.tensor([seed]))
    assert tuple(int(x) for x in found) == words


def test_draws_never_reach_0_or_1():
    words = torch.cat([torch.tensor([0, 1, 2**31, 2**32 - 2**7, 2**32 - 1]), torch.randint(2**32, (100_000,))])
    u = reference.uniform(words)
    assert u.dtype == torch.float32
    assert u.min() > 0
    assert u.max() < 1
    exact = (words.double() + 0.5) / 2**32
    assert ((u.double() - exact).abs() <= 2**-24).all()
    assert ((u.double() / exact - 1).abs() < 2**-22).all()  # small draws keep their digits


def test_gumbel_noise_is_exact_to_float32():
    words = torch.cat([torch.tensor([0, 1, 2, 2**31]), torch.randint(2**32, (100_000,))])
    u = (words.double() + 0.5) / 2**32
    exact = -torch.log(-torch.log1p(-u))
    # Rounding u to float32 moves ln(1 - u) by at most half an ulp of 1 over 1 - u: it is felt in the rear of a draw.
    bound = 1e-6 * exact.abs().clamp(min=1) + 2**-24 / ((1 - u) * -torch.log1p(-u))
    kept = u < 1 - 2**-22
    error = (reference.gumbel(words).double() - exact).abs()[kept]
    print(f"largest error {error.max():.2e}, {error[(u < 0.5)[kept]].max():.2e} in the better half")
    assert (error <= bound[kept]).all()


def test_noise_has_the_moments_of_a_gumbel_variable():
    g = reference.noise(torch.arange(32), torch.zeros(32, dtype=torch.int64), 8192).double()
    assert abs(g.mean() - 0.5772156649) < 5 * 1.2825 / g.numel() ** 0.5
    assert abs(g.var() - torch.pi**2 / 6) < 0.03
    assert g.unique().numel() > 0.98 * g.numel()


def test_noise_belongs_to_seed_position_and_token():
    seeds, positions = torch.tensor([5, 5, 6, 5 + 2**32]), torch.tensor([0, 1, 0, 0])
    g = reference.noise(seeds, positions, 1001)
    assert len({tuple(row) for row in g.tolist()}) == 4
    assert torch.equal(reference.noise(seeds[2:3], positions[2:3], 1001), g[2:3])  # a row is itself in any batch
    assert torch.equal(reference.noise(seeds, positions, 333), g[:, :333])  # a longer vocabulary changes nothing


@triton.jit
def noise_kernel(SEED, POSITION, OUT, start, BLOCK_V: tl.constexpr):
    g = match.noise(tl.load(SEED), tl.load(POSITION), start, BLOCK_V)
    tl.store(OUT + tl.arange(0, BLOCK_V), g)


@pytest.mark.skipif(not devices.interpreted(), reason="runs interpreted kernels on CPU tensors")
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 17, 2**63 - 1])
@pytest.mark.parametrize("position", [0, 1023])
def test_the_kernel_draws_the_same_bits(seed, position):
    out = torch.empty(2048)
    args = torch.tensor([seed]), torch.tensor([position])
    noise_kernel[(1,)](*args, out, 2048, BLOCK_V=2048)
    assert torch.equal(out, reference.noise(*args, 4096)[0, 2048:])
