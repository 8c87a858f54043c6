"""The command line: ``fastrope doctor | demo | bench | draw | edit | style | sweep | comfyui | ar-edit | evidence``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from . import __version__
from .extras import MissingExtra, install


class Command(NamedTuple):
    """The module of a command, what it does, the extra that it needs, and options that save memory."""

    module: str
    help: str
    extra: str = "demo"
    smaller: str = "--offload, --dtype bfloat16 or a smaller picture"


COMMANDS = {
    "doctor": Command("fastrope.doctor", "what is installed, which backend would run and why, and a self-check"),
    "demo": Command("fastrope.demo", "the methods at work on small trained models", smaller="--quick or --device cpu"),
    "bench": Command("fastrope.bench", "time the backends against other implementations", "bench", "--workload tiny"),
    "draw": Command("fastrope.commands.draw", "draw a prompt: weights of words, regions, negative prompts, sizes"),
    "edit": Command("fastrope.commands.edit", "edit a picture: GRAG, LooseRoPE, strength, regions and others"),
    "style": Command("fastrope.commands.style", "draw in the style of a picture (Untwisting RoPE)"),
    "sweep": Command("fastrope.commands.sweep", "a contact sheet of style over s_hf and s_lf"),
    "comfyui": Command("fastrope.commands.comfyui", "put the nodes into a ComfyUI, or into a zip"),
    "ar-edit": Command("fastrope.commands.ar_edit", "edit an autoregressive image by changing its prompt",
                       smaller="--dtype bfloat16, a smaller --size or fewer --edit-prompt"),
    "evidence": Command("fastrope.commands.evidence", "measure the methods on small trained models, write it up",
                        smaller="--quick"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. An error that the user can mend becomes one line on stderr.

    Args:
        argv: arguments without the program's name; None means those of the process.

    Returns:
        The exit code: 0 fine; 1 a check of ``doctor``, ``demo`` or ``bench`` failed; 2 wrong usage, or the command
        cannot run here; 130 interrupted; 141 the reader of the output has closed its pipe.

    Raises:
        Exception: any other error, which is a fault of this package or of one that it uses.
    """
    name = ""
    with _any_character(sys.stdout), _any_character(sys.stderr):
        try:
            try:
                parser = _parser()
                arguments, rest = parser.parse_known_args(argv)
                name = arguments.command
                return _load(COMMANDS[name].module)(rest) or 0
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except BaseException as error:
            found = _advice(error, name)
            if found is None:
                raise
            code, line = found
            if isinstance(error, OSError):
                _leave_stdout()
            if line:
                print(" ".join(filter(None, ("fastrope", name))) + f": {line}", file=sys.stderr)
            return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastrope", description="Attention with first-class modulations.")
    parser.add_argument("--version", action="version", version=f"fastrope {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():  # commands parse their own arguments, and only the chosen one is imported
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


def _load(module: str):
    run = getattr(importlib.import_module(module), "main", None)
    if run is None:  # an empty folder imports as a namespace package
        raise ImportError(f"this installation has no {module}.main")
    return run


def _advice(error: BaseException, name: str) -> tuple[int, str] | None:
    """The exit code of an error and the line for the user; None for an error that the user cannot mend."""
    if isinstance(error, BrokenPipeError):
        return 141, ""  # the shell's code for a program that SIGPIPE ends
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    if _out_of_memory(error):
        return 2, f"out of memory; {COMMANDS[name].smaller} takes less ({line})"
    if isinstance(error, ModuleNotFoundError) and not isinstance(error, MissingExtra):
        module = COMMANDS[name].module
        if error.name == module:
            return 2, f"this installation has no module {module}"
        if error.name is None or error.name.partition(".")[0] == "fastrope":
            return None
        return 2, f"{error.name} is not installed: {install([error.name], others=COMMANDS[name].extra)}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return 2, f"{error.filename}: {error.strerror}"
    return (2, line) if isinstance(error, (ImportError, OSError, ValueError, NotImplementedError)) else None


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    said = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in said)


@contextlib.contextmanager
def _any_character(stream: Any) -> Iterator[None]:
    """Characters that the terminal's encoding lacks are written as escapes."""
    before = getattr(stream, "errors", None)
    if before is None or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=before)


def _leave_stdout() -> None:
    """If stdout cannot be written to, drop the rest of its buffer, so that it does not raise again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, ValueError):
        pass


if __name__ == "__main__":
    sys.exit(main())
