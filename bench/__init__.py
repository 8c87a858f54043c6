"""``fastrope bench``: contestants checked against the reference, then timed, one row of JSON each.

``suites`` says what is measured and in which order, ``frame`` runs it and writes the rows; of a suite ``workloads`` say
which tensors, ``cases`` which modulations, ``peers`` who computes them, each a registry that a new entry extends.
``runner`` checks and measures with the clocks of ``timing``. ``report``, ``gates``, ``page``, ``plots`` and
``compare`` turn rows into tables and pictures and know nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastrope.commands.running import file_path, find_device
from fastrope.outputs import check_folder

from .rows import RESULTS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or report rows of earlier runs.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0; 1 when a contestant was wrong or failed; 2 without rows to report; 130 when it was interrupted: the rows so
        far are kept.

    Raises:
        ValueError: names that nobody knows, a file that holds no rows, a folder that cannot be written to.
        OSError: a file that cannot be read.
    """
    options = _parser().parse_args(argv)
    if options.report is not None or options.page or options.plots:
        return _report(options)
    return _measure(options, sys.argv[1:] if argv is None else argv)


def _report(options: argparse.Namespace) -> int:
    from . import gates, page, report
    from .rows import read

    paths = options.report or sorted(RESULTS.glob("*/*.jsonl"))
    rows = [row for path in paths for row in read(path)]
    if options.page:
        page.write(options.page, rows)
    if not rows:
        print(f"fastrope bench: no rows under {RESULTS}", file=sys.stderr)
        return 0 if options.page else 2
    if options.plots:
        from . import plots

        for path in plots.draw(rows, options.plots, options.force):
            print(path)
    print(f"{report.render(rows)}\n{gates.render(rows)}")
    return 0


def _measure(options: argparse.Namespace, argv: Sequence[str]) -> int:
    import torch

    from . import compare, gates, report, suites
    from .environment import environment, slug
    from .frame import Selection, Session

    device = find_device(options.device, ("cpu", "cuda"))
    small = device.type == "cpu"
    selection = Selection(options.workload, options.case, options.peer, small, options.quick)
    tasks = suites.tasks(options.suite, selection)
    if options.against:
        with _folder(options.out) as out:
            rows, problems = compare.run(options.against, _less(argv), options.turns, out, options.budget)
        print(f"\n{compare.render(rows)}\n{_kept(rows, options.out)}")
        return _told(problems)
    dtype = getattr(torch, options.dtype or ("float32" if small else "bfloat16"))
    facts = environment(device, options.rev)
    # Timings of a CPU say nothing of the kernels and stay out of the results.
    kept, interrupted = options.out or (None if small else RESULTS / slug(facts["gpu"])), False
    with _folder(kept) as folder:
        session = Session(device, dtype, options.repeats, facts, folder, options.quick)
        if options.resume:
            done = session.measured(tasks, {session.folder, RESULTS / slug(facts["gpu"])})
            tasks = [task for task in tasks if task not in done]
            print(f"measured already: {', '.join(map(str, done)) or 'nothing'}")
        try:
            session.run(tasks, options.budget)
        except KeyboardInterrupt:
            interrupted = True
            session.problem("run", "interrupted")
    print(f"\n{report.render(session.rows)}")
    if not small:
        print(gates.render(session.rows))
    for task in session.skipped:
        print(f"skipped{', the device is lost' if session.lost else ' for the budget'}: {task}")
    print(_kept(session.rows, kept))
    code = _told(session.problems)
    return 130 if interrupted else code


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """Where rows go: a folder that can be written to, or one that lasts as long as the run."""
    if kept is not None:
        check_folder("--out", kept)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="fastrope-bench-") as folder:
        yield Path(folder)


def _kept(rows: Sequence[dict], folder: Path | None) -> str:
    return f"{len(rows)} rows in {folder}" if folder else f"{len(rows)} rows, not kept: --out FOLDER keeps them"


def _told(problems: Sequence[str]) -> int:
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


COMPARING = {"--against": 1, "--turns": 1, "--out": 1, "--budget": 1, "--rev": 1, "--resume": 0}


def _less(argv: Sequence[str]) -> list[str]:
    """Arguments less those that say what is compared, where rows go and for how long."""
    kept, skip = [], 0
    for argument in argv:
        if skip:
            skip -= 1
        elif (name := argument.partition("=")[0]) in COMPARING:
            skip = 0 if "=" in argument else COMPARING[name]
        else:
            kept.append(argument)
    return kept


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, received {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    from .suites import SUITES

    parser = argparse.ArgumentParser(
        prog="fastrope bench", allow_abbrev=False,
        description="Check every contestant against the reference in float64, then time those that pass. On a CPU a "
        "smoke test of tiny shapes.",
    )  # fmt: skip
    told = "; ".join(f"{name}: {what}" for name, what in SUITES.items())
    parser.add_argument(
        "--suite", nargs="+", action=_Suites, default=["attention"], choices=(*SUITES, "all"), metavar="NAME",
        help=f"{told}; all: every suite, what tells most first. Default: attention",
    )  # fmt: skip
    for name in ("workload", "case", "peer"):
        what = f"some of the suite's {name}s; an unknown one is answered with the list"
        parser.add_argument(f"--{name}", nargs="+", action="extend", metavar="NAME", help=what)
    parser.add_argument(
        "--out", type=file_path, metavar="FOLDER", help=f"where <suite>.jsonl are appended to ({RESULTS}/<gpu>)"
    )
    parser.add_argument("--repeats", type=_count, metavar="N", help="timed rounds (default: 50 calls, 20 steps)")
    parser.add_argument("--quick", action="store_true", help="the first workload, 10 rounds")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing that would end later")
    parser.add_argument("--resume", action="store_true", help="leave out what rows of this revision and device tell")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16, float32 on a CPU"
    )
    parser.add_argument("--rev", help="revision to record where there is no git history")
    parser.add_argument(
        "--against", metavar="REV", help="another revision, or a folder that holds one: both in turns, side by side"
    )
    parser.add_argument("--turns", type=_count, default=2, metavar="N", help="processes of each revision (default 2)")
    add = parser.add_argument
    what = "tables and bars of earlier rows instead (default: all)"
    add("--report", nargs="*", type=file_path, metavar="ROWS", help=what)
    add("--plots", type=file_path, metavar="FOLDER", help="with --report: pictures too; needs matplotlib")
    add("--force", action="store_true", help="with --plots: replace pictures that are there")
    what = "with --report: write the part of a page between its markers, such as docs/backends.md"
    add("--page", type=file_path, metavar="FILE", help=what)
    return parser


class _Suites(argparse.Action):
    """``all`` is every suite."""

    def __call__(self, parser, namespace, values, option_string=None):
        from .suites import SUITES

        names = [name for value in values for name in (SUITES if value == "all" else [value])]
        setattr(namespace, self.dest, list(dict.fromkeys(names)))
