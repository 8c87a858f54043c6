"""``fastrope ar-edit``: edit an autoregressive image by changing its prompt, and see which tokens moved."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .. import ISLock, __version__
from ..checks import require
from ..extras import require_packages
from ..outputs import check_report, write_text
from ..pictures import open_picture
from . import ar_hosts
from .running import TINY, add_machine_options, add_out, command, file_path, machine, name_of

MODELS = ("llamagen", "emu3", "janus", "tiny")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.prompt is None and options.image is None:
        parser.error("--prompt (the original is generated) or --image (it is a picture) is needed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrope ar-edit",
        description="Edit an autoregressive image by changing its prompt, keeping its structure (ISLock).",
    )
    add = parser.add_argument
    add("--model", required=True, choices=MODELS, help="tiny has random weights and needs no download")
    add("--prompt", help="of the original; not needed with --image")
    add("--edit-prompt", required=True, action="append", metavar="PROMPT", help="once for every edit")
    add("--image", type=file_path, help="a picture to edit, instead of an original generated from --prompt")
    add_out(add, "DIR", "ar-edit")
    add("--candidates", type=int, help=f"K, tokens drawn at the first position (default: {_told('candidates')})")
    add("--alpha", type=float, default=0.6, help="how much of the window is gone at the end (default: 0.6)")
    add("--tau", type=float, help="largest distance accepted, inf too; larger: closer to the original (default: 1)")
    add("--metric", choices=("l2", "cosine"), default="l2", help="of the codebook space (default: l2, squared)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--plain", action="store_true", help="also draw the edit prompts without anchors, for comparison")
    add("--weights", help="llamagen: its .pt file; emu3, janus: model id or folder")
    add("--tokenizer", help="llamagen: the .pt file of its VQ tokenizer")
    add("--text-encoder", help="llamagen: T5 encoder, id or folder (default: google/flan-t5-xl)")
    add("--negative-prompt", default="lowres, blurry, worst quality", help="emu3: what guidance leads away from")
    sizes = "llamagen 32, or 16 for a file ..._256.pt; emu3 90; tiny 12; janus has one"
    add("--size", type=int, help=f"tokens per side (default: {sizes})")
    add("--guidance", type=float, help=f"scale of classifier-free guidance (default: {_told('guidance')})")
    add("--temperature", type=float, default=1.0, help="above 0 (default: 1); --top-k 1 is greedy")
    add("--top-k", type=int, help=f"0 keeps all (default: {_told('top_k')})")
    add("--top-p", type=float, default=1.0, help="1 keeps all (default: 1)")
    add_machine_options(add)
    return parser


def _told(name: str) -> str:
    """The defaults of all models, for people."""
    return ", ".join(f"{model} {getattr(ar_hosts.DEFAULTS[model], name):g}" for model in MODELS)


def _run(arguments: argparse.Namespace) -> list[Path]:
    """Write the original, the edits, ``record.json``, and the report, whose paths are given."""
    hosts = () if arguments.model == TINY else ("transformers",)
    require_packages(*hosts, "matplotlib", "PIL", "tqdm")
    from . import ar_report

    device, dtype = machine(arguments, kinds=("cpu", "cuda"))
    out = arguments.out or Path("ar-edit")
    check_report("--out", out, ["record.json", *ar_report.names(len(arguments.edit_prompt))], arguments.force)
    defaults = ar_hosts.DEFAULTS[arguments.model]
    lock = ISLock(
        candidates=defaults.candidates if arguments.candidates is None else arguments.candidates,
        alpha=arguments.alpha,
        tau=defaults.tau if arguments.tau is None else arguments.tau,
        metric=arguments.metric,
    )
    picture = None if arguments.image is None else open_picture("--image", arguments.image)
    host = ar_hosts.build(arguments, device, dtype)
    entries, ids = host.codebook()
    matcher = lock.matcher(entries, num_tokens=host.grid[0] * host.grid[1], token_ids=ids)
    # One source for all runs, so that original and edits draw independently of each other.
    generator = torch.Generator().manual_seed(arguments.seed)
    if picture is not None:
        anchors, source = host.encode(picture), "picture"
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
            f"{name_of(dtype)}, which gives no probabilities at {empty} token(s)")  # fmt: skip
    edits = host.decode(made.tokens)
    finite = all(bool(x.isfinite().all()) for x in (original, edits, plain) if x is not None)
    require(finite, "--dtype", "one in which pixels are numbers", f"{name_of(dtype)}, in which some are not")
    conditions = (
        f"model {host.name}, device {device}, {name_of(dtype)}, {host.sampling}, "
        f"seed {arguments.seed}, torch {torch.__version__}, fastrope {__version__}"
    )
    record = {
        "lock": {name: getattr(lock, name) for name in ("candidates", "alpha", "tau", "metric")},
        "conditions": conditions, "grid": list(host.grid), "prompt": arguments.prompt, "edit_prompts": prompts,
        "counts": made.record.counts(), "tokens": made.tokens.tolist(), "anchors": made.record.anchors.tolist(),
        "distance": made.record.distance.tolist(), "window": made.record.window.tolist(),
        "accepted": made.record.accepted.tolist(),
    }  # fmt: skip
    write_text(out / "record.json", json.dumps(record))
    run = ar_report.Run(
        lock=lock, grid=host.grid, record=made.record, source=source, prompt=arguments.prompt, edit_prompts=prompts,
        original=original, edits=edits, plain=plain, conditions=conditions,
    )  # fmt: skip
    return ar_report.write(run, out)


main = command(_parser, _run, _check)
