"""Published checkpoints: reading them, and loading their tensors into a model without a second copy."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import nn

from fastrope.checks import require

CONTAINERS = ("model", "module", "state_dict", "ema")  # keys of the weights in published files; the first one counts
WRAPPERS = ("module.", "_orig_mod.")  # prefixes from DistributedDataParallel and torch.compile
# Tables and counters in some files that nothing reads.
IGNORED = ("freqs_cis", "causal_mask", "quantize.codebook_used")


def read_checkpoint(source: str | Path | Mapping) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint, with names free of wrappers' prefixes.

    Args:
        source: a ``.pt`` / ``.pth`` / ``.bin`` file, a ``.safetensors`` file, or the content of one: a state dict, or a
            dict with the state dict under "model", "module", "state_dict" or "ema".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no state dict, or objects that could run code on loading.
    """
    if not isinstance(source, Mapping):
        source = _load(Path(source))
    for name in CONTAINERS:
        if isinstance(source, Mapping) and isinstance(source.get(name), Mapping):
            source = source[name]
            break
    found = isinstance(source, Mapping) and source and all(isinstance(v, torch.Tensor) for v in source.values())
    received = f"keys {sorted(map(str, source))[:5]}" if isinstance(source, Mapping) else type(source).__name__
    require(bool(found), "checkpoint", f"a state dict, or one under {', '.join(CONTAINERS)}", received)
    return {_unwrapped(name): tensor for name, tensor in cast(Mapping[str, torch.Tensor], source).items()}


Model = TypeVar("Model", bound=nn.Module)


def load_weights(model: Model, weights: Mapping[str, torch.Tensor]) -> Model:
    """Make ``weights`` the parameters of ``model`` (which may be on the meta device), and set evaluation mode.

    Raises:
        ValueError: a list of missing names, unknown names and wrong shapes.
    """
    expected = model.state_dict()
    weights = {name: tensor for name, tensor in weights.items() if name not in IGNORED}
    problems = [f"no {name}" for name in expected if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in expected]
    problems += [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    received = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
    require(not problems, "weights", f"the names and shapes of a {type(model).__name__}", received)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _load(path: Path) -> Mapping:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file as load
    else:
        load = _load_pickle
    try:
        return load(path)
    except Exception as error:  # a broken file can make a reader raise anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint: expected a file of tensors, received {path} ({first})") from error


def _load_pickle(path: Path) -> Mapping:
    # Besides tensors, files of the training script hold its command line.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
