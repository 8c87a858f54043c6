"""The op and the matcher around it: contracts, compilers, validation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrope import ISLock, verification
from fastrope import device as devices
from fastrope.islock import op

BACKENDS = ("eager", "triton") if devices.interpreted() else ("eager",)


def arguments(name: str, active: bool) -> tuple:
    matcher = ISLock(candidates=9).matcher(torch.randn(40, 4), num_tokens=8)
    flags = torch.tensor([True, False, True]) if active else None
    tables = matcher.codebook, matcher.rows, matcher.windows
    seeds = torch.randint(2**62, (3,))
    return (
        torch.randn(3, 50),
        torch.tensor([1, 2, -1]),
        torch.tensor([0, 7, 3]),
        seeds,
        flags,
        *tables,
        9,
        1.0,
        "l2",
        name,
    )


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name, active):
    torch.library.opcheck(op.match_anchors, arguments(name, active))


@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_without_breaks(name):
    """Integer and tensor positions, seeds and torch's own generator; one graph for all positions given as tensors."""
    matcher = ISLock(candidates=9).matcher(torch.randn(40, 4), num_tokens=8, backend=name)
    logits, anchors, seeds = torch.randn(3, 50), torch.tensor([1, 2, 3]), torch.randint(2**62, (3,))
    compiled = torch.compile(lambda x, i, s: matcher(x, anchors, i, seeds=s), backend="aot_eager", fullgraph=True)
    for position in (0, 5, torch.tensor(3), torch.tensor([1, 2, 7])):
        expected = matcher(logits, anchors, position, seeds=seeds)
        for found, wanted in zip(compiled(logits, position, seeds), expected, strict=True):
            assert torch.equal(found, wanted)
    drawn = torch.compile(lambda x, i: matcher(x, anchors, i), backend="aot_eager", fullgraph=True)
    assert drawn(logits, torch.tensor(3)).tokens.shape == (3,)


class Synchronisations(TorchDispatchMode):
    """Ops that wait for a device: reading a value, or a copy to the CPU that blocks."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(func)
        return func(*args, **kwargs or {})


def test_a_call_reads_no_value():
    matcher = ISLock().matcher(torch.randn(40, 4), num_tokens=8)
    logits, anchors = torch.randn(3, 50), torch.tensor([1, 2, -1])
    with Synchronisations() as mode:
        matcher(logits, anchors, 3, torch.Generator().manual_seed(0), torch.tensor([True, True, False]))
        matcher(logits, anchors, torch.tensor([1, 2, 3]))
        call = arguments("eager", True)
        op.reference.match(*call[:-1])
    assert mode.found == []
    with Synchronisations() as mode:
        anchors.sum().item()
    assert mode.found  # the watch sees what it must see


def test_logits_that_require_grad_are_matched():
    logits = torch.randn(2, 40, requires_grad=True)
    out = ISLock().matcher(torch.randn(40, 4), num_tokens=8)(logits, torch.tensor([1, 2]), 0)
    assert not out.distance.requires_grad


@pytest.mark.skipif(not devices.interpreted(), reason="the interpreter's limits")
def test_the_kernel_says_what_it_cannot_run():
    for logits, codebook in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        matcher = ISLock().matcher(torch.randn(40, 4, dtype=codebook), num_tokens=8, backend="triton")
        with pytest.raises(NotImplementedError, match='backend="triton" cannot match'):
            matcher(torch.randn(1, 40, dtype=logits), torch.tensor([1]), 0)
        matcher = ISLock().matcher(torch.randn(40, 4, dtype=codebook), num_tokens=8)
        assert matcher(torch.randn(1, 40, dtype=logits), torch.tensor([1]), 0).tokens.shape == (1,)


# ---- validation ------------------------------------------------------------------------------------------------------

CODEBOOK = torch.zeros(40, 4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("codebook", {"codebook": CODEBOOK[0]}), ("codebook", {"codebook": CODEBOOK.long()}),
        ("codebook", {"codebook": CODEBOOK[:0]}), ("codebook", {"codebook": None}),
        ("num_tokens", {"num_tokens": 0}), ("num_tokens", {"num_tokens": 2.0}), ("backend", {"backend": "cuda"}),
        ("token_ids", {"token_ids": torch.arange(39)}), ("token_ids", {"token_ids": torch.zeros(40).long()}),
        ("token_ids", {"token_ids": torch.arange(40) - 1}), ("token_ids", {"token_ids": torch.arange(40.0)}),
        ("token_ids", {"token_ids": list(range(40))}),
    ],
    ids=str,
)  # fmt: skip
def test_a_matcher_refuses(name, options):
    options = {"codebook": CODEBOOK, "num_tokens": 8, **options}
    with pytest.raises(ValueError, match=f"^{name}: expected .*, received"):
        ISLock().matcher(options.pop("codebook"), **options)


LONG = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("logits", {"logits": torch.zeros(50)}), ("logits", {"logits": torch.zeros(2, 50).long()}),
        ("logits", {"logits": torch.zeros(2, 39)}), ("logits", {"logits": torch.zeros(0, 50)}),
        ("logits", {"logits": torch.zeros(2, 50, device="meta")}), ("anchors", {"anchors": LONG[:1]}),
        ("anchors", {"anchors": LONG.float()}), ("anchors", {"anchors": 3}), ("anchors", {"anchors": LONG[:, None]}),
        ("position", {"position": 8}), ("position", {"position": -1}), ("position", {"position": 1.5}),
        ("position", {"position": True}), ("position", {"position": torch.zeros(3).long()}),
        ("position", {"position": torch.zeros(2)}), ("active", {"active": LONG}), ("active", {"active": [True, True]}),
        ("generator", {"generator": 3}), ("generator", {"generator": [torch.Generator()]}),
        ("seeds", {"seeds": LONG.int()}), ("seeds", {"seeds": LONG, "generator": torch.Generator()}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",  # a generator prints its address, which no two processes share
)  # fmt: skip
def test_a_call_refuses(name, options):
    matcher = ISLock().matcher(CODEBOOK, num_tokens=8)
    with pytest.raises(ValueError, match=f"^{name}: expected .*, received"):
        matcher(**{"logits": torch.zeros(2, 50), "anchors": LONG, "position": 0, **options})


def test_validation_survives_optimised_mode():
    code = """
import torch, fastrope as fr
assert False, "assertions are off"
matcher = fr.ISLock().matcher(torch.zeros(40, 4), num_tokens=8)
zeros = torch.zeros(2, dtype=torch.int64)
for name, call in {
    "ISLock.tau": lambda: fr.ISLock(tau=-1),
    "codebook": lambda: fr.ISLock().matcher(torch.zeros(4), num_tokens=8),
    "logits": lambda: matcher(torch.zeros(2, 8), zeros, 0),
    "position": lambda: matcher(torch.zeros(2, 50), zeros, 8),
}.items():
    try:
        call()
    except ValueError as error:
        if not str(error).startswith(name):
            raise
    else:
        raise SystemExit(f"{name}: no error")
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs the interpreter")
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_on_a_card_without_rows_the_kernel_is_checked_before_it_is_trusted(metric, monkeypatch, tmp_path):
    """Right, it runs; wrong, it does not, and a warning says so."""
    monkeypatch.setattr(devices, "on_gpu", lambda x: True)
    monkeypatch.setattr(verification, "needed", lambda device: True)
    monkeypatch.setattr(verification.card, "key", lambda device: "a card")
    monkeypatch.setattr(verification.card, "name_of", lambda device: "a card")
    monkeypatch.setattr(verification.card, "folder", lambda: tmp_path)
    for name in ("_PASSED", "_FAILED"):
        monkeypatch.setattr(verification, name, set())
    call = (*arguments("auto", True)[:-2], metric)
    expected = op.match_anchors(*call, "eager")
    runs, launch = [], op._launch
    monkeypatch.setattr(op, "_launch", lambda *call: runs.append(call) or launch(*call))
    op.match_anchors(*call, "auto")
    op.match_anchors(*call, "auto")
    assert len(runs) == 3  # the check, and both
    monkeypatch.setattr(op, "_launch", lambda *call: (launch(*call)[0] + 1, *launch(*call)[1:]))
    monkeypatch.setattr(verification, "_PASSED", set())
    (tmp_path / "verified.json").unlink()
    with pytest.warns(UserWarning, match="match: .*FASTROPE_VERIFY=0"):
        found = op.match_anchors(*call, "auto")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(op.match_anchors(*call, "triton")[0], expected[0] + 1)
