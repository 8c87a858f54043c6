"""What matching means, on the reference: distribution, window, anchors, fallback, and rows that cannot match."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastrope import ISLock

INF = float("inf")


def seeds_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2**63 - 1, (rows,), generator=torch.Generator().manual_seed(seed))


def unit(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def p_value(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Chi-square goodness of fit."""
    expected = p.double() * counts.sum()
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(p) - 1) / 2.0).double(), statistic / 2))


# ---- distribution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 900])
def test_a_window_of_one_is_plain_sampling(position):
    rows = 40_000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.0, -0.5, 1.0, 0.2, -1.5])
    matcher = ISLock(candidates=1, tau=INF).matcher(unit(12, 4), num_tokens=1024)
    out = matcher(logits.expand(rows, -1), torch.zeros(rows, dtype=torch.int64), position, seeds=seeds_of(rows))
    found = p_value(out.tokens.bincount(minlength=12), logits.softmax(0))
    print(f"p = {found:.3f}")
    assert found > 1e-3
    assert (out.window == 1).all()
    assert out.accepted.all()


def test_a_window_of_two_draws_without_replacement():
    """The nearest of two draws, enumerated: pairs have probability p_i p_j / (1 - p_i)."""
    rows = 40_000
    p = torch.tensor([0.4, 0.1, 0.2, 0.25, 0.05])
    codebook = torch.tensor([[4.0], [0.0], [3.0], [1.0], [2.0]])
    nearness = [4, 0, 3, 1, 2]  # the anchor is token 1
    expected = torch.zeros(5)
    for i, j in itertools.permutations(range(5), 2):
        expected[min((i, j), key=nearness.__getitem__)] += p[i] * p[j] / (1 - p[i])
    matcher = ISLock(candidates=2, alpha=0, tau=INF).matcher(codebook, num_tokens=4)
    anchors = torch.ones(rows, dtype=torch.int64)
    tokens = matcher(p.log().expand(rows, -1), anchors, 2, seeds=seeds_of(rows)).tokens
    counts = tokens.bincount(minlength=5)
    assert counts[0] == 0  # the furthest is never the nearer of two
    found = p_value(counts[1:], expected[1:])
    print(f"p = {found:.3f}")
    assert found > 1e-3


# ---- anchors, window, threshold --------------------------------------------------------------------------------------


def test_a_wide_window_and_no_threshold_return_the_anchor():
    """Wherever it has probability, and also where a lower id has the same codebook row."""
    codebook = unit(40, 4)
    codebook[3] = codebook[30]
    logits = torch.randn(64, 40)
    anchors = torch.randint(40, (64,))
    anchors[:4] = 30
    logits[8:16].scatter_(1, anchors[8:16, None], -INF)
    for metric in ("l2", "cosine"):
        matcher = ISLock(candidates=1000, alpha=0, tau=INF, metric=metric).matcher(codebook, num_tokens=9)
        out = matcher(logits, anchors, 8, seeds=seeds_of(64))
        possible = torch.ones(64, dtype=torch.bool)
        possible[8:16] = False
        assert torch.equal(out.tokens == anchors, possible)
        assert (out.distance[possible] == 0).all()
        assert out.accepted.all()
        assert out.window.tolist() == [40] * 8 + [39] * 8 + [40] * 48


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_no_tolerance_takes_the_likeliest_unless_the_anchor_is_drawn(metric):
    logits = torch.randn(200, 30)
    anchors = torch.randint(30, (200,))
    matcher = ISLock(candidates=6, tau=0, metric=metric).matcher(unit(30, 5), num_tokens=4)
    out = matcher(logits, anchors, 0, seeds=seeds_of(200))
    assert 10 < out.accepted.sum() < 190
    assert torch.equal(out.tokens, torch.where(out.accepted, anchors, logits.argmax(1)))
    assert torch.equal(out.accepted, out.distance == 0)


def test_squared_distance_one_is_cosine_one_half():
    """On unit-norm entries s = 2 - 2 cos, so tau 1.0 of one metric is 0.5 of the other."""
    codebook, logits, anchors = unit(500, 8), torch.randn(300, 500), torch.randint(500, (300,))
    found = [
        ISLock(candidates=3, alpha=0, tau=tau, metric=metric)
        .matcher(codebook, num_tokens=4)(logits, anchors, 0, seeds=seeds_of(300))
        for metric, tau in (("l2", 1.0), ("cosine", 0.5))
    ]  # fmt: skip
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].accepted, found[1].accepted)
    assert 30 < found[0].accepted.sum() < 270
    torch.testing.assert_close(found[0].distance, 2 * found[1].distance, rtol=1e-4, atol=1e-6)


def test_larger_tau_stays_closer():
    codebook, logits, anchors = torch.randn(100, 6), torch.randn(300, 100), torch.randint(100, (300,))
    kept = []
    for tau in (0.0, 1.0, 3.0, 6.0, INF):
        out = ISLock(candidates=10, tau=tau).matcher(codebook, num_tokens=4)(logits, anchors, 0, seeds=seeds_of(300))
        kept.append(int(out.accepted.sum()))
        assert torch.equal(out.accepted, out.distance <= tau)
        assert torch.equal(out.tokens[~out.accepted], logits.argmax(1)[~out.accepted])
    assert kept == sorted(kept)
    assert kept[0] < kept[-1] == 300


def test_ties_go_to_the_lowest_id():
    """Equal codebook rows and equal logits, whatever the order of the draw."""
    codebook = torch.tensor([[5.0], [1.0], [1.0], [1.0], [0.0]])
    logits = torch.zeros(50, 5)
    logits[:, 4] = -INF  # the anchor cannot be drawn
    anchors = torch.full((50,), 4)
    near = ISLock(candidates=9, tau=INF).matcher(codebook, num_tokens=1)(logits, anchors, 0, seeds=seeds_of(50))
    assert (near.tokens == 1).all()
    back = ISLock(candidates=9, tau=0.5).matcher(codebook, num_tokens=1)(logits, anchors, 0, seeds=seeds_of(50))
    assert (back.tokens == 0).all()
    assert (back.distance == 1).all()  # what was too far is still reported


def test_tokens_without_a_codebook_row_compete_but_never_match():
    """Image tokens 10 to 29 of 64: the others are drawn, fill the window and can be the fallback."""
    ids = torch.arange(10, 30).flip(0)
    logits = torch.randn(400, 64)
    matcher = ISLock(candidates=4, alpha=0, tau=INF).matcher(unit(20, 4), num_tokens=4, token_ids=ids)
    out = matcher(logits, torch.full((400,), 17), 1, seeds=seeds_of(400))
    image = (out.tokens >= 10) & (out.tokens < 30)
    assert image[out.accepted].all()
    assert 0 < out.accepted.sum() < 400
    assert torch.equal(out.tokens[~out.accepted], logits.argmax(1)[~out.accepted])
    assert (out.distance[~out.accepted] == INF).all()
    assert (out.window == 4).all()
    near = matcher(torch.where(torch.arange(64) == 29, 9.0, -INF).expand(2, -1), torch.tensor([29, 28]), 0)
    expected = (matcher.codebook[0] - matcher.codebook[1]).square().sum()  # id 29 is row 0, id 28 row 1
    assert near.distance.tolist() == [0.0, pytest.approx(float(expected))]


# ---- rows that cannot match ------------------------------------------------------------------------------------------


def test_free_rows_take_the_first_of_the_draw(sampler):
    """Inactive rows and anchors outside the image vocabulary: plain sampling over the whole vocabulary."""
    logits, seeds = torch.randn(60, 50), seeds_of(60)
    matcher = ISLock(candidates=20, tau=INF).matcher(unit(30, 4), num_tokens=4)
    outside = torch.tensor([-1, 30, 49, 10**12]).repeat(15)
    inside = torch.randint(30, (60,))
    for out in (
        matcher(logits, outside, 1, seeds=seeds),
        matcher(logits, inside, 1, seeds=seeds, active=torch.zeros(60, dtype=torch.bool)),
    ):
        assert torch.equal(out.tokens, sampler(logits, seeds, position=1))
        assert not out.accepted.any()
        assert (out.window == 0).all()
        assert (out.distance == INF).all()
    assert not torch.equal(matcher(logits, inside, 1, seeds=seeds).tokens, out.tokens)


def test_impossible_tokens_are_never_drawn():
    """-inf, NaN, and the smallest float that some hosts mask with."""
    logits = torch.randn(200, 40)
    logits[:, :12], logits[:, 12:24] = -INF, torch.nan
    logits[:, 24:36] = torch.finfo(torch.float32).min
    matcher = ISLock(candidates=30, tau=INF).matcher(unit(40, 4), num_tokens=4)
    out = matcher(logits, torch.arange(200) % 40, 0, seeds=seeds_of(200))
    assert (out.window == 4).all()
    assert (out.tokens >= 36).all()
    assert out.accepted.all()


def test_a_row_without_any_token_gives_token_0():
    logits = torch.full((3, 9), -INF)
    logits[1] = torch.nan
    for anchors in (torch.tensor([1, 2, 3]), torch.tensor([-1, -1, -1])):
        out = ISLock().matcher(unit(9, 4), num_tokens=4)(logits, anchors, 0)
        assert out.tokens.tolist() == [0, 0, 0]
        assert out.window.tolist() == [0, 0, 0]
        assert not out.accepted.any()


def test_infinite_logits_are_certain():
    logits = torch.randn(20, 9)
    logits[:, 6] = INF
    out = ISLock(tau=0).matcher(unit(9, 4), num_tokens=4)(logits, torch.full((20,), 2), 0)
    assert (out.tokens == 6).all()
    assert (out.window == 1).all()


# ---- rows, positions, seeds ------------------------------------------------------------------------------------------


def test_a_batch_equals_its_rows():
    logits, anchors, seeds = torch.randn(6, 80), torch.randint(80, (6,)), seeds_of(6)
    matcher = ISLock(candidates=12, tau=1.5).matcher(torch.randn(80, 3), num_tokens=16)
    positions = torch.tensor([0, 3, 15, 7, 7, 1], dtype=torch.int32)
    batch = matcher(logits, anchors, positions, seeds=seeds)
    for b in range(6):
        row = matcher(logits[b : b + 1], anchors[b : b + 1], int(positions[b]), seeds=seeds[b : b + 1])
        assert [x.tolist() for x in row] == [x[b : b + 1].tolist() for x in batch]
    assert batch.window.tolist() == [matcher.lock.window(int(i), 16) for i in positions]
    beyond = matcher(logits, anchors, torch.tensor(99), seeds=seeds)
    assert (beyond.window == matcher.lock.window(15, 16)).all()


def test_generators_reproduce():
    logits, anchors = torch.randn(4, 80), torch.randint(80, (4,))
    matcher = ISLock(candidates=5, tau=INF).matcher(torch.randn(80, 3), num_tokens=16)

    def run(generator):
        return torch.stack([matcher(logits, anchors, i, generator).tokens for i in range(8)])

    first = run(torch.Generator().manual_seed(3))
    assert torch.equal(first, run(torch.Generator().manual_seed(3)))
    assert not torch.equal(first, run(torch.Generator().manual_seed(4)))
    rows = run([torch.Generator().manual_seed(s) for s in range(4)])
    assert torch.equal(rows, run([torch.Generator().manual_seed(s) for s in range(4)]))
    alone = torch.Generator().manual_seed(2)
    one = [matcher(logits[2:3], anchors[2:3], i, [alone]).tokens for i in range(8)]
    assert torch.equal(torch.stack(one)[:, 0], rows[:, 2])
    torch.manual_seed(5)
    default = run(None)
    torch.manual_seed(5)
    assert torch.equal(default, run(None))
