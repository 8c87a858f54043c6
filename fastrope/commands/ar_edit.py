"""``fastrope ar-edit``: edit an autoregressive image by changing its prompt, and see which tokens moved."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import ISLock, __version__
from ..checks import require

MODELS = ("llamagen", "emu3", "janus", "tiny")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the original, the edits, ``report.md``, ``report.html`` and ``record.json``.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0; 2 when the command cannot run: an argument, a package, or weights.

    Raises:
        ModuleNotFoundError: transformers is not installed, for the hosts that need it.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.prompt is None and arguments.image is None:
        parser.error("--prompt (the original is generated) or --image (it is a picture) is needed")
    from ..demo.style import MissingExtra, require_extras

    try:
        require_extras()
    except MissingExtra as error:
        return _fail(error)
    import torch

    from .ar_hosts import Missing

    threads = torch.get_num_threads()
    if arguments.model == "tiny":
        torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain
    try:
        return _run(arguments)
    except (Missing, OSError, ValueError) as error:
        return _fail(error)
    finally:
        torch.set_num_threads(threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrope ar-edit",
        description="Edit an autoregressive image by changing its prompt, keeping its structure (ISLock).",
    )
    add = parser.add_argument
    add("--model", required=True, choices=MODELS, help="tiny has random weights and needs no download")
    add("--prompt", help="of the original; not needed with --image")
    add("--edit-prompt", required=True, action="append", metavar="PROMPT", help="once for every edit")
    add("--image", type=Path, help="a picture to edit, instead of an original generated from --prompt")
    add("--out", type=Path, default=Path("ar-edit"), metavar="DIR", help="where to write (default: ar-edit)")
    add("--candidates", type=int, help="K, tokens drawn at the first position (default: that of the model)")
    add("--alpha", type=float, default=0.6, help="how much of the window is gone at the end (default: 0.6)")
    add("--tau", type=float, help="largest distance accepted, inf too; larger: closer to the original (default: 1)")
    add("--metric", choices=("l2", "cosine"), default="l2", help="of the codebook space (default: l2, squared)")
    add("--seed", type=int, default=0)
    add("--plain", action="store_true", help="also draw the edit prompts without anchors, for comparison")
    add("--weights", help="llamagen: its .pt file; emu3, janus: model id or folder")
    add("--tokenizer", help="llamagen: the .pt file of its VQ tokenizer")
    add("--text-encoder", help="llamagen: T5 encoder, id or folder (default: google/flan-t5-xl)")
    add("--negative-prompt", default="lowres, blurry, worst quality", help="emu3: what guidance leads away from")
    sizes = "llamagen 32, or 16 for a file ..._256.pt; emu3 90; tiny 12; janus has one"
    add("--size", type=int, help=f"tokens per side (default: {sizes})")
    add("--guidance", type=float, help="scale of classifier-free guidance (default: that of the model)")
    add("--temperature", type=float, default=1.0)
    add("--top-k", type=int, help="(default: that of the model)")
    add("--top-p", type=float, default=1.0)
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: bfloat16 on cuda, else float32)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from ..demo.build import choose_device
    from . import ar_hosts, ar_report

    try:
        device = choose_device(arguments.device)
    except (RuntimeError, ValueError) as error:
        raise ar_hosts.Missing(f"--device: {error}") from error
    guidance, seed, out = arguments.guidance, arguments.seed, arguments.out
    require(guidance is None or math.isfinite(guidance), "--guidance", "a finite number", guidance)
    require(-(2**63) <= seed < 2**64, "--seed", "a number of 64 bits", seed)
    require(out.is_dir() or not out.exists(), "--out", "a folder", out)
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, arguments.dtype or default)
    defaults = ar_hosts.DEFAULTS[arguments.model]
    lock = ISLock(
        candidates=defaults.candidates if arguments.candidates is None else arguments.candidates,
        alpha=arguments.alpha,
        tau=defaults.tau if arguments.tau is None else arguments.tau,
        metric=arguments.metric,
    )
    if arguments.image is not None and not arguments.image.is_file():
        raise ar_hosts.Missing(f"--image: no picture at {arguments.image}")
    host = ar_hosts.build(arguments, device, dtype)
    entries, ids = host.codebook()
    matcher = lock.matcher(entries, num_tokens=host.grid[0] * host.grid[1], token_ids=ids)
    # One source for all runs, so that original and edits draw independently of each other.
    generator = torch.Generator().manual_seed(arguments.seed)
    if arguments.image is not None:
        anchors, source = host.encode(ar_hosts.open_picture(arguments.image)), "picture"
        original = host.decode(anchors)
    else:
        made = host.generate([arguments.prompt], generator, label="original")
        anchors, source = made.tokens, "prompt"
        original = host.decode(anchors)
    prompts = arguments.edit_prompt
    plain = None
    if arguments.plain:
        plain = host.decode(host.generate(prompts, generator, label="without anchors").tokens)
    made = host.generate(prompts, generator, matcher=matcher, anchors=anchors, label="edit")
    # Every anchor is a token of the model, so only logits that are not numbers leave nothing to draw.
    empty = int(made.record.free.sum())
    require(empty == 0, "--dtype", "one in which the model's logits are numbers",
            f"{str(dtype).removeprefix('torch.')}, which gives no probabilities at {empty} token(s)")  # fmt: skip
    edits = host.decode(made.tokens)
    conditions = (
        f"model {host.name}, device {device}, {str(dtype).removeprefix('torch.')}, {host.sampling}, "
        f"seed {arguments.seed}, torch {torch.__version__}, fastrope {__version__}"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {
        "lock": {name: getattr(lock, name) for name in ("candidates", "alpha", "tau", "metric")},
        "conditions": conditions, "grid": list(host.grid), "prompt": arguments.prompt, "edit_prompts": prompts,
        "counts": made.record.counts(), "tokens": made.tokens.tolist(), "anchors": made.record.anchors.tolist(),
        "distance": made.record.distance.tolist(), "window": made.record.window.tolist(),
        "accepted": made.record.accepted.tolist(),
    }  # fmt: skip
    (arguments.out / "record.json").write_text(json.dumps(record), encoding="utf-8")
    run = ar_report.Run(
        lock=lock, grid=host.grid, record=made.record, source=source, prompt=arguments.prompt, edit_prompts=prompts,
        original=original, edits=edits, plain=plain, conditions=conditions,
    )  # fmt: skip
    for path in ar_report.write(run, arguments.out):
        print(path)
    return 0


def _fail(error: Exception) -> int:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    print(f"fastrope ar-edit: {lines[0]}", file=sys.stderr)
    return 2
