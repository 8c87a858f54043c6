"""Kernels verified before they are trusted: once per kind, on a GPU where the repository has no measurements of them.

The check runs before the first call of its kind and compares the kernels with the reference on a small one. What passed
is remembered for later processes, by card and versions. A kind that fails is not used: torch's attention takes its
calls.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from functools import lru_cache

import torch

from . import card, kernels
from . import device as devices

FILE = "verified"
# Capabilities that have measurements, the folder of these under bench/results, and which kernels were measured: they
# alone need no check.
ROWS = {"sm_90": ("nvidia-h200", "32786bb56f15")}
_LOCK = threading.Lock()
_PASSED: set[tuple[torch.device, Hashable]] = set()
_FAILED: set[tuple[torch.device, Hashable]] = set()
_RECORDED: set[torch.device] = set()  # GPUs for which the warning of :func:`_warn_of_graph` was given


@lru_cache(maxsize=64)
def needed(device: torch.device) -> bool:
    """Whether kernels on a GPU are checked before they are trusted."""
    _, measured = ROWS.get(devices.capability(device), ("", ""))
    return card.digest(kernels) != measured


def failed(kind: Hashable, device: torch.device) -> bool:
    """Whether a kind is known to be wrong on a GPU, and not to be used."""
    return (device, kind) in _FAILED and devices.switched_on("FASTROPE_VERIFY", default=True)


def holds(kind: Hashable, device: torch.device, check: Callable[[], str | None]) -> bool:
    """Whether kernels of a kind may run on a GPU, checked now if that is not known.

    Args:
        kind: what is checked; ``str`` of it is its name.
        check: returns what is wrong, or None. An exception counts as wrong; running out of memory decides nothing.
    """
    if (device, kind) in _PASSED:
        return True
    with _LOCK:  # one thread checks, others wait for what it finds
        if (device, kind) in _PASSED or failed(kind, device):
            return not failed(kind, device)
        if not devices.switched_on("FASTROPE_VERIFY", default=True):
            return True
        known = _remembered(device).get(str(kind))
        if known is None and devices.recording():
            _warn_of_graph(kind, device)
            return True
        wrong = _run(check, device) if known is None else known
        if wrong is None:
            return True
        (_FAILED if wrong else _PASSED).add((device, kind))
        if wrong:
            _warn(kind, device, wrong)
        if known is None and (not wrong or devices.lost(wrong)):  # other failures may be mended: a missing compiler
            _remember(kind, device, wrong)
        return not wrong


def status(kind: Hashable | None, device: torch.device) -> str:
    """What is known of kernels on a GPU, in words; runs nothing.

    Args:
        kind: what is checked; None where no check is needed.
    """
    if kind is None:
        return "measured in the repository"
    if not devices.switched_on("FASTROPE_VERIFY", default=True):
        return "not verified (FASTROPE_VERIFY=0)"
    if (device, kind) in _PASSED or _remembered(device).get(str(kind)) == "":
        return "verified on this card"
    return "not verified yet: the first call checks it"


def _run(check: Callable[[], str | None], device: torch.device) -> str | None:
    """What a check found wrong; "" for nothing, None if it could not be decided."""
    devices.synchronise(device)  # an error of work before this is not ours
    try:
        wrong = check()
        devices.synchronise(device)
        return wrong or ""
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # whatever a compiler, a driver or a launch may raise
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _warn(kind: Hashable, device: torch.device, wrong: str) -> None:
    warnings.warn(
        f"fastrope does not use its kernels for these calls on {card.name_of(device)}: they fail the check against the "
        f"reference ({wrong}; {kind}). Torch's attention takes them; FASTROPE_VERIFY=0 runs the kernels all the same, "
        "unchecked. Please report it with the page that `fastrope doctor --gpu` writes",
        stacklevel=5,
    )


def _warn_of_graph(kind: Hashable, device: torch.device) -> None:
    if device not in _RECORDED:
        _RECORDED.add(device)
        warnings.warn(
            f"fastrope: a graph records kernels that are not verified on {card.name_of(device)} ({kind}); call once "
            "before, outside of the graph, to have them checked",
            stacklevel=5,
        )


def _remembered(device: torch.device) -> dict[str, str]:
    """What earlier checks found wrong, by the name of the kind; "" for nothing."""
    cards = card.read(FILE)
    rows = cards.get(card.key(device), []) if cards else []
    return {row["kind"]: row["wrong"] for row in rows if isinstance(row, dict) and {"kind", "wrong"} <= row.keys()}


def _remember(kind: Hashable, device: torch.device, wrong: str) -> None:
    """Add a result to those of other processes. Nothing is stored if the folder cannot be written to."""
    found = _remembered(device) | {str(kind): wrong}
    try:
        card.write(FILE, device, [{"kind": name, "wrong": wrong} for name, wrong in found.items()])
    except (OSError, RuntimeError):
        return
