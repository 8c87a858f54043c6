"""``fastrope ar-edit``: edit an autoregressive image by changing its prompt, and see which tokens moved."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import ISLock
from ..checks import require
from ..extras import require_packages
from ..figures import BLUE, ORANGE, PINK, Cell, sheet, short
from ..outputs import check_report, write_picture
from ..pictures import open_picture, to_picture
from . import ar_hosts
from .running import TINY, add_machine_options, add_out, command, file_path, flag, given, machine, name_of, record
from .words import understand

MODELS = tuple(ar_hosts.DEFAULTS)
LOCK = ("candidates", "alpha", "tau", "metric")
CLASSES = {"kept": BLUE, "moved": ORANGE, "fallback": PINK}  # of tokens, and their colours on the map
TINY_PROMPT, TINY_EDIT = "a red 3 on white", "a red 3 on yellow"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrope ar-edit",
        description="Edit an autoregressive image by changing its prompt, keeping its structure (ISLock).",
    )
    add = parser.add_argument
    add("--model", required=True, choices=MODELS, help="tiny is trained on digits of 16 x 16 pixels, offline")
    add("--prompt", help=f'of the original; not needed with --image (default of tiny: "{TINY_PROMPT}")')
    add("--edit-prompt", action="append", metavar="PROMPT",
        help=f'once for every edit (default of tiny: "{TINY_EDIT}")')  # fmt: skip
    add("--image", type=file_path, help="a picture to edit, instead of an original generated from --prompt")
    add_out(add, "DIR", "ar-edit")
    add("--candidates", type=int, help=f"K, tokens drawn at the first position (default: {_defaults('candidates')})")
    add("--alpha", type=float, default=0.6, help="how far the window shrinks to the end, 0 to 1 (default: 0.6)")
    add("--tau", type=float, help="largest distance accepted, inf too; larger: closer to the original (default: "
        f"{_defaults('tau')})")  # fmt: skip
    add("--metric", choices=("l2", "cosine"), default="l2", help="of the codebook space (default: l2, squared)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--plain", action="store_true", help="also draw the edit prompts without anchors, for comparison")
    add("--weights", help="llamagen: its .pt file; emu3, janus: model id or folder")
    add("--tokenizer", help="llamagen: the .pt file of its VQ tokenizer")
    add("--text-encoder", help="llamagen: T5 encoder, id or folder (default: google/flan-t5-xl)")
    add("--negative-prompt", default="lowres, blurry, worst quality", help="emu3: what guidance leads away from")
    sizes = "llamagen 32, or 16 for a file ..._256.pt; emu3 90; janus and tiny have one"
    add("--size", type=int, help=f"tokens per side (default: {sizes})")
    add("--guidance", type=float, help=f"scale of classifier-free guidance (default: {_defaults('guidance')})")
    add("--temperature", type=float, default=1.0, help="above 0 (default: 1); --top-k 1 is greedy")
    add("--top-k", type=int, help=f"0 keeps all (default: {_defaults('top_k')})")
    add("--top-p", type=float, default=1.0, help="1 keeps all (default: 1)")
    add_machine_options(add)
    return parser


def _defaults(name: str) -> str:
    """The defaults of all models, for ``--help``."""
    return ", ".join(f"{model} {getattr(ar_hosts.DEFAULTS[model], name):g}" for model in MODELS)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.model == TINY:
        options.prompt = options.prompt or (TINY_PROMPT if options.image is None else None)
        options.edit_prompt = options.edit_prompt or [TINY_EDIT]
        prompts = {"prompt": [options.prompt or ""], "edit_prompt": options.edit_prompt}
        for name, texts in prompts.items():
            for text in texts:
                understand(flag(name), text, editing=False)
    if options.prompt is None and options.image is None:
        parser.error("--prompt (the original is generated) or --image (it is a picture) is needed")
    if options.edit_prompt is None:
        parser.error("--edit-prompt is needed, for every model but tiny")


def _run(options: argparse.Namespace) -> list[Path]:
    """Write the original, the edits, a sheet of both with maps of what happened to each token, and ``record.json``."""
    hosts = ("diffusers",) if options.model == TINY else ("transformers",)
    require_packages(*hosts, "matplotlib", "PIL", "tqdm")
    device, dtype = machine(options, kinds=("cpu", "cuda"))
    out, prompts = options.out or Path("ar-edit"), options.edit_prompt
    names = ["sheet.png", "original.png", *(f"edit-{row}.png" for row in range(len(prompts)))]
    check_report("--out", out, ["record.json", *names], options.force)
    dials = vars(ar_hosts.DEFAULTS[options.model]) | given(options, *LOCK)
    lock = ISLock(**{name: dials[name] for name in LOCK})
    picture = None if options.image is None else open_picture("--image", options.image)
    host = ar_hosts.build(options, device, dtype)
    matcher = lock.matcher(host.codebook, num_tokens=host.grid[0] * host.grid[1], token_ids=host.ids)
    # One source for all runs, so that original and edits draw independently of each other.
    generator = torch.Generator().manual_seed(options.seed)
    if picture is None:
        anchors = host.run([options.prompt], "original", generator=generator).tokens
    else:
        anchors = host.encode(picture)
    shown = {"original": host.decode(anchors)}
    if options.plain:
        shown["plain"] = host.decode(host.run(prompts, "without anchors", generator=generator).tokens)
    made = host.run(prompts, "edit", generator=generator, matcher=matcher, anchors=anchors)
    # Every anchor is a token of the model, so only logits that are not numbers leave nothing to draw.
    empty = int(made.record.free.sum())
    require(empty == 0, "--dtype", "one in which the model's logits are numbers",
            f"{name_of(dtype)}, which gives no probabilities at {empty} token(s)")  # fmt: skip
    shown["edit"] = host.decode(made.tokens)
    finite = all(bool(x.isfinite().all()) for x in shown.values())
    require(finite, "--dtype", "one in which pixels are numbers", f"{name_of(dtype)}, in which some are not")
    pictures = {name: [to_picture(name, x) for x in pixels] for name, pixels in shown.items()}
    files = dict(zip(names, [draw(options, lock, host, made, pictures), *pictures["original"], *pictures["edit"]],
                     strict=True))  # fmt: skip
    lists = {name: getattr(made.record, name).tolist() for name in ("anchors", "distance", "window", "accepted")}
    description = record(
        out / "record.json", options, lock={name: getattr(lock, name) for name in LOCK}, host=host.name, grid=host.grid,
        device=device, dtype=dtype, counts=made.record.counts(), tokens=made.tokens.tolist(), **lists,
    )  # fmt: skip
    return [description, *(write_picture(out / name, made) for name, made in files.items())]


def draw(options: argparse.Namespace, lock: ISLock, host: ar_hosts.Host, made, pictures: dict[str, list]):
    """The sheet: the original and the edits, with ``--plain`` also without anchors, and a map of tokens per edit."""
    title = "original" if options.image is not None else short(options.prompt)
    edits = [Cell(x, short(prompt)) for x, prompt in zip(pictures["edit"], options.edit_prompt, strict=True)]
    rows = [[Cell(pictures["original"][0], title), *edits]]
    if options.plain:
        rows.append([None, *(Cell(x, "without anchors") for x in pictures["plain"])])
    rows.append([None, *(Cell(token_map(made.record, row, host.grid), below=_counts(made.record, row))
                         for row in range(len(edits)))])  # fmt: skip
    rule = f"K {lock.candidates}, alpha {lock.alpha:g}, tau {lock.tau:g}, metric {lock.metric}"
    return sheet(rows, f"{host.name}, {rule}, seed {options.seed}. Blue: kept, orange: moved, pink: fallback", side=2.6)


def token_map(record, row: int, grid: tuple[int, int]):
    """A PIL picture with a square for each token of an edit, in the colour of its class."""
    from PIL import Image, ImageColor

    picture = Image.new("RGB", grid[::-1])
    for name, colour in CLASSES.items():
        inside = getattr(record, name)[row].view(grid).cpu().byte() * 255
        picture.paste(ImageColor.getrgb(colour), mask=Image.fromarray(inside.numpy()))
    return picture


def _counts(record, row: int) -> str:
    finite = record.distance[row][record.distance[row].isfinite()]
    median = f"{float(finite.median()):.3g}" if len(finite) else "none"
    counts = ", ".join(f"{name} {record.counts()[name][row]}" for name in CLASSES)
    return f"{counts}\nmedian distance {median}"


main = command(_parser, _run, _check)
