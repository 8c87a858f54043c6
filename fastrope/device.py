"""What a device can do and what the environment switches on or off: asked here alone.

Tests replace these functions, so that every branch runs everywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
from functools import cache, lru_cache

import torch

from .kernels import config
from .kernels.streams import Projected

INTERPRETED_ARCH = "sm_89"  # whose configuration the interpreter uses: small tiles
WITHOUT_FLOAT64 = ("mps",)  # device types; Metal has no double precision
MOST_PROGRAMS = 65535  # of the second and third dimension of a grid, which are heads and batch rows
WITHOUT_KERNELS = "FASTROPE_KERNELS=0"  # an obstacle that a user wants
SWITCHES = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}


def widest_float(device: torch.device | str | None) -> torch.dtype:
    """The widest floating-point dtype of a device: float64, or float32 where there is none. None: the CPU."""
    return torch.float32 if device is not None and torch.device(device).type in WITHOUT_FLOAT64 else torch.float64


def on_device(x: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """``x`` on a device, float64 as the widest dtype that the device has; ``x`` itself where that changes nothing."""
    if x.dtype == torch.float64:
        x = x.to(widest_float(device))  # before the move: the device may be unable to convert it
    return x.to(device)


def wide_on_cpu(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float64 on the CPU, detached; ``x`` itself where that changes nothing."""
    return x.detach().cpu().double()  # in two steps: a combined one converts where the tensor is


def switched_on(name: str, default: bool) -> bool:
    """An environment variable as a switch; unset or empty: ``default``.

    Raises:
        ValueError: a value that is none of 1, true, on, yes, 0, false, off, no, in any case.
    """
    value = os.environ.get(name, "").strip()
    if value and value.lower() not in SWITCHES:
        raise ValueError(f"{name}: expected one of {', '.join(SWITCHES)}, received {value!r}")
    return SWITCHES[value.lower()] if value else default


def switches() -> tuple[str | None, ...]:
    """The environment variables that a choice of kernels depends on, as they are."""
    return tuple(os.environ.get(f"FASTROPE_{name}") for name in ("KERNELS", "TMA", "POLYNOMIAL"))


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """True when triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """True when triton runs kernels in numpy (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """The architecture whose launch configurations a device uses, as named in ``kernels.config.ARCHS`` where there are
    some for it."""
    if interpreted():
        return INTERPRETED_ARCH
    if torch.version.hip is not None:
        name = capability(device)
        if name.startswith(("gfx11", "gfx120")):
            return "gfx1100"
        return "gfx942" if name in ("gfx940", "gfx941", "gfx942", "gfx950", "gfx90a") else name
    properties = torch.cuda.get_device_properties(device)
    return config.arch_of(properties.major, properties.minor)


@lru_cache(maxsize=64)
def capability(device: torch.device) -> str:
    """What a GPU itself is, such as ``sm_86`` or ``gfx90a``."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return getattr(properties, "gcnArchName", "").split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def driver_version() -> str | None:
    """Of the NVIDIA driver; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def triton_version() -> str | None:
    """Whatever distribution it came with: ``triton-windows`` on Windows, another for ROCm."""
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def on_gpu(x: Projected) -> bool:
    """Whether tensors like ``x`` are on a GPU."""
    return x.device.type == "cuda"


def kernel_obstacle(q: Projected) -> str | None:
    """Why the kernels cannot run on tensors like ``q``, or None. Of ``(B, S, H, D)`` they take the ``D`` that have a
    configuration."""
    if q.dtype == torch.float64:
        return "float64 inputs (use sdpa or eager)"
    if not switched_on("FASTROPE_KERNELS", default=True):
        return WITHOUT_KERNELS
    if not has_triton():
        return "triton is not installed"
    if interpreted():
        return "triton's interpreter computes bfloat16 wrongly" if q.dtype == torch.bfloat16 else None
    if q.device.type != "cuda":
        return f"no kernel for device {q.device.type} (set TRITON_INTERPRET=1 before importing triton to interpret)"
    if len(q.shape) != 4:
        return config.unsupported(architecture(q.device))
    batch, tokens, heads, dim = q.shape
    if batch > MOST_PROGRAMS or 2 * heads > MOST_PROGRAMS:  # the polynomial has two rows of keys a head
        return f"more than {MOST_PROGRAMS} batch rows or half as many heads, which a grid of programs cannot have"
    if tokens * dim >= 2**31:
        return "2**31 numbers or more in a head, and offsets in a head are int32"
    return config.unsupported(architecture(q.device), dim)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU, and hear of what failed there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def recording() -> bool:
    """Whether a graph or a trace records what runs now."""
    # torch.jit.is_tracing is documented and left out of the module's __all__.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return traced or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def lost(error: str) -> bool:
    """Whether an error of torch's or triton's leaves a GPU on which nothing runs any more in this process."""
    return ("CUDA error" in error or "[CUDA]" in error) and "out of memory" not in error
