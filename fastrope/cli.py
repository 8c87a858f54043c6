"""The command line: ``fastrope doctor | demo | bench | edit | style | sweep | ar-edit``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__
from .extras import MissingExtra, install

# Others are named as they are.
MODULES = {name: f"fastrope.commands.{name.replace('-', '_')}" for name in ("edit", "style", "sweep", "ar-edit")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0 fine, 1 the self-check of ``doctor`` failed, 2 the command cannot run here.
    """
    parser = argparse.ArgumentParser(prog="fastrope", description="Attention with first-class modulations.")
    parser.add_argument("--version", action="version", version=f"fastrope {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is installed, which backend would run and why, and a self-check")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    # These parse their own arguments, --help included, and are imported only when asked for.
    commands.add_parser("demo", help="pictures of what the modulations do", add_help=False)
    commands.add_parser("bench", help="time the backends against other implementations", add_help=False)
    commands.add_parser("edit", help="edit a picture with LooseRoPE or GRAG on a diffusers pipeline", add_help=False)
    commands.add_parser("style", help="draw in the style of a picture (Untwisting RoPE)", add_help=False)
    commands.add_parser("sweep", help="a contact sheet of style over s_hf and s_lf", add_help=False)
    commands.add_parser("ar-edit", help="edit an autoregressive image by changing its prompt", add_help=False)
    args, rest = parser.parse_known_args(argv)
    if args.command == "doctor":
        if rest:
            doctor.error(f"unrecognized arguments: {' '.join(rest)}")
        from .doctor import main as run_doctor

        return run_doctor(as_json=args.json)
    return _delegate(MODULES.get(args.command, f"fastrope.{args.command}"), args.command, rest)


def _delegate(module: str, command: str, argv: list[str]) -> int:
    """Import ``module`` and run its ``main(argv)``; say what is missing if that cannot be done."""
    try:
        run = getattr(importlib.import_module(module), "main", None)
        if run is not None:  # an empty folder imports as a namespace package
            return run(argv) or 0
        problem = f"this installation has no {module}.main"
    except MissingExtra as error:
        problem = str(error)
    except ModuleNotFoundError as error:
        if error.name == module:
            problem = f"this installation has no module {module}"
        elif error.name is None or error.name.partition(".")[0] == "fastrope":
            raise
        else:
            advice = install([error.name], others="bench" if command == "bench" else "demo")
            problem = f"{error.name} is not installed: {advice}"
    print(f"fastrope {command}: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
