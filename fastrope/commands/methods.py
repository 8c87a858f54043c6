"""The methods of ``fastrope edit`` and ``fastrope draw``: what each is for, its options, how it is made and run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import (
    GRAG,
    NAG,
    HighResolution,
    LooseRoPE,
    PromptWeights,
    ReferenceStrength,
    Region,
    Regions,
    Temperature,
    apply,
)
from ..checks import require
from ..methods.front_ends import FRONT_ENDS
from ..methods.looserope import TIMINGS
from ..methods.positions import KINDS
from ..outputs import write_picture
from ..pictures import open_mask
from .pipelines import Model
from .running import TINY, file_path, flag, given, plain_path, record

SALIENCY = "spectral_residual", "mask_rcnn"  # the first is LooseRoPE.from_images's own choice
LOOSE = "boost", "levels", "timing", "saliency", "front_end"  # its arguments
SIDES = {"left": np.s_[:, :1], "right": np.s_[:, 1:], "top": np.s_[:1], "bottom": np.s_[1:]}  # of a mask of 2 x 2
TINY_TRAINED = {"trained": (8, 8)}  # tokens of the tiny model


class Entry(NamedTuple):
    """A method on the command line.

    Args:
        does: what it is for.
        make: from the options, and for LooseRoPE the pictures, the method; before a model is loaded.
        options: keywords of ``add_argument`` by option.
        needs: options that must be given.
        taken: options of a run that are not for the pipeline, but for this method.
        fit: from (method, options, model, prompt), the method on that model, and the arguments of a call that carry
            its words; None for a method without words.
        kept: attributes of the method, or else options, that a record has as dials.
    """

    does: str
    make: Callable[..., Any]
    options: Mapping[str, dict[str, Any]]
    needs: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    fit: Callable[..., tuple[Any, dict[str, object]]] | None = None
    kept: tuple[str, ...] | None = None


# ---- from options to methods -----------------------------------------------------------------------------------------


def _of(kind: type, *names: str, small: Mapping[str, object] | None = None) -> Callable[..., Any]:
    """Makes a method of the options that are called as its arguments are; ``small`` is usual for the tiny model."""

    def make(options: argparse.Namespace, *shown: object):
        told = {name: _one_or_each(value) for name, value in given(options, *names, "layers").items()}
        return kind(**{**(small or {} if options.model == TINY else {}), **told})

    return make


def _one_or_each(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 else tuple(value)


def _looserope(options: argparse.Namespace, composite, pasted: Mapping[str, object]) -> LooseRoPE:
    return LooseRoPE.from_images(composite, **pasted, **given(options, *LOOSE, "layers"))


def _prompt_weights(options: argparse.Namespace, *shown: object) -> PromptWeights:
    words = [word for word, _ in options.word]
    require(len(set(words)) == len(words), "--word", "each word once", " ".join(words))
    return PromptWeights([weight for _, weight in options.word], **given(options, "on", "layers"))


def _with_places(method: PromptWeights, options: argparse.Namespace, model: Model, prompt: str):
    found: dict[int, float] = {}
    for word, weight in options.word:
        for place in model.places(prompt, word):
            require(place not in found, "--word", "words that share no token", word)
            found[place] = weight
    call, (text,) = model.joined(("--prompt", prompt))
    return replace(method, weights=found, text_tokens=text.stop), call


def _regions(options: argparse.Namespace, *shown: object) -> Regions:
    masks = [_half(where) if where in SIDES else open_mask("--region", file_path(where)) for where, _ in options.region]
    regions = [Region(mask, text=slice(n, n + 1)) for n, mask in enumerate(masks)]
    return Regions(regions, **given(options, "local", "layers"))


def _half(side: str) -> np.ndarray:
    mask = np.zeros((2, 2), dtype=bool)
    mask[SIDES[side]] = True
    return mask


def _with_texts(method: Regions, options: argparse.Namespace, model: Model, prompt: str):
    texts = [("--region", text) for _, text in options.region]
    call, (_, *spans) = model.joined(("--prompt", prompt), *texts)
    regions = [replace(region, text=span) for region, span in zip(method.regions, spans, strict=True)]
    return replace(method, regions=regions, text_tokens=spans[-1].stop), call


def _with_negative(method: NAG, options: argparse.Namespace, model: Model, prompt: str):
    settings = model.settings
    two_passes = settings.guidance_name == "true_cfg_scale" and settings.guidance != 1
    require(not two_passes, "--guidance", "1 with nag, which is guidance in one pass", settings.guidance)
    call, (_, text) = model.joined(("--prompt", prompt), ("--negative-prompt", options.negative_prompt))
    return replace(method, negative=text.stop - text.start), call


def _levels(text: str) -> int | str:
    if text == "continuous":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected a number or "continuous", received {text!r}') from None


def _word(text: str) -> tuple[str, float]:
    word, _, weight = text.rpartition("=")
    try:
        return word, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WORD=WEIGHT, received {text!r}") from None


# ---- the table -------------------------------------------------------------------------------------------------------


def _number(text: str, **more: object) -> dict[str, Any]:
    return {"type": float, "metavar": "X", "help": text, **more}


def _each(text: str) -> dict[str, Any]:
    return _number(text, nargs="+")


_TRAINED = {"type": int, "nargs": 2, "metavar": ("ROWS", "COLUMNS"), "help": "of the training, in tokens (default: 64 "
            "64, which are 1024 x 1024 pixels; tiny 8 8)"}  # fmt: skip

METHODS = {
    "looserope": Entry(
        "blends a pasted crop into the picture", _looserope, {
            "mask": {"type": file_path, "metavar": "FILE", "help": "where the paste is, white on black or opaque on "
                     "nothing, as large as the picture"},
            "original": {"type": file_path, "metavar": "FILE", "help": "the picture before the paste, instead of a "
                         "mask"},
            "boost": _number("lower blends more, higher keeps more (default: 0.83)"),
            "levels": {"type": _levels, "metavar": "N", "help": 'levels of saliency, or "continuous" (default: 5)'},
            "saliency": {"choices": SALIENCY, "help": "the first needs no model, the second torchvision (default: the "
                         "first)"},
            "front_end": {"choices": FRONT_ENDS, "help": "how pictures become maps of tokens: ours, or as the authors' "
                          "code does it (default: fastrope)"},
            "timing": {"choices": TIMINGS, "help": "phases in proportion to the steps, or after steps 10, 18 and 22 "
                       "whatever their number, as published (default: scaled)"},
            "judge": {"metavar": "JUDGE", "help": 'steer the boost: "region" needs no model; or the name of a '
                      "vision-language chat model, Qwen/Qwen3-VL-4B-Instruct for one"},
            "max_tries": {"type": int, "metavar": "N", "help": "verdicts at most (default: 4)"},
        }, kept=("boost", "levels", "timing"),
    ),
    "grag": Entry(
        "follows the prompt, with a dial for how much of the picture is kept",
        _of(GRAG, "delta", "bias", "value_delta", "value_bias"), {
            "delta": _each("above 1 keeps more of the picture, below 1 edits more; 0.8 to 1.7; one for all references "
                           "or one each (default: 1.1)"),
            "bias": _each("weight of the picture against prompt and result (default: 1.0)"),
            "value_delta": _each("as delta, for the values of the picture (DCAG; default: 1.0)"),
            "value_bias": _each("as bias, likewise (default: 1.0)"),
        },
    ),
    "reference-strength": Entry(
        "weighs pictures against everything else", _of(ReferenceStrength, "weight"), {
            "weight": _each("of every token of a picture: 1 is neutral, 2 counts it twice, 0 hides it; one for all "
                            "pictures or one each"),
        }, needs=("weight",),
    ),
    "prompt-weights": Entry(
        "weighs words of the prompt", _prompt_weights, {
            "word": {"type": _word, "nargs": "+", "metavar": "WORD=WEIGHT", "help": "a word or phrase of the prompt, "
                     "and its weight: red=1.4 boat=0.8"},
            "on": {"choices": ("logits", "values"), "help": "on values, a negative weight subtracts what the word "
                   "would add (default: logits)"},
        }, needs=("word",), fit=_with_places,
    ),
    "regions": Entry(
        "gives parts of the picture prompts of their own, beside the prompt of the whole", _regions, {
            "region": {"action": "append", "nargs": 2, "metavar": ("MASK", "PROMPT"), "help": "a mask, white on black, "
                       f"or {', '.join(SIDES)} for a half, and what is seen there; again for each part"},
            "local": {"action": "store_const", "const": True, "help": "tokens of the picture see only those of their "
                      "own regions"},
        }, needs=("region",), fit=_with_texts,
    ),
    "nag": Entry(
        "gives --negative-prompt to models without guidance, such as FLUX.1",
        _of(NAG, "scale", "tau", "alpha"), {
            "scale": _number("how far away from the negative prompt (default: 5)"),
            "tau": _number("largest growth of attention's L1 norm (default: 2.5)"),
            "alpha": _number("share of the guided attention, 0 to 1 (default: 0.25)"),
        }, needs=("negative_prompt",), taken=("negative_prompt",), fit=_with_negative,
        kept=("scale", "tau", "alpha", "negative_prompt"),
    ),
    "temperature": Entry(
        "sharpens attention in pictures larger than in training",
        _of(Temperature, "trained", small=TINY_TRAINED), {"trained": _TRAINED},
    ),
    "high-resolution": Entry(
        "rescales positions for pictures larger than in training",
        _of(HighResolution, "kind", "trained", small=TINY_TRAINED), {
            "kind": {"choices": KINDS, "help": "(default: dype)"}, "trained": _TRAINED,
        },
    ),
}  # fmt: skip


# ---- in a command ----------------------------------------------------------------------------------------------------


def add_methods(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """The option ``--method``, and those of the named methods."""
    parser.add_argument("--method", required=True, choices=names, help="each has options of its own, below")
    titles = [*((name,) for name in names), *_owners(names).values()]
    groups = {
        owners: parser.add_argument_group(" and ".join(owners), METHODS[owners[0]].does if len(owners) == 1 else None)
        for owners in dict.fromkeys(titles)
    }
    for option, owners in _owners(names).items():
        keywords = next(METHODS[name].options[option] for name in owners)
        groups[owners].add_argument(flag(option), **keywords)


def check_method(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Sequence[str]) -> None:
    """End the program if an option of another method is given, or one that the method needs is not."""
    for option, owners in _owners(names).items():
        if options.method not in owners and getattr(options, option) is not None:
            parser.error(f"{flag(option)} belongs to --method {' or '.join(owners)}")
    for option in METHODS[options.method].needs:
        if getattr(options, option) is None:
            parser.error(f"{options.method} wants {flag(option)}")
    if options.method == "high-resolution" and options.layers is not None:
        parser.error("--layers is for attention; high-resolution changes positions, for all layers")


def _owners(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The methods, among the named ones, that have each option."""
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        for option in METHODS[name].options:
            found[option] = (*found.get(option, ()), name)
    return found


def drawn(options: argparse.Namespace, model: Model, method: Any, prompt: str, call: dict[str, object]):
    """The picture that the call makes under the method of the options, PIL, and the method as it is on this model."""
    fit, text = METHODS[options.method].fit, {}
    if fit is not None:
        method, text = fit(method, options, model, prompt)
    with apply(model.pipe, method):
        return model.draw(call | text, options.seed, options.method), method


def written(
    options: argparse.Namespace, out: Path, made, model: Model, method: Any, prompt: str, call: dict, **found: object
) -> list[Path]:
    """Write a picture, beside it how it was ``made``, and with ``--plain`` what the call makes without the method."""
    entry = METHODS[options.method]
    names = tuple(entry.options) if entry.kept is None else entry.kept
    dials = {name: getattr(method, name, getattr(options, name)) for name in names}
    files = [write_picture(out, made), record(out, options, dials=dials, **model.facts(prompt), **found)]
    if options.plain:
        files.append(write_picture(plain_path(out), model.draw(call, options.seed, "plain")))
    return files
