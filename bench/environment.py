"""Where a row was measured: machine, software and source."""

from __future__ import annotations

import datetime
import shutil
import subprocess
from pathlib import Path

import torch

from fastrope.device import driver_version, triton_version


def environment(device: torch.device, rev: str | None = None) -> dict:
    """What every row of a run says of machine, software and source. ``date`` is that of the run's start."""
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "triton": triton_version(),
        "driver": driver_version() if cuda else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rev": rev or revision(),
    }


def revision(name: str = "HEAD", folder: Path | None = None) -> str | None:
    """The commit of the clone this file lies in, ``-dirty`` with changes that are not committed; or of ``name``."""
    git = "git", "-C", str(folder or Path(__file__).resolve().parent)
    commit = output(*git, "rev-parse", "--short=12", "--verify", "--quiet", f"{name}^{{commit}}")
    if not commit or name != "HEAD":
        return commit
    return commit + ("-dirty" if output(*git, "status", "--porcelain", "--untracked-files=no") else "")


def output(*command: str) -> str | None:
    """The first line a command prints; None where there is no such command, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().partition("\n")[0] or None if done.returncode == 0 else None


def slug(gpu: str) -> str:
    """The folder of a device's rows: "NVIDIA H200" -> "nvidia-h200"."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())
