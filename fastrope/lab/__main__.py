"""Make the models of the lab again, or better: train, export, evaluate. README.md beside this file says how."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import digits
from .evaluation import evaluate
from .models import JOBS, export, load
from .training import Run, train


def main() -> None:
    """Run a command: train, export, evaluate or digits."""
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.run(args)


def _train(args) -> None:
    options = {name: getattr(args, name) for name in ("minutes", "anneal", "device", "seed", "compile")}
    train(JOBS[args.model], args.folder, **options)


def _export(args) -> None:
    run = Run(JOBS[args.model], seed=args.seed)
    run.resume(args.folder / f"{args.model}{'-annealed' if args.annealed else ''}.pt")
    print(export(run, args.to))


def _evaluate(args) -> None:
    models = {"classifier": load("classifier")} | {name: load(name, args.weights) for name in args.models}
    found = evaluate(models, args.count, args.steps, args.guidance)
    for name, outcomes in found.items():
        print(f"{name:20}", *(f"{what} {values.float().mean():.4f}" for what, values in outcomes.items()), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastrope.lab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--threads", type=int, default=2)
        sub.set_defaults(run=run)
        return sub

    def checkpoints(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("model", choices=JOBS)
        sub.add_argument("--folder", type=Path, default=Path("lab"), help="checkpoints and loss curves (%(default)s)")
        sub.add_argument("--seed", type=int, default=0)

    sub = command(_train, "train", "train a model from where its checkpoint stands")
    checkpoints(sub)
    sub.add_argument("--minutes", type=float, default=30, help="stop after (%(default)s); call again to go on")
    sub.add_argument("--anneal", type=int, default=0, metavar="STEPS", help="lower the rate to zero, then stop")
    sub.add_argument("--device", default="cpu")
    sub.add_argument("--compile", action="store_true", help="slow at first, then 1.5 times as fast on a CPU")

    sub = command(_export, "export", "write the weights of a checkpoint")
    checkpoints(sub)
    sub.add_argument("--annealed", action="store_true", help="the checkpoint that --anneal wrote")
    sub.add_argument("--to", type=Path, default=digits.WEIGHTS, help="folder (the package's own)")

    sub = command(_evaluate, "evaluate", "success on held-out prompts and pictures")
    sub.add_argument("models", nargs="*", default=["editor", "author"], metavar="MODEL", help="editor, author (both)")
    sub.add_argument("--weights", type=Path, default=digits.WEIGHTS, help="folder (the package's own)")
    sub.add_argument("--count", type=int, default=500, help="pictures per task (%(default)s)")
    sub.add_argument("--steps", type=int, default=16, help="denoising steps of the editor (%(default)s)")
    sub.add_argument("--guidance", type=float, default=1.0, help="guidance scale of both models (%(default)s)")

    command(lambda args: digits.store(), "digits", "write digits.safetensors from scikit-learn")
    return parser


if __name__ == "__main__":
    main()
