"""The suites, and the order in which their pieces tell most."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from .frame import Selection, Task

# Name to what it measures. Each is a module of this package with tasks(selection) and the registries
# WORKLOADS and, where it has them, CASES and PEERS.
SUITES = {
    "attention": "single attention calls, ours and others'",
    "block": "whole attention blocks against diffusers' processor",
    "kontext": "denoising steps under the editing methods",
    "shared": "denoising steps with a shared reference",
    "match": "anchor token matching",
}
# What comes first when time is short: what the bars are measured on, then other shapes, then other hosts.
ORDER = (
    ("attention", "kontext"), ("block", None), ("attention", "tokens-33k"), ("kontext", None),
    ("attention", "shared"), ("attention", "qwen-edit"), ("attention", "flux2"), ("attention", None),
    ("match", None), ("shared", None),
)  # fmt: skip


def load(name: str) -> ModuleType:
    """The module of a suite; needs its host libraries only once it measures."""
    return importlib.import_module(f".{name}", __package__)


def tasks(names: Sequence[str], selection: Selection) -> list[Task]:
    """The pieces of some suites, the most telling first.

    Raises:
        ValueError: a workload, case or peer that none of them has.
    """
    modules = [load(name) for name in names]
    for option, asked in (("workload", selection.workloads), ("case", selection.cases), ("peer", selection.peers)):
        registries = [getattr(module, f"{option.upper()}S", ()) for module in modules]
        known = list(dict.fromkeys(name for registry in registries for name in registry))
        unknown = [name for name in asked or () if name not in known]
        if unknown:
            raise ValueError(f"--{option}: expected some of {', '.join(known)}; received {', '.join(unknown)}")
    return sorted((task for module in modules for task in module.tasks(selection)), key=rank)


def rank(task: Task) -> int:
    """Where a piece stands in ``ORDER``."""
    places = (task.suite, task.workload), (task.suite, None)
    return min(ORDER.index(place) for place in places if place in ORDER)
