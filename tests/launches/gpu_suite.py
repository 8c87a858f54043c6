"""The tests of ``tests/gpu`` in the lane: the calls that they make are made here, what they say of values is not held.

So a call that is added there is launched here, too. What a test asserts of routes, layouts and compilations is held.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numerics
import pytest
import torch
from watch import Watch

FILES = sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "gpu").glob("test_*.py"))
SKIPPED = {  # tests that a stub cannot take, and why
    "test_the_current_device_may_be_another": "needs two devices",
    "test_compiled_into_cuda_graphs_without_recompiling": "inductor would compile for the CPU",
    "test_memory_stays_a_small_multiple_of_the_keys": "measures memory of a device",
    "test_a_graph_follows_its_position": "positions come from a replay",
}
# Cases that stand for a test in every run, where it would compile for long. Of other tests these are so few that every
# value of every parameter comes.
SOME = {
    "test_flux_kontext": ("plain, bfloat16, False", "loose-levels, bfloat16, True", "all, bfloat16, False"),
    "test_head_dims_of_a_polynomial": ("128, bfloat16, random",),
    "test_head_dims": (
        "64, bfloat16, levels", "96, float32, levels", "128, bfloat16, distinct", "256, float16, levels",
    ),
    "test_biases_and_values": ("64, bfloat16, None, levels", "128, bfloat16, random, levels"),
    "test_strides_with_nan_between_and_behind": ("True, expanded, bfloat16", "False, padded, bfloat16"),
    "test_head_dims_split": ("96, float16, polynomial", "128, bfloat16, levels"),
    "test_strides_folded": tuple(f"True, {layout}, bfloat16" for layout in numerics.LAYOUTS),
    "test_lengths_share_kernels": (),
    "test_layouts_share_kernels": (),
    "test_flux_kontext_folded": ("plain, bfloat16", "grag, bfloat16", "bands, bfloat16"),
    "test_flux_kontext_split": ("crop-gain, bfloat16", "all-per-query, bfloat16"),
    "test_head_dims_folded": ("64, bfloat16, True", "96, float16, True", "128, bfloat16, False", "256, float32, True"),
    "test_parity_with_the_reference_on_the_cpu": (
        "{}", "{'dtype': torch.float16, 'vocab': 16387}", "{'vocab': 37, 'image': 11, 'dim': 3, 'top_k': 5}",
    ),
}  # fmt: skip
# Bytes of device memory that tests are told of: they touch almost nothing of what they reserve.
MEMORY = 3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Torch:
    """``torch`` as these modules see it: values are equal, and a device has nothing to wait for."""

    testing = SimpleNamespace(assert_close=lambda *_, **__: None)
    cuda = SimpleNamespace(
        Stream=lambda: SimpleNamespace(wait_stream=lambda _: None),
        current_stream=lambda: SimpleNamespace(wait_stream=lambda _: None),
        stream=lambda _: nullcontext(), CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        graph=lambda _: nullcontext(), set_sync_debug_mode=lambda _: None, mem_get_info=lambda: (MEMORY, MEMORY),
    )  # fmt: skip

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def equal(*_) -> bool:
        return True


@contextmanager
def without_numerics(watched: Callable) -> Iterator[list]:
    """The modules, while every call of the op and of a matcher goes through ``watched(call)``."""
    numerics.DEVICE = "cpu"
    numerics.assert_close = lambda *_, **__: None
    from gpu import device_calls

    import fastrope as fr
    from fastrope import ops
    from fastrope.bench import problem, workloads
    from fastrope.islock import matcher, op
    from fastrope.islock.matcher import Matcher

    device_calls.attend_checked = lambda given, _, backend: fr.attention(
        given.q, given.k, given.v, plan=given.plan, backend=backend
    )
    attention, joint, match = fr.attention, fr.joint_attention, Matcher.__call__

    def no_reference(q, *_, return_lse=False, **__):
        lse = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
        return (torch.empty_like(q), lse) if return_lse else torch.empty_like(q)

    def unset(workload, _, dtype):
        """Of full size; nothing is computed from them."""
        lengths = len(workload.tokens), workload.tokens.num_keys, workload.tokens.num_keys
        return tuple(torch.empty(workload.batch, n, workload.heads, workload.dim, dtype=dtype) for n in lengths)

    def attend(q, k, v, **options):
        if options.get("backend") == "eager":
            return no_reference(q, **options)
        return watched(partial(attention, q, k, v, **options))

    def attend_joint(streams, **options):
        if options.get("backend") == "eager":
            return no_reference(torch.cat([s[0] for s in streams], dim=1), **options)
        return watched(partial(joint, streams, **options))

    def matched(self, *given, **options):
        call = partial(match, self, *given, **options)
        return call() if self.backend == "eager" else watched(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fr, "attention", attend)
        patch.setattr(fr, "joint_attention", attend_joint)
        patch.setattr(Matcher, "__call__", matched)
        patch.setattr(ops, "observed", lambda *_: False)  # a mode that looks on would see one op
        patch.setattr(matcher, "match_anchors", op.match_anchors._init_fn)
        patch.setattr(workloads.Workload, "tensors", unset)
        patch.setattr(problem, "rotate", lambda x, *_: torch.empty_like(x))
        modules = [importlib.import_module(f"gpu.{name}") for name in FILES]
        for module in modules:
            module.torch = Torch()
        yield modules


def cases(test: Callable, everything: bool) -> list[dict]:
    """The arguments of the cases of a test."""
    choices = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
            choices.append([dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in values])
    if everything or test.__name__ in SOME:
        found = itertools.product(*choices)
    else:
        found = [[part[i % len(part)] for part in choices] for i in range(max(map(len, choices), default=1))]
    found = [{name: value for part in parts for name, value in part.items()} for parts in found]
    if everything or test.__name__ not in SOME:
        return found
    some = {in_words(arguments): arguments for arguments in found}
    return [some[words] for words in SOME[test.__name__]]


def words(arguments: dict) -> dict[str, str]:
    """Arguments as a row has them; what a test hands to its matcher has no short name."""
    return {name: str(value).removeprefix("torch.") for name, value in arguments.items() if name != "lock"}


def in_words(arguments: dict) -> str:
    """The same in one line."""
    return ", ".join(words(arguments).values())


def tests(modules: list, everything: bool) -> Iterator[tuple[str, dict, Callable]]:
    """``(test, arguments, function)`` of cases of every test."""
    for module in modules:
        for name, test in vars(module).items():
            if name.startswith("test_") and name not in SKIPPED:
                for arguments in cases(test, everything):
                    yield name, arguments, lambda test=test, arguments=arguments: run(test, arguments)


def run(test: Callable, arguments: dict) -> None:
    """Run one case."""
    with pytest.MonkeyPatch.context() as patch, suppress(pytest.skip.Exception):
        more = {"monkeypatch": patch} if "monkeypatch" in inspect.signature(test).parameters else {}
        test(**arguments, **more)


class Refused(Exception):
    """A call was, and has its row."""


def rows(lane, everything: bool) -> list[dict]:
    """A row of every call that the tests make, with what it reads on the host when made again; one of every test that
    fails otherwise."""
    found, at = [], {}

    def watched(call):
        row, result = lane.made(call)
        found.append({**at, **row})
        if row["error"]:
            raise Refused
        with Watch() as watch:
            call()
        found[-1]["reads"] = watch.read
        return result

    with without_numerics(watched) as modules:
        for test, arguments, function in tests(modules, everything):
            at = {"case": f"{test}[{in_words(arguments)}]", "test": test, "arguments": words(arguments)}
            try:
                function()
            except Refused:
                pass
            except Exception as problem:  # such as an assertion of the test
                found.append({**at, "launched": [], "compiled": 0, "error": f"{type(problem).__name__}: {problem}"})
    return found
