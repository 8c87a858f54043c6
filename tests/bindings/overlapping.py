"""Two calls of one transformer, the second within the first."""

from __future__ import annotations

import threading
import types
from concurrent.futures import ThreadPoolExecutor

import torch
from diffusers_hosts import TINY_HOSTS, grag_like, loose_like
from tiny_transformers import TEXT

import fastrope as fr

GRIDS = (4, 6), (6, 4)


def two_calls() -> list[dict]:
    """Of one reference each, on grids that differ though their tokens are as many."""
    return [TINY_HOSTS["kontext"].call(fr.TokenLayout(TEXT, grid, [grid])) for grid in GRIDS]


def by_layout(site: fr.Site) -> list:
    """Modulations that only fit the site's own layout, and differ from layer to layer."""
    return grag_like(site.tokens, delta=0.5 + 0.1 * site.layer) + loose_like(site.tokens)


METHOD = types.SimpleNamespace(modulations=by_layout)


def overlapping(at: torch.nn.Module, first, second):
    """``first()`` in a thread of its own, which waits before it runs a module until ``second()`` is over."""
    begun, over, caller = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.get_ident() in caller:
            begun.set()
            assert over.wait(60)

    def called():
        caller.append(threading.get_ident())
        return first()

    watch = at.register_forward_pre_hook(wait)
    try:
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(called)
            try:
                assert begun.wait(60) or found.exception()
                other = second()
            finally:
                over.set()
            return found.result(), other
    finally:
        watch.remove()
