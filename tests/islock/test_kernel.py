"""The fused kernel chooses what the reference chooses, token for token, from the same seeds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrope import ISLock
from fastrope import device as devices

pytest.importorskip("triton")
from fastrope import kernels
from fastrope.islock import reference
from fastrope.kernels import config, match

interpreted = pytest.mark.skipif(not devices.interpreted(), reason="runs interpreted kernels on CPU tensors")
INF = float("inf")


def assert_parity(lock: ISLock, logits, anchors, codebook, position=0, num_tokens=16, active=None, **options):
    seeds = torch.randint(2**63 - 1, (len(logits),))
    eager, fused = (
        lock.matcher(codebook, num_tokens=num_tokens, backend=name, **options)(
            logits, anchors, position, seeds=seeds, active=active
        )
        for name in ("eager", "triton")
    )
    assert torch.equal(fused.tokens, eager.tokens)
    assert torch.equal(fused.window, eager.window)
    assert torch.equal(fused.accepted, eager.accepted)
    torch.testing.assert_close(fused.distance, eager.distance, rtol=1e-5, atol=1e-6)  # sums in another order
    assert [x.dtype for x in fused] == [x.dtype for x in eager]
    return fused


@interpreted
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    vocab=st.one_of(st.integers(1, 300), st.sampled_from([4095, 4096, 4097, 9001])),
    share=st.floats(0.05, 1),
    dim=st.sampled_from([1, 3, 4, 8, 37, 128, 200]),
    candidates=st.sampled_from([1, 2, 17, 150, 2**31 - 1]),
    tau=st.sampled_from([0.0, 0.3, 1.0, 5.0, INF]),
    metric=st.sampled_from(["l2", "cosine"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced"]),
    kept=st.sampled_from([1.0, 0.3, 0.02]),
    position=st.integers(0, 15),
)
def test_parity(seed, batch, vocab, share, dim, candidates, tau, metric, dtype, layout, kept, position):
    g = torch.Generator().manual_seed(seed)
    image = max(1, int(share * vocab))
    ids = torch.randperm(vocab, generator=g)[:image]
    codebook = torch.randn(image, dim, generator=g).to(dtype) / dim**0.5
    logits = (3 * torch.randn(batch, vocab, generator=g)).to(dtype)
    draws = torch.rand(batch, vocab, generator=g)
    logits[draws > kept] = -INF
    logits[draws < kept / 50] = torch.nan
    if layout == "transposed":
        logits = logits.T.contiguous().T
    elif layout == "sliced":
        wide = torch.full((batch, 2 * vocab + 3), torch.nan, dtype=dtype)
        wide[:, 3::2] = logits
        logits = wide[:, 3::2]
    anchors = ids[torch.randint(image, (batch,), generator=g)]
    anchors[torch.rand(batch, generator=g) < 0.2] = -1
    active = torch.rand(batch, generator=g) < 0.8 if seed % 2 else None
    lock = ISLock(candidates=candidates, tau=tau, metric=metric)
    torch.manual_seed(seed)
    assert_parity(lock, logits, anchors, codebook, position, active=active, token_ids=ids)


@interpreted
@pytest.mark.parametrize("anchor", [5, -1, 200, 2**40])
@pytest.mark.parametrize("fill", [-INF, torch.nan, INF, torch.finfo(torch.float32).min])
def test_parity_of_extreme_logits(fill, anchor):
    """Rows full of one value, and with a single ordinary token among them."""
    logits = torch.full((2, 150), fill)
    logits[1, 77] = 1.0
    fused = assert_parity(ISLock(tau=INF), logits, torch.full((2,), anchor), torch.randn(150, 8))
    if not fill > 0:
        assert fused.tokens[1] == 77
        assert fused.tokens[0] == 0 or fill > -INF


@interpreted
def test_parity_at_a_tie_of_the_draw():
    """Two perturbed logits are equal: the lower id is drawn first. Seeds with such a pair are searched for."""
    vocab = 20_000
    for seed in range(200):
        seeds, zero = torch.tensor([seed]), torch.zeros(1, dtype=torch.int64)
        g = reference.noise(seeds, zero, vocab)[0].sort(descending=True, stable=True)
        ties = (g.values[1:2000] == g.values[:1999]).nonzero()
        if len(ties):
            break
    window = int(ties[0]) + 1  # ends between the two
    lower, upper = int(g.indices[window - 1]), int(g.indices[window])
    assert lower < upper
    codebook = torch.full((vocab, 1), 5.0)
    codebook[[lower, upper], 0] = torch.tensor([1.0, 0.5])
    anchors = torch.tensor([int(g.indices[-1])])
    codebook[anchors] = 0
    for name in ("eager", "triton"):
        for count, expected in ((window, lower), (window + 1, upper)):
            matcher = ISLock(candidates=count, tau=INF).matcher(codebook, num_tokens=2, backend=name)
            assert matcher(torch.zeros(1, vocab), anchors, 0, seeds=seeds).tokens.tolist() == [expected], name


@interpreted
def test_positions_beyond_the_image_take_its_first_and_last_window():
    for layout in (torch.tensor([-3, 16, 10**12]), torch.tensor(16)):
        fused = assert_parity(
            ISLock(candidates=40, tau=INF), torch.randn(3, 90), torch.tensor([1, 2, 3]), torch.randn(90, 4), layout
        )
        assert fused.window.tolist() == ([40, 17, 17] if layout.ndim else [17] * 3)


@interpreted
def test_equal_codebook_rows_go_to_the_lowest_id():
    codebook = torch.randn(5, 24).repeat(40, 1)
    for metric in ("l2", "cosine"):
        anchors = torch.tensor([7, 199, 100])
        fused = assert_parity(ISLock(candidates=30, tau=INF, metric=metric), torch.randn(3, 200), anchors, codebook)
        assert fused.accepted.all()
        whole = ISLock(candidates=200, alpha=0, tau=INF, metric=metric)
        logits = torch.randn(3, 200)
        assert torch.equal(assert_parity(whole, logits, anchors, codebook).tokens, anchors)  # itself before its equals
        logits.scatter_(1, anchors[:, None], -INF)
        assert assert_parity(whole, logits, anchors, codebook).tokens.tolist() == [2, 4, 0]


@interpreted
def test_not_a_number_in_the_codebook_is_never_near():
    codebook = torch.randn(64, 4)
    codebook[::2, 1] = torch.nan
    anchors = torch.tensor([1, 3, 2])  # the last has no distance to anything but itself
    fused = assert_parity(ISLock(candidates=40, tau=INF), torch.randn(3, 64), anchors, codebook)
    assert (fused.tokens[:2] % 2 == 1).all()


@interpreted
def test_buffers_start_as_garbage(monkeypatch):
    """The scratch memory holds large keys before the launch: none of them may be read."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else True if x.dtype == torch.bool else 2**31 - 1)

    monkeypatch.setattr(torch, "empty", poisoned)
    logits = torch.randn(2, 5000)
    logits[:, 200:] = -INF
    assert_parity(ISLock(), logits, torch.tensor([3, -1]), torch.randn(5000, 8))


@interpreted
@pytest.mark.parametrize("name", ["anchors", "position", "seeds", "active"])
@pytest.mark.parametrize("layout", ["column", "expanded"])
def test_a_value_per_row_may_have_any_stride(name, layout):
    """Hosts pass columns of ``(B, N)``: ``anchors[:, i]``. Compared with a contiguous call of the same kernel."""
    call = {
        "anchors": torch.randint(50, (4,)), "position": torch.randint(9, (4,)), "seeds": torch.randint(2**62, (4,)),
        "active": torch.tensor([True, False, True, True]),
    }  # fmt: skip
    x = call[name]
    strided = x[:1].expand(4) if layout == "expanded" else x[:, None].repeat(1, 3)[:, 1]
    call[name] = strided.clone(memory_format=torch.contiguous_format)
    matcher = ISLock(candidates=40, tau=INF).matcher(torch.randn(50, 4), num_tokens=9, backend="triton")
    logits = torch.randn(4, 50)
    expected, found = matcher(logits, **call), matcher(logits, **{**call, name: strided})
    assert not strided.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@interpreted
def test_offsets_beyond_32_bits():
    """Rows and tokens so far apart that index * stride leaves int32, in lazily allocated memory."""
    vocab, far = 6, 2**30
    try:
        buffer = torch.empty((vocab - 1) * far + 2 * vocab, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the system refuses to reserve the address space")
    near = torch.randn(2, vocab).half()
    for stride in ((vocab, far), (4 * far, 1)):
        logits = buffer.as_strided((2, vocab), stride)
        logits.copy_(near)
        assert_parity(ISLock(candidates=3), logits, torch.tensor([1, 2]), torch.randn(vocab, 4))


# ---- launch configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", config.ARCHS)
def test_configurations_are_pure_and_whole(arch):
    for dim in (*range(1, 300), 4096):
        found = kernels.select_match(arch, dim)
        assert found == kernels.select_match(arch, dim)
        for size in (found.block_v, found.block_k, found.block_d, found.num_warps):
            assert size & (size - 1) == 0
        assert found.block_v % 4 == 0  # Philox gives four words at a time
        assert found.block_d >= min(dim, 128)
        assert found.options["enable_fp_fusion"] is False
        assert ("maxnreg" in found.options) == arch.startswith("sm_")


@pytest.mark.parametrize(("arch", "dim"), [("sm_75", 8), ("sm_90", 0)])
def test_unknown_launches_are_refused(arch, dim):
    with pytest.raises(ValueError, match="expected an architecture"):
        kernels.select_match(arch, dim)


def test_no_length_is_compiled_in():
    """Counts are not specialized, nor is the alignment of slices: images, vocabularies and positions share a binary."""
    kernel = match.match_kernel
    names = list(kernel.fn.__code__.co_varnames[: kernel.fn.__code__.co_argcount])
    assert {n for n in names if n.islower()} - {"tau", "stride_lv"} == set(match.MATCH_COUNTS)
    plain = match.triton.JITFunction(
        kernel.fn, do_not_specialize=match.MATCH_COUNTS, do_not_specialize_on_alignment=match.MATCH_SLICES
    )
    assert {p.name for p in plain.params if p.do_not_specialize} == set(match.MATCH_COUNTS)
    assert {p.name for p in plain.params if p.do_not_specialize_on_alignment} == set(match.MATCH_SLICES)


def test_host_and_kernel_agree_on_constants():
    for name in ("LIMIT", "EPS", "SQRT_HALF_BITS"):
        assert getattr(match, name).value == getattr(reference, name)


@interpreted
def test_equal_maxima_fall_back_to_the_lowest_id():
    """Also where they lie in different blocks of the vocabulary."""
    logits = torch.full((1, 9001), -1.0)
    logits[0, [300, 4396, 8492]] = 2.0  # one lane of three blocks
    fused = assert_parity(ISLock(candidates=1, tau=0), logits, torch.tensor([9000]), torch.randn(9001, 2))
    assert fused.tokens.tolist() == [300]
