"""The bugs this field ships: poisoned surroundings, 32-bit offsets, the wrong device, a compilation per shape."""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastrope as fr
from fastrope import device as devices
from fastrope.backends import folded, fused, reference

pytest.importorskip("triton")
from fastrope import kernels
from fastrope.kernels import abi, attention, axis_blocks, config, means, pack, polynomial

README = " ".join((Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").split())
interpreted = pytest.mark.skipif(not devices.interpreted(), reason="runs interpreted kernels on CPU tensors")


def grid_rope(height: int, width: int, text: int, **options) -> fr.RoPE:
    layout = fr.TokenLayout(text=text, target=(height, width))
    return fr.RoPE.axial(layout.positions("flux"), (4, 6, 6), **options)


def everything(length: int, text: int, scale: torch.Tensor) -> list:
    image = slice(text, length)
    weight = torch.linspace(0.5, 1.5, 8)
    return [
        fr.QueryScale(scale, keys=image, axes=(1, 2)), fr.BandWeight(weight, keys=image),
        fr.BiasDelta(0.9, 1.2, keys=image), fr.LogitGain(2 - scale, keys=image),
    ]  # fmt: skip


def levels(length: int) -> torch.Tensor:
    scale = torch.ones(length)
    scale[3:9], scale[9:14] = 0.65, 0.825
    return scale


def planted(shape, generator, dtype=torch.float32) -> torch.Tensor:
    """A random tensor inside a larger buffer of NaN: before, behind, between rows, heads and channels."""
    b, s, h, d = shape
    buffer = torch.full((b + 2, s + 4, h + 2, d + 16), torch.nan, dtype=dtype)
    view = buffer[1:-1, 2:-2, 1:-1, 8:-8]
    view.copy_(torch.randn(shape, generator=generator, dtype=dtype))
    return view


@interpreted
@pytest.mark.parametrize("scale_of", [levels, lambda n: torch.linspace(0.4, 1, n)], ids=["buckets", "per query"])
def test_nan_around_every_buffer_stays_out(scale_of, monkeypatch):
    """Inputs are views into NaN; every buffer the launchers allocate starts as NaN."""
    generator = torch.Generator().manual_seed(0)
    rope = grid_rope(4, 5, 3)
    length = rope.tokens
    q, k, v = (planted((2, length, h, 16), generator) for h in (2, 1, 1))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, 2], mask[1, -3:] = False, False
    k[1, -3:], v[1, -3:] = torch.nan, torch.inf  # masked keys may hold anything
    plan = fr.plan(rope=rope, modulations=everything(length, 3, scale_of(length)), key_mask=mask)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    out, lse = fr.attention(q, k, v, plan=plan, return_lse=True, backend="triton")
    monkeypatch.undo()
    expected, expected_lse = reference.run(q, k, v, plan.resolved, 0.25, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=2e-6)


@interpreted
@pytest.mark.parametrize("modulated", [False, True])
def test_offsets_beyond_32_bits(modulated):
    """Tokens so far apart that token * stride leaves int32: a lazily allocated buffer of 2.5 * 2**31 elements."""
    length, dim, stride = 6, 16, 2**30
    try:
        buffer = torch.empty((length - 1) * stride + 2 * dim, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the system refuses to reserve the address space")
    far = buffer.as_strided((1, length, 2, dim), (0, stride, dim, 1))
    generator = torch.Generator().manual_seed(1)
    near = torch.randn(1, length, 2, dim, generator=generator).half()
    far.copy_(near)
    rope = fr.RoPE.axial(torch.arange(length)[:, None], (16,))
    keys = slice(2, 6)
    mods = [fr.QueryScale(torch.linspace(0.5, 1, length), keys=keys), fr.BiasDelta(1, 1.2, keys=keys)]
    for options in ({"rope": rope, "modulations": mods if modulated else []}, {}):
        out = fr.attention(far, far, far, backend="triton", **options)
        assert torch.equal(out, fr.attention(near, near, near, backend="triton", **options))


@interpreted
def test_fully_masked_rows_are_zero():
    q = torch.randn(2, 5, 2, 16)
    mask = torch.tensor([[True] * 5, [False] * 5])
    out, lse = fr.attention(q, q, q, key_mask=mask, return_lse=True, backend="triton")
    assert torch.equal(out[1], torch.zeros(5, 2, 16))
    assert bool((lse[1] == -torch.inf).all())
    assert bool(out[0].abs().sum() > 0)
    assert bool(lse[0].isfinite().all())


def test_launches_on_the_device_of_the_tensors(monkeypatch):
    """Triton launches on the current device; the backend makes that the one of q."""
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield
        entered.append("left")

    class Elsewhere:
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(fused, "pack", lambda *args: entered.append("packed") or (None, None))
    monkeypatch.setattr(fused, "attend", lambda *args, **how: entered.append("ran") or ("out", None))
    fused.run(Elsewhere(), None, None, None, 1.0, None)
    assert entered == [torch.device("cuda", 1), "packed", "ran", "left"]


# ---- compilations ----------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for a jitted kernel and keeps what triton compiles anew for: types, constants, and for the arguments it
    specializes whether an integer is 1, divides by 16 or leaves int32, and whether a pointer is aligned."""

    def __init__(self, kernel):
        self.names = kernel.arg_names
        self.plain = {self.names[p.num] for p in kernel.params if p.do_not_specialize}
        self.run_time = [self.names[p.num] for p in kernel.params if not p.is_constexpr]
        self.keys = set()

    def __getitem__(self, grid):
        def launch(*args, **named):
            given = {**dict(zip(self.names, args, strict=False)), **named}
            key = [tuple(sorted((k, str(v)) for k, v in given.items() if k not in self.run_time))]
            for name in self.run_time:
                value = given[name]
                if isinstance(value, torch.Tensor):
                    key.append((name, value.dtype, value.data_ptr() % 16 == 0))
                elif isinstance(value, int):
                    small = -(2**31) <= value < 2**31
                    key.append((name, small) if name in self.plain else (name, small, value == 1, value % 16 == 0))
            self.keys.add(tuple(key))

        return launch


@pytest.fixture
def recorders(monkeypatch):
    found = {}
    for module, name in ((attention, "attention_kernel"), (axis_blocks, "axis_block_kernel"), (pack, "pack_kernel"),
                         (pack, "queries_kernel"), (means, "means_kernel"), (polynomial, "terms_kernel"),
                         (polynomial, "polynomial_kernel")):  # fmt: skip
        kernel = getattr(module, name)
        original = getattr(kernel, "fn", kernel)
        jitted = kernel if hasattr(kernel, "params") else __import__("triton").JITFunction(
            original, do_not_specialize=getattr(module, COUNTS[name]))  # fmt: skip
        found[name] = Recorder(jitted)
        monkeypatch.setattr(module, name, found[name])
    return found


COUNTS = {
    "attention_kernel": "ATTENTION_COUNTS", "axis_block_kernel": "AXIS_BLOCK_COUNTS", "pack_kernel": "PACK_COUNTS",
    "queries_kernel": "QUERIES_COUNTS", "means_kernel": "MEANS_COUNTS", "terms_kernel": "TERMS_COUNTS",
    "polynomial_kernel": "POLYNOMIAL_COUNTS",
}  # fmt: skip


def launch_all(lengths, scale_of=None, batch=1, heads=2, scattered=False, dtype=torch.float32) -> None:
    for length in lengths:
        x = torch.randn(batch, length, heads, 16).to(dtype)
        rope = fr.RoPE.axial(torch.arange(length)[:, None], (16,))
        mods = []
        if scale_of is not None:
            keys = slice(None, None, 2) if scattered else slice(length // 2, length)
            mods = [
                fr.QueryScale(scale_of(length), keys=keys), fr.BandWeight(torch.linspace(0.5, 1.5, 8), keys=keys),
                fr.BiasDelta(1, 1.1, keys=keys), fr.LogitGain(torch.linspace(0.5, 1, length), keys=keys),
            ]  # fmt: skip
        lowered = fr.plan(rope=rope, modulations=mods).lowered
        fused.run(x, x, x, lowered, 0.25, fused.Launch.of(x, x, x, lowered))


@interpreted
def test_compilations_do_not_grow_with_lengths(recorders):
    """Nine lengths, odd and round, batch 1 to 3, any number of heads: one binary each of what a plain call launches."""
    launch_all((1, 16, 113, 128, 239, 256, 1000, 1023, 1024))
    launch_all((7, 64), batch=3, heads=5)
    counts = {name: len(r.keys) for name, r in recorders.items() if r.keys}
    assert counts == {"attention_kernel": 1, "pack_kernel": 2}  # keys are gathered, queries are not


@interpreted
def test_compilations_of_a_call_that_folds(recorders):
    """Before torch's attention: one binary for queries and one for keys, whichever heads are grouped; one of the means
    where there is a group."""

    def launch(length, batch=1, heads=2, modulations=()):
        q, x = torch.randn(batch, length, heads, 16), torch.randn(batch, length, 2, 16)
        rope = fr.RoPE.axial(torch.arange(length)[:, None], (16,))
        folded.run(q, x, x, fr.plan(rope=rope, modulations=modulations).lowered, 0.25)
        return {name: len(r.keys) for name, r in recorders.items() if r.keys}

    for length in (1, 16, 113, 128, 239, 256, 1000, 1023, 1024):
        counts = launch(length)
    counts = launch(7, batch=3, heads=4)
    assert counts == {"pack_kernel": 2}
    assert f"A first plain call compiles {sum(counts.values())} kernels, " in README
    for length in (24, 113, 600):
        tail = slice(length // 2, None)
        counts = launch(length, modulations=[fr.BandWeight(torch.full((8,), 0.5), tail), fr.BiasDelta(1, 1.1, tail)])
    assert counts == {"pack_kernel": 2, "means_kernel": 1}


@interpreted
@pytest.mark.parametrize(
    ("dtype", "more"), [(torch.float32, ["axis_block_kernel"]), (torch.float16, ["terms_kernel", "polynomial_kernel"])]
)
def test_compilations_of_a_modulated_call(recorders, dtype, more):
    """Scale buckets and per-query scales, many lengths: one binary of each kernel, one more of that which packs keys
    where it sorts values too."""
    scales = (lambda n: torch.where(torch.arange(n) % 3 == 0, 0.5, 1.0), lambda n: torch.linspace(0.9, 0.901, n))
    lengths = (70, 113, 128, 239, 256, 600)
    expected = dict.fromkeys(["attention_kernel", "pack_kernel", "queries_kernel", "means_kernel", *more], 1)
    for scale_of in scales:
        launch_all(lengths, scale_of, dtype=dtype)
    counts = {name: len(r.keys) for name, r in recorders.items() if r.keys}
    assert counts == {**expected, "pack_kernel": counts["pack_kernel"]}
    for scale_of in scales:
        launch_all(lengths[::2], scale_of, scattered=True, dtype=dtype)
    counts = {name: len(r.keys) for name, r in recorders.items() if r.keys}
    assert counts == {**expected, "pack_kernel": 2}
    if dtype == torch.float16:
        most = sum(counts.values())
        assert f", a modulated one {most} at most, whatever lengths, batches and numbers of heads follow" in README


@interpreted
def test_compilations_of_streams(recorders):
    """However tokens are shared out between two streams, with norms of either kind: one binary of each kernel, two of
    the one that joins keys, which it rotates, and values."""
    for text, image in ((1, 15), (8, 8), (77, 36), (16, 240), (255, 1)):
        for weight, eps in ((None, 1e-6), (torch.rand(16), 0)):
            norm = fr.Norm(weight, eps)
            streams = [fr.Stream(*torch.randn(3, 1, n, 2, 16), norm, norm) for n in (text, image)]
            mods = [fr.BiasDelta(1, 1.1, keys=slice(1, None))]
            rope = fr.RoPE.axial(torch.arange(text + image)[:, None], (16,))
            fr.joint_attention(streams, plan=fr.plan(rope=rope, modulations=mods), backend="triton")
    counts = {name: len(r.keys) for name, r in recorders.items() if r.keys}
    assert counts == {"attention_kernel": 1, "pack_kernel": 2, "queries_kernel": 1, "means_kernel": 1}


# ---- launch configuration --------------------------------------------------------------------------------------------


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


# ---- tables, plans and modes -----------------------------------------------------------------------------------------


@interpreted
def test_tables_of_any_strides():
    """Transposed and expanded masks, scales and angles: kernels read contiguous copies."""
    generator = torch.Generator().manual_seed(2)
    batch, length = 2, 16
    q = torch.randn(batch, length, 1, 16, generator=generator)
    rope = fr.RoPE.axial(torch.arange(length)[:, None], (16,))
    flipped = fr.RoPE(rope.angles.T.contiguous().T)
    scale = torch.rand(length, batch, generator=generator).T
    mask = (torch.rand(length, batch, generator=generator) > 0.4).T
    column = torch.tensor([[True], [False]]).expand(batch, length)
    for options in (
        {"key_mask": mask}, {"key_mask": column}, {"rope": rope, "modulations": [fr.QueryScale(scale)]},
        {"rope": flipped, "modulations": [fr.QueryScale(torch.linspace(0.3, 1, length))]},
    ):  # fmt: skip
        plan = fr.plan(**options)
        assert all(t.is_contiguous() for t in plan.tensors)
        out = fr.attention(q, q, q, plan=plan, backend="triton")
        torch.testing.assert_close(out, reference.run(q, q, q, plan.resolved, 0.25)[0], rtol=1e-5, atol=3e-6)


@interpreted
def test_per_query_scales_far_from_the_keys():
    """A query 100 000 tokens away turns as exactly as a near one."""
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 12, 1, 16, generator=generator)
    rope, key_rope = (fr.RoPE.axial(torch.arange(12)[:, None] + offset, (16,)) for offset in (100_000, 0))
    plan = fr.plan(rope=rope, key_rope=key_rope, modulations=[fr.QueryScale(torch.linspace(0.3, 1, 12))])
    assert plan.lowered.num_per_query
    out = fr.attention(q, k, k, plan=plan, backend="triton")
    torch.testing.assert_close(out, reference.run(q, k, k, plan.resolved, 0.25)[0], rtol=1e-5, atol=3e-6)


def test_the_cache_serves_threads():
    q = torch.randn(1, 8, 1, 16)
    rope = fr.RoPE.axial(torch.arange(8)[:, None], (16,))
    weights = [torch.full((8,), 1.0 + i) for i in range(12)]
    expected = [fr.attention(q, q, q, rope=rope, modulations=[fr.BandWeight(w)], backend="sdpa") for w in weights]

    def work(seed: int) -> bool:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist() * 4
        mods = ([fr.BandWeight(weights[i])] for i in order)
        outs = [fr.attention(q, q, q, rope=rope, modulations=m, backend="sdpa") for m in mods]
        return all(torch.allclose(o, expected[i]) for o, i in zip(outs, order, strict=True))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("later", ["planned", "with other numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plans_own_what_they_hold(dtype, later):
    """Editing a tensor after planning changes no backend's answer, whatever it would take to copy it."""
    q = torch.randn(2, 8, 1, 16)
    given = {
        "angles": torch.rand(8, 8, dtype=dtype), "axis": torch.arange(8) % 2, "mask": torch.rand(2, 8) > 0.3,
        "scale": torch.linspace(0.5, 1, 8, dtype=dtype), "weight": torch.linspace(0.5, 1.5, 8, dtype=dtype),
        "bias": torch.tensor([1.1, 0.9], dtype=dtype), "delta": torch.tensor([1.2, 0.7], dtype=dtype),
        "gain": torch.rand(2, 8, dtype=dtype), "index": torch.arange(2, 6), "keys": torch.arange(8) > 3,
    }  # fmt: skip
    given["mask"][:, 0] = True
    mods = [
        fr.QueryScale(given["scale"], keys=given["keys"], axes=(1,)), fr.BandWeight(given["weight"]),
        fr.BiasDelta(given["bias"], given["delta"], keys=given["index"]), fr.LogitGain(given["gain"]),
    ]  # fmt: skip
    rope = fr.RoPE(given["angles"], given["axis"])
    plan = fr.plan(rope=rope, modulations=mods, key_mask=given["mask"])
    if later != "planned":
        plan = plan.with_groups([(given["bias"], given["delta"])]).with_weight(given["weight"])
    backends = ("eager", "sdpa", "triton") if devices.interpreted() else ("eager", "sdpa")
    before = [fr.attention(q, q, q, plan=plan, backend=name) for name in backends]
    for x in given.values():
        x.zero_()
    for name, out in zip(backends, before, strict=True):
        assert torch.equal(fr.attention(q, q, q, plan=plan, backend=name), out), name
    assert not plan.resolved.rope.axis.eq(0).all()


def test_plans_outlive_inference_mode():
    q = torch.randn(1, 6, 1, 16)
    arguments = {"rope": fr.RoPE.axial(torch.arange(6)[:, None], (16,)),
                 "modulations": [fr.LogitGain(torch.linspace(0.5, 1.5, 6))]}  # fmt: skip
    with torch.inference_mode():
        fr.attention(q, q, q, **arguments)
    x = q.clone().requires_grad_()
    fr.attention(x, q, q, **arguments).sum().backward()
    assert x.grad.abs().sum() > 0


def test_autocast_leaves_dtypes_alone():
    q = torch.randn(1, 6, 1, 16)
    for name in ("eager", "sdpa"):
        expected = fr.attention(q, q, q, backend=name)
        with torch.autocast("cpu", torch.bfloat16):
            out, lse = fr.attention(q, q, q, backend=name, return_lse=True)
        assert out.dtype == lse.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@interpreted
def test_forward_mode_is_not_dropped():
    q = torch.randn(1, 6, 1, 16)
    with pytest.raises(NotImplementedError, match="forward only"):
        torch.func.jvp(lambda x: fr.attention(x, q, q, backend="triton"), (q,), (q,))


def test_a_default_device_does_not_reach_plans():
    keys = torch.arange(8) > 3
    with torch.device("meta"):
        plan = fr.plan(modulations=[fr.BiasDelta(1, 1.2, keys=keys)])
    assert plan.device.type == "cpu"


def test_host_and_kernels_agree_on_constants():
    from fastrope.kernels import common

    names = [name.upper() for name in abi.SEGMENT_COLUMNS]
    assert [getattr(common, name).value for name in names] == list(range(common.SEGMENT_FIELDS.value))
    assert axis_blocks.AXIS_BLOCK.value == abi.AXIS_BLOCK
    assert axis_blocks.CHUNK.value == abi.PAIR_CHUNK
