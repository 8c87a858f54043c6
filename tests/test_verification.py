"""Kernels are verified before they are trusted: what is checked, when, and what is done with the answer.

Tensors of the CPU count as on a GPU that has no rows in the repository; kernels are interpreted.
"""

from __future__ import annotations

import json
import threading
import warnings

import pytest
import torch
from source_tree import ROOT

import fastrope as fr
from fastrope import card, dispatch, joint, kernels, rules, sample, verification
from fastrope import device as devices
from fastrope.modulations import MODULATIONS
from fastrope.planning import build

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("not devices.interpreted()", reason="pretends that the CPU is a GPU")

CPU = torch.device("cpu")
ROPE = fr.RoPE.axial(torch.arange(24)[:, None], (16,))
LATE = slice(12, None)
LEVELS = fr.QueryScale(torch.where(torch.arange(24) < 6, 0.5, 1.0), keys=LATE)
BANDS = [fr.BandWeight(torch.full((8,), 1.1 + n / 10), keys=slice(4 * n, 4 * n + 4)) for n in range(5)]
GROUP = fr.BiasDelta(1.0, 1.1, keys=LATE)
GAIN = fr.LogitGain(torch.where(torch.arange(24) < 6, 1.2, 1.0), keys=LATE)
MASK = torch.arange(24).expand(2, -1) < torch.tensor([[24], [20]])


@pytest.fixture
def a_card(monkeypatch, tmp_path):
    """A GPU without rows, and a cache folder; forgets what the process knows, and does so again when called."""

    def forget():
        for name in ("_PASSED", "_FAILED", "_RECORDED"):
            monkeypatch.setattr(verification, name, set())
        monkeypatch.setattr(card, "_WARNED", set())
        for cached in (card.key, rules.local, verification.needed):
            cached.cache_clear()
        build._CACHE.clear()  # plans remember decisions

    monkeypatch.setattr(devices, "on_gpu", lambda x: True)
    monkeypatch.setattr(devices, "capability", lambda device: "sm_89")
    monkeypatch.setattr(card, "name_of", lambda device: "NVIDIA GeForce RTX 4090 (sm_89)")
    monkeypatch.setattr(card, "folder", lambda: tmp_path / "fastrope")
    forget()
    yield forget
    forget()


@pytest.fixture
def checks(monkeypatch):
    """Checks that were made; ``checks.said`` is what they find, or raise."""

    class Checks(list):
        said: str | Exception | None = None

        def __call__(self, kind, device):
            self.append(kind)
            if isinstance(self.said, Exception):
                raise self.said
            return self.said

    found = Checks()
    monkeypatch.setattr(dispatch, "_wrong", found)
    return found


def tensors(batch=1, key_heads=2, dim=16):
    q, k, v = torch.randn(3, batch, 24, 2, dim).half()
    return q, k[:, :, :key_heads], v[:, :, :key_heads]


def attend(**options):
    """A small call that folds, and its result."""
    qkv = tensors()
    return fr.attention(*qkv, rope=ROPE, modulations=[GROUP], **options), qkv


def with_lse(query, key, value, scale, return_lse=False, **_):
    """A plain attention."""
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
    s = q @ k.mT * scale
    out = (s.softmax(-1) @ v).transpose(1, 2).to(query.dtype)
    return (out, s.logsumexp(-1)) if return_lse else out


with_lse.returns_lse = True


def reference(qkv):
    return fr.attention(*qkv, rope=ROPE, modulations=[GROUP], backend="eager")


@pytest.mark.parametrize("said", [None, "wrong"])
def test_runs_of_keys_are_merged_whatever_a_check_says(said, a_card, checks):
    """Behind our prologue, or behind torch's operations."""
    checks.said, qkv = said, tensors()
    call = {"rope": ROPE, "modulations": [fr.LogitBias(0.4, LATE), GROUP]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = fr.attention(*qkv, **call, plain=with_lse)
    torch.testing.assert_close(out, fr.attention(*qkv, **call, backend="eager"), atol=2e-3, rtol=2e-3)
    assert len(checks) == 1
    again = fr.explain(*qkv, **call, plain=with_lse).decision
    assert (again.folded, again.merges, again.passes) == (said is None, True, 2)


# ---- what is checked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"rope": ROPE}, "sdpa: rotation, interleaved, float16, head dim 16"),
        ({"rope": ROPE, "modulations": [BANDS[0], GROUP], "key_mask": MASK}, "sdpa: rotation, mask, BandWeight"),
        ({"rope": ROPE.as_applied(), "modulations": [GAIN]}, "split: applied, LogitGain, interleaved"),
        ({"rope": ROPE, "modulations": [LEVELS, BANDS[4], GROUP, GAIN]}, "split: rotation, QueryScale, BandWeight"),
        ({"rope": ROPE, "modulations": [LEVELS, *BANDS], "return_lse": True},
         "loop: rotation, QueryScale, BandWeight, passes, interleaved"),
        ({"return_lse": True, "grouped": True}, "loop: grouped, interleaved, float16, head dim 16"),
        ({"rope": ROPE, "modulations": [fr.LogitBias(0.4, LATE), GROUP], "plain": with_lse},
         "sdpa: rotation, BiasDelta, interleaved"),
    ],
)  # fmt: skip
def test_a_kind_is_checked_on_a_small_call_of_that_kind(call, expected, a_card):
    """And the kernels, which are right, pass."""
    call = dict(call)
    batch, key_heads = (2 if "key_mask" in call else 1), (1 if call.pop("grouped", False) else 2)
    kind = fr.explain(*tensors(batch, key_heads), **call).decision.kind
    assert str(kind).startswith(expected)
    drawn = sample.draw(kind, CPU)
    again = dispatch.by_route(kind.route, drawn.plan.lowered, *drawn[:3])
    assert dispatch._kind(again, drawn.plan.lowered, *drawn[:2]) == kind
    assert dispatch._wrong(kind, CPU) is None


def test_a_polynomial_and_streams_have_samples_too(a_card):
    first = sample.Kind("split", ("rotation", "QueryScale"), "polynomial", False, False, True, False,
                        "interleaved", torch.float16, 32)  # fmt: skip
    for kind in (first, first._replace(per_query="axis blocks", pairing="half")):
        drawn = sample.draw(kind, CPU)
        again = dispatch.by_route(kind.route, drawn.plan.lowered, *drawn[:3])
        assert dispatch._kind(again, drawn.plan.lowered, *drawn[:2]) == kind
        assert dispatch._wrong(kind, CPU) is None


def test_float32_is_judged_by_its_largest_error(a_card, monkeypatch):
    """Of right kernels the mean is 1.2 to 1.5 times the reference's on a GPU, where 1.1 is allowed."""
    kind = sample.Kind("sdpa", ("rotation",), "", False, False, False, False, "interleaved", torch.float32, 16)
    drawn = sample.draw(kind, CPU)
    exact = fr.attention(*(x.double() for x in drawn[:3]), plan=drawn.plan, backend="eager")
    low = fr.attention(*drawn[:3], plan=drawn.plan, backend="eager")
    assert sample.disagreement(drawn, (exact + 1.5 * (low - exact)).float(), None) is None
    assert "max" in str(sample.disagreement(drawn, (exact + 9 * (low - exact)).float(), None))
    assert sample.disagreement(drawn, torch.full_like(low, torch.nan), None)


def test_a_check_is_the_same_whatever_is_switched_on_around_it(a_card):
    """Inference mode, another default device, autocast, random numbers that the user counts on."""
    qkv, before = tensors(), torch.get_rng_state()
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        fr.attention(*qkv, plan=fr.plan(rope=ROPE))
    assert len(verification._PASSED) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_every_modulation_is_a_feature_with_a_sample():
    """One that is new has to say here how it is checked."""
    kind = sample.Kind("loop", (), "", False, False, False, False, "interleaved", torch.float16, 16)
    for name in [*(modulation.__name__ for modulation in MODULATIONS), "BiasDelta on values"]:
        plan = sample._plan(kind._replace(features=("rotation", name)), 1, CPU)
        assert plan.lowered.features == ("rotation", name)


# ---- what is done with the answer ------------------------------------------------------------------------------------


def test_a_wrong_kernel_is_not_used(a_card, monkeypatch):
    """The result is right, one warning says what to do, and a user who names the kernels has them."""
    from fastrope import kernels

    pack = kernels.pack_rows
    monkeypatch.setattr(kernels, "pack_rows", lambda *call: pack(*call) * 1.05)
    with pytest.warns(UserWarning, match=r"FASTROPE_VERIFY=0 runs .* `fastrope doctor --gpu`"):
        out, qkv = attend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fr.attention(*qkv, rope=ROPE, modulations=[GROUP])
        on_sdpa = fr.attention(*qkv, rope=ROPE, modulations=[GROUP], backend="sdpa")
    expected = reference(qkv)
    for found in (out, again, on_sdpa):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    said = fr.explain(*qkv, rope=ROPE, modulations=[GROUP])
    assert (said.backend, said.decision.kernels) == ("sdpa", False)
    assert "our kernels: fails its check against the reference on this card" in str(said)
    plan = fr.plan(rope=ROPE, modulations=[GROUP])
    through, _ = fr.ops.planned_attention(*qkv, list(plan.tensors), plan.spec, 0.25, False, "auto")
    assert torch.equal(through, out)
    wrong = [fr.attention(*qkv, rope=ROPE, modulations=[GROUP], backend="triton")]
    monkeypatch.setenv("FASTROPE_VERIFY", "0")
    wrong.append(fr.attention(*qkv, rope=ROPE, modulations=[GROUP]))  # as the warning says, in the same process too
    a_card()
    wrong.append(fr.attention(*qkv, rope=ROPE, modulations=[GROUP]))
    for found in wrong:
        assert (found - expected).abs().max() > 2e-2
    assert "trust in the kernels: not verified (FASTROPE_VERIFY=0)" in str(fr.explain(*qkv, rope=ROPE))
    assert not card.path(verification.FILE).exists()


def test_streams_of_a_wrong_kernel_are_joined(a_card, checks):
    checks.said = "off"
    norm = fr.Norm(torch.linspace(0.8, 1.2, 16), 1e-6)
    qkv = tensors()
    streams = [fr.Stream(*(x[:, part] for x in qkv), norm, norm) for part in (slice(9), slice(9, None))]
    plan = fr.plan(rope=ROPE, modulations=[LEVELS])
    with pytest.warns(UserWarning, match="streams"):
        out = fr.joint_attention(streams, plan=plan)
    joined = joint.join(streams)
    assert torch.equal(out, fr.attention(*joined, plan=plan, backend="sdpa"))


def test_the_answer_is_remembered_by_versions(a_card, checks, monkeypatch):
    _, qkv = attend()
    assert [str(kind) for kind in checks] == ["sdpa: rotation, BiasDelta, interleaved, float16, head dim 16"]
    fr.attention(*qkv, rope=ROPE, modulations=[GROUP])
    a_card()  # another process
    assert "trust in the kernels: verified on this card" in str(fr.explain(*qkv, rope=ROPE, modulations=[GROUP]))
    fr.attention(*qkv, rope=ROPE, modulations=[GROUP])
    assert len(checks) == 1
    assert "not verified yet: the first call checks it" in str(fr.explain(*qkv, rope=ROPE))
    fr.attention(*qkv, rope=ROPE)  # another kind
    assert len(checks) == 2
    monkeypatch.setattr(devices, "driver_version", lambda: "999.1")
    a_card()
    fr.attention(*qkv, rope=ROPE, modulations=[GROUP])
    assert len(checks) == 3
    (first, second) = json.loads(card.path(verification.FILE).read_text())["cards"].values()
    assert (len(first), len(second)) == (2, 1)


@pytest.mark.parametrize(("error", "kept"), [("no C compiler", 0), ("CUDA error: an illegal memory access", 1)])
def test_failures_that_may_be_mended_are_checked_again_a_lost_device_is_not(error, kept, a_card, checks):
    """A process whose device is lost has no result at all: the next one must not begin with the same launch."""
    checks.said = RuntimeError(error)
    for _ in range(2):
        with pytest.warns(UserWarning, match=error):
            out, qkv = attend()
        torch.testing.assert_close(out, reference(qkv), rtol=2e-3, atol=2e-3)
        a_card()
    assert len(checks) == 2 - kept


def test_memory_that_runs_out_says_nothing(a_card, checks):
    checks.said = torch.OutOfMemoryError("full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend()
        checks.said = None
        attend()
    assert len(checks) == 2


@pytest.mark.parametrize("place", ["a file", "no home", "damaged"])
def test_a_folder_that_cannot_be_used_costs_a_check_and_no_call(place, a_card, checks, monkeypatch, tmp_path):
    if place == "a file":
        (tmp_path / "fastrope").write_text("in the way")
    elif place == "damaged":
        (tmp_path / "fastrope").mkdir()
        card.path(verification.FILE).write_text('{"format": 1, "cards":')
    else:

        def folder():
            raise RuntimeError("no home")

        monkeypatch.setattr(card, "folder", folder)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        attend()
    assert [("verified.json" in str(w.message)) for w in warned] == ([True] if place == "damaged" else [])
    assert len(checks) == 1
    a_card()
    attend()
    assert len(checks) == (1 if place == "damaged" else 2)  # which is replaced


def test_nothing_is_checked_while_a_graph_records(a_card, checks, monkeypatch):
    monkeypatch.setattr(devices, "recording", lambda: True)
    with pytest.warns(UserWarning, match="call once before, outside of the graph"):
        _, qkv = attend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend()
    assert checks == []
    assert "not verified yet" in str(fr.explain(*qkv, rope=ROPE, modulations=[GROUP]))
    monkeypatch.setattr(devices, "recording", lambda: False)
    checks.said = "off"
    with pytest.warns(UserWarning, match="off"):
        attend()
    monkeypatch.setattr(devices, "recording", lambda: True)  # what is known holds in a graph
    runs = []
    monkeypatch.setattr(dispatch.folded, "run", lambda *call: runs.append(call))
    attend()
    assert not runs


def test_threads_wait_for_one_check(a_card, checks, monkeypatch):
    inside, release = threading.Event(), threading.Event()

    def wrong(kind, device):
        inside.set()
        assert release.wait(60)
        return checks(kind, device)

    monkeypatch.setattr(dispatch, "_wrong", wrong)
    monkeypatch.setattr(dispatch.folded, "run", lambda q, *_: q)  # the interpreter is not made for threads
    outs, qkv = [], tensors()
    call = lambda: outs.append(fr.attention(*qkv, rope=ROPE, modulations=[GROUP]))  # noqa: E731
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert inside.wait(60)
    assert outs == []
    release.set()
    for thread in threads:
        thread.join()
    assert (len(outs), len(checks)) == (4, 1)


def test_readers_never_see_half_a_file(a_card):
    """Whoever writes replaces it whole, and keeps what others wrote."""
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            seen.append(len(verification._remembered(CPU)))

    reader = threading.Thread(target=read)
    reader.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(40):
            verification._remember(f"kind {n}", CPU, "")
    stop.set()
    reader.join()
    assert seen == sorted(seen)
    assert len(verification._remembered(CPU)) == 40
    assert [path.name for path in card.folder().iterdir()] == ["verified.json"]


# ---- who needs none --------------------------------------------------------------------------------------------------


def test_kernels_with_rows_are_trusted(a_card, checks, monkeypatch):
    monkeypatch.setattr(devices, "capability", lambda device: "sm_90")
    monkeypatch.setitem(verification.ROWS, "sm_90", ("here", card.digest(kernels)))
    a_card()
    _, qkv = attend()
    assert checks == []
    assert "trust in the kernels: measured in the repository" in str(fr.explain(*qkv, rope=ROPE, modulations=[GROUP]))
    assert "trust" not in str(fr.explain(*qkv, rope=ROPE, backend="triton"))


def test_kernels_that_changed_since_are_checked(a_card, checks, monkeypatch):
    monkeypatch.setattr(devices, "capability", lambda device: "sm_90")
    monkeypatch.setitem(verification.ROWS, "sm_90", ("here", "of other kernels"))
    a_card()
    attend()
    assert len(checks) == 1


def test_rows_in_the_repository_are_those_named():
    assert {path.name for path in (ROOT / "bench" / "results").iterdir()} == {
        name for name, _ in verification.ROWS.values()
    }


def test_the_cache_folder_is_the_users(users_cache_folder, monkeypatch, tmp_path):
    folder = users_cache_folder
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert folder() == tmp_path / "elsewhere" / "fastrope"
    for nothing in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert folder() == tmp_path / ".cache" / "fastrope"


def test_a_switch_takes_all_kernels_away(a_card, checks, monkeypatch):
    monkeypatch.setenv("FASTROPE_KERNELS", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, qkv = attend()
        assert torch.equal(out, fr.attention(*qkv, rope=ROPE, modulations=[GROUP], backend="sdpa"))
    said = fr.explain(*qkv, rope=ROPE, modulations=[GROUP])
    assert not said.decision.kernels
    assert dict(said.rejected)["triton"] == "FASTROPE_KERNELS=0"
    with pytest.raises(NotImplementedError, match="FASTROPE_KERNELS=0"):
        fr.attention(*qkv, rope=ROPE, backend="triton")
