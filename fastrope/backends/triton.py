"""The fused kernels of ``fastrope.kernels``, driven by a plan."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

from ..planning import Plan


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """True when triton runs kernels in numpy (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unsupported(q: torch.Tensor) -> str | None:
    """Why the kernels cannot run on tensors like ``q``, or None."""
    if q.dtype == torch.float64:
        return "float64 inputs (use sdpa or eager)"
    if not _installed():
        return "triton is not installed"
    if interpreted():
        return "triton's interpreter computes bfloat16 wrongly" if q.dtype == torch.bfloat16 else None
    if q.device.type != "cuda":
        return f"no kernel for device {q.device.type} (set TRITON_INTERPRET=1 before importing triton to interpret)"
    from ..kernels import config

    return config.unsupported(config.current_arch(q.device))


def run(q, k, v, plan: Plan, scale: float, return_lse: bool = False):
    """See :func:`fastrope.backends.eager.run`; forward only."""
    raise NotImplementedError
