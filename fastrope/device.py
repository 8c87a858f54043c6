"""What a device can hold, and what the environment switches on or off: asked here alone."""

from __future__ import annotations

import os

import torch

WITHOUT_FLOAT64 = ("mps",)  # device types; Metal has no double precision
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
