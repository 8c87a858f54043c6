"""What the commands share: how one runs, the options of a run, its device and dtype, its record."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ..checks import require
from ..outputs import check_files, check_format, write_record

TINY = "tiny"  # the trained models that come with the package
QUIET = "TRANSFORMERS_VERBOSITY", "error"  # against advice on parts that the tiny models lack
DTYPES = ("float32", "bfloat16", "float16")


class Missing(OSError):
    """Something that is not there: weights, a file. The message says how to get it."""


def command(
    make_parser: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], Iterable[Path]],
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None] | None = None,
) -> Callable[[Sequence[str] | None], int]:
    """The ``main(argv)`` of a command.

    Args:
        make_parser: its options, ``--model`` among them.
        run: does the work and returns the files it wrote, which are printed.
        check: ends the program where options contradict each other.

    Returns:
        A function of the arguments without the program's name (None takes those of the process), which returns 0. What
        it raises is told to the user by :func:`fastrope.cli.main`.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        parser = make_parser()
        options = parser.parse_args(argv)
        if check is not None:
            check(parser, options)
        check_numbers(options)
        threads = torch.get_num_threads()
        if options.model == TINY:  # tensors so small lose more to waiting threads than they gain
            torch.set_num_threads(1)
            os.environ.setdefault(*QUIET)
        try:
            written = list(run(options))
        finally:
            torch.set_num_threads(threads)
        for path in written:
            print(path)
        return 0

    return main


# ---- options ---------------------------------------------------------------------------------------------------------


def flag(name: str) -> str:
    """The option of an attribute of the parsed arguments."""
    return f"--{name.replace('_', '-')}"


def given(options: argparse.Namespace, *names: str) -> dict[str, object]:
    """Those of the named options that the user gave."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def file_path(text: str) -> Path:
    """A path on the command line; the shell leaves the tilde of ``--out=~/a.png`` to us."""
    return Path(os.path.expanduser(text))


def add_out(add: Callable, kind: str, default: str) -> None:
    """Where results go, a ``FILE`` or a ``DIR``; :func:`result` and :func:`fastrope.outputs.check_report` check it."""
    add("--out", type=file_path, metavar=kind, help=f"where to write (default: {default})")
    add("--force", action="store_true", help="replace files that no option names, such as the record beside a picture")


def result(options: argparse.Namespace, default: str) -> Path:
    """Where the picture goes, once it is known that it and the files beside it can be written.

    Raises:
        ValueError: naming the option.
    """
    out = options.out or Path(default)
    check_format("--out", out)
    beside = [out.with_suffix(".json"), *([plain_path(out)] if getattr(options, "plain", False) else [])]
    named = [] if options.out is None else [out]
    check_files("--out", named, beside if named else [out, *beside], options.force)
    return out


def plain_path(path: Path) -> Path:
    """Where the picture goes that is drawn without the method."""
    return path.with_stem(f"{path.stem}-plain")


def add_run_options(add: Callable, steps: str, guidance: str) -> None:
    """Options of a run of a pipeline; ``steps`` and ``guidance`` say their defaults."""
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--steps", type=int, help=f"(default: {steps}, tiny 16)")
    add("--guidance", type=float, help=f"(default: {guidance})")
    add("--negative-prompt", help="(default: one space on Qwen, else none)")
    add("--layers", type=layer_range, metavar="FIRST-LAST", help="attention layers the method acts in (default: all)")
    add_machine_options(add)
    add("--offload", action="store_true", help="keep on the GPU only the part that runs")


def add_machine_options(add: Callable) -> None:
    """Device and dtype; :func:`machine` reads them."""
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, help="(default: bfloat16 on cuda, else float32)")


def layer_range(text: str) -> range:
    """``FIRST-LAST`` on the command line, both included."""
    first, _, last = text.partition("-")
    try:
        found = range(int(first), int(last or first) + 1)
    except ValueError:
        found = range(0)
    if len(found) == 0:
        raise argparse.ArgumentTypeError(f"expected FIRST-LAST, received {text!r}")
    return found


def check_numbers(options: argparse.Namespace) -> None:
    """Require numbers that a run can be made with, of the options there are.

    Raises:
        ValueError: naming the option.
    """
    rules = {
        ("seed", "reference_seed"): (lambda x: -(2**63) <= x < 2**64, "a number of 64 bits"),
        ("steps", "height", "width"): (lambda x: x >= 1, "at least 1"),
        ("guidance",): (math.isfinite, "a finite number"),
    }
    for names, (fits, expected) in rules.items():
        for name in names:
            value = getattr(options, name, None)
            require(value is None or fits(value), flag(name), expected, value)


# ---- machine and record ----------------------------------------------------------------------------------------------


def machine(options: argparse.Namespace, kinds: Sequence[str] | None = None) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype to compute with.

    Args:
        kinds: of device that will do; None: all.

    Raises:
        ValueError: a device of another kind or one that torch cannot use, or ``--offload`` from the CPU.
    """
    device = find_device(options.device, kinds)
    offload = getattr(options, "offload", False)
    require(not offload or device.type != "cpu", "--offload", "a GPU to keep parts on", device)
    return device, getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def find_device(name: str | None, kinds: Sequence[str] | None = None) -> torch.device:
    """The device of that name; by default CUDA where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if kinds is not None:
            require(device.type in kinds, "--device", " or ".join(kinds), name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device: {str(error).splitlines()[0]}") from None
    return device


def name_of(dtype: torch.dtype) -> str:
    """``"bfloat16"`` and the like."""
    return str(dtype).removeprefix("torch.")


def record(path: Path, options: argparse.Namespace, **found: object) -> Path:
    """Write, beside the result ``path``, how it was made: the options, and over them what a run ``found``."""
    told = {name: value for name, value in vars(options).items() if name not in ("out", "force")}
    return write_record(path.with_suffix(".json"), told | found)
