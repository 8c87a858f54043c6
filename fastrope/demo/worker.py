"""One backend's runs in a process of their own, for backends that need their environment set before they are imported.

Triton decides at import whether it interprets, so on a CPU its runs cannot share a process with anything that has
imported it. Prints one line per finished run; the latents go to a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .kontext import Settings, run

TIMEOUT = 600.0  # seconds


class Worker:
    """A child process that runs a backend on the CPU while this one goes on."""

    def __init__(self, backend: str, settings: Settings, folder: Path, environment: dict[str, str]) -> None:
        self._out = folder / f"{backend}.pt"
        self._log = folder / f"{backend}.log"
        options = [f"--{name}={value}" for name, value in dataclasses.asdict(settings).items()]
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastrope.demo.worker", str(self._out), f"--backend={backend}", *options],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment},
            )  # fmt: skip

    def result(self, tick: Callable[[int], None]) -> dict[str, torch.Tensor]:
        """Wait for the latents, calling ``tick(number of finished runs)`` meanwhile.

        Raises:
            NotImplementedError: the backend cannot run here.
            RuntimeError: it failed, with the end of its output.
        """
        waited, poll = 0.0, 0.5
        while True:
            try:
                code = self._process.wait(timeout=poll)
            except subprocess.TimeoutExpired:
                waited += poll
                tick(self._said().count("\ndone "))
                if waited > TIMEOUT:
                    self.stop()
                    raise RuntimeError(f"no result after {TIMEOUT:.0f} s of waiting") from None
                continue
            tick(self._said().count("\ndone "))
            break
        if code != 0:
            lines = self._said().strip().splitlines() or [f"exit code {code}"]
            raise RuntimeError(lines[-1][:200])
        loaded = torch.load(self._out, weights_only=True)
        if "unavailable" in loaded:
            raise NotImplementedError(loaded["unavailable"])
        return loaded

    def _said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """End the child if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def main(argv: list[str] | None = None) -> int:
    """Run one backend in float32 on the CPU and save its latents."""
    parser = argparse.ArgumentParser(prog="fastrope.demo.worker", description="Runs of one backend, saved to a file.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--backend", required=True)
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    arguments = vars(parser.parse_args(argv))
    out, backend = arguments.pop("out"), arguments.pop("backend")
    torch.set_num_threads(1)
    print("started")
    try:
        result = run(Settings(**arguments), backend, torch.device("cpu"), torch.float32, wrap=_report)
    except NotImplementedError as error:
        # A bare NotImplementedError has no words of its own.
        result = {"unavailable": str(error) or f"backend {backend!r} is not implemented in this version"}
    torch.save(result, out)
    return 0


def _report(names):
    for name in names:
        yield name
        print(f"done {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
