"""Kept references: what stays behind, and copies made one layer ahead."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch
from shared_paths import FLUX, path_of, small
from untwisting_calls import CARRIED, DIALS

import fastrope as fr

pytest.importorskip("diffusers")
from tiny_transformers import TEXT, run

from fastrope.bindings.diffusers import Handle
from fastrope.bindings.image import fingerprints, prefetch
from fastrope.bindings.image.prefetch import Prefetch
from fastrope.sharing import SharedKeys, Statistics


def held_bytes(handle: Handle, apart: tuple) -> int:
    """Of all tensors that a handle leads to, but for what is in modules, classes, functions and ``apart``."""
    passed = (types.ModuleType, types.FunctionType, type, torch.nn.Module)
    seen, fresh, storages = {id(x) for x in apart}, [handle], {}
    while fresh:
        x = fresh.pop()
        if id(x) in seen or isinstance(x, passed):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        else:
            fresh.extend(gc.get_referents(x))
    return sum(storages.values())


@CARRIED
def test_nothing_grows_from_run_to_run(carried, monkeypatch):
    """Every run has ids and masks of its own, of which the last few are remembered."""
    monkeypatch.setattr(fingerprints.Memo, "KNOWN", 4)
    monkeypatch.setattr(fingerprints, "KNOWN_TENSORS", 8)
    pipe, path = FLUX.pipeline(), path_of(FLUX)
    reference = path if carried == "batched" else fr.ReferenceCache(path)
    sizes = []
    with fr.apply(pipe, fr.UntwistingRoPE(**DIALS), reference=reference) as handle:
        for _ in range(7):
            FLUX.generate(pipe, 3, 1, (TEXT, None))
            sizes.append(held_bytes(handle, (pipe, path)))
    assert sizes[0] > 10_000  # plans, and kept keys
    assert sizes[5] == sizes[6]


def test_nothing_is_held_after_clear_and_remove():
    model, call, source = small()
    cache = fr.ReferenceCache(source)
    handle = fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=cache)
    run(model, call)
    held = [weakref.ref(x) for keys in next(iter(cache._snapshots.values())).layers.values() for x in keys.tensors()]
    assert len(held) == 4 * 6
    assert all(ref().untyped_storage().nbytes() == ref().nbytes for ref in held)  # no views of what is larger
    cache.clear()
    handle.remove()
    assert not any(ref() is not None for ref in held)
    assert not handle.bound  # a handle that somebody keeps


# ---- one layer ahead -------------------------------------------------------------------------------------------------


class Log:
    """Copies that write down when they start and finish, and how many are about."""

    def __init__(self):
        self.said: list[str] = []
        self.entries: dict[int, str] = {}
        self.alive: weakref.WeakSet = weakref.WeakSet()

    def __call__(self, keys: SharedKeys, device: torch.device):
        log, name = self, self.entries.setdefault(id(keys.k), str(len(self.entries)))

        class Told:
            def __init__(self):
                log.said.append(f"start {name}")
                log.alive.add(self)
                self.moved = keys.map(torch.clone)

            def finish(self):
                log.said.append(f"finish {name}")
                return self.moved

        return Told()


def entries_of(count: int, device="cpu") -> list[SharedKeys]:
    def draw() -> torch.Tensor:
        return torch.randn(1, 4, 2, 8).to(device)

    return [SharedKeys(draw(), draw(), False, Statistics(draw(), draw()), None) for _ in range(count)]


@pytest.fixture
def log(monkeypatch):
    found = Log()
    monkeypatch.setattr(prefetch, "copy_of", found)
    return found


ELSEWHERE = torch.device("meta")  # any device that the entries are not on


def test_the_next_entry_is_under_way_while_a_layer_computes(log):
    entries = entries_of(3)
    log.entries = {id(entry.k): str(n) for n, entry in enumerate(entries)}
    ahead = Prefetch(entries, ELSEWHERE)
    assert log.said == ["start 0"]
    for n, entry in enumerate(entries):
        log.said.clear()
        found = ahead.take(n)
        assert log.said == [f"finish {n}"] + ([f"start {n + 1}"] if n < 2 else [])
        assert all(torch.equal(x, y) for x, y in zip(found.tensors(), entry.tensors(), strict=True))
        assert len(log.alive) == (1 if n < 2 else 0)  # what is under way; what was handed out is the layer's
    copies = [weakref.ref(x) for x in found.tensors()]
    del found
    assert not any(ref() is not None for ref in copies)


def test_layers_may_be_left_out_and_come_again(log):
    """As caches of blocks and checkpoints have it: what was copied for nothing is dropped."""
    entries = entries_of(4)
    log.entries = {id(entry.k): str(n) for n, entry in enumerate(entries)}
    ahead = Prefetch(entries, ELSEWHERE)
    for n in (0, 2, 2, 3, 1):
        log.said.clear()
        found = ahead.take(n)
        assert torch.equal(found.k, entries[n].k)
        assert f"finish {n}" in log.said
        assert len([word for word in log.said if word.startswith("finish")]) == 1
        assert len(log.alive) <= 1


def test_what_is_there_is_not_copied(log):
    entries = entries_of(2)
    ahead = Prefetch(entries, torch.device("cpu"))
    assert [ahead.take(n) is entry for n, entry in enumerate(entries)] == [True, True]
    assert log.said == []
    assert Prefetch([], ELSEWHERE)._ahead is None


def test_without_streams_a_copy_is_made_when_it_is_asked_for():
    copy = prefetch.copy_of(entries_of(1)[0], ELSEWHERE)
    assert type(copy) is prefetch.Copy
    assert {x.device.type for x in copy.finish().tensors()} == {"meta"}


def test_a_run_asks_for_its_layers_in_order(log, monkeypatch):
    """The first entry starts before the blocks run; layers that share nothing are passed over."""
    model, call, source = small()
    cache = fr.ReferenceCache(source)
    method = fr.UntwistingRoPE(**DIALS, layers=[0, 2, 3])
    with fr.apply(model, method, reference=cache):
        expected = run(model, call)
        monkeypatch.setattr(Prefetch, "_moves", lambda self, n: n < len(self._entries))
        log.entries = {id(keys.k): str(n) for n, keys in next(iter(cache._snapshots.values())).layers.items()}
        watch = model.transformer_blocks[0].register_forward_pre_hook(lambda *_: log.said.append("blocks"))
        assert torch.equal(run(model, call), expected)
        watch.remove()
        assert log.said == ["start 0", "blocks", "finish 0", "start 2", "finish 2", "start 3", "finish 3"]
        assert not log.alive


def test_a_broken_run_leaves_no_copy(log, monkeypatch):
    model, call, source = small()

    def fail(*_):
        raise RuntimeError("out of memory")

    with fr.apply(model, fr.UntwistingRoPE(**DIALS), reference=fr.ReferenceCache(source)):
        run(model, call)
        monkeypatch.setattr(Prefetch, "_moves", lambda self, n: n < len(self._entries))
        watch = model.single_transformer_blocks[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, call)
        watch.remove()
        gc.collect()
        assert log.said[-1].startswith("start")
        assert not log.alive
