"""From a transformer's arguments to its joint sequence. There is one reader per form of the arguments.

A reader has two halves. ``identify`` picks the arguments that determine the sequence, without reading values of
tensors. ``describe`` turns them into a :class:`JointSequence`, once for every distinct content.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch

import fastrope as fr
from fastrope.checks import require, require_tensor

from ..image.sequence import JointSequence

Call = Mapping[str, Any]  # the arguments of a transformer's forward, by name


def device_of(hidden: Any) -> torch.device:
    """Device of a tensor, or of the first tensor in a list."""
    first: Any = hidden[0] if isinstance(hidden, (list, tuple)) and hidden else hidden
    require(isinstance(first, torch.Tensor), "transformer", "a call with its image tokens", type(hidden).__name__)
    return first.device


def refuse_tracing() -> None:
    """Refuse export and tracing, because the result would contain the modulations of one call for good.

    Raises:
        NotImplementedError: under ``torch.export`` or ``torch.jit.trace``.
    """
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] (documented all the same)
    for name, on in (("torch.export", torch.compiler.is_exporting()), ("torch.jit.trace", tracing)):
        if on:
            raise NotImplementedError(f"{name}: expected a transformer without a bound fastrope handle, received one "
                                      "with it; call handle.remove() before exporting it")  # fmt: skip


# ---- position ids as arguments: FLUX.1 and related hosts, FLUX.2 ---------------------------------------------------


def identify_ids(model: Any, call: Call) -> tuple:
    """``txt_ids`` and ``img_ids``."""
    found = []
    for name in ("txt_ids", "img_ids"):
        ids = call.get(name)
        require_tensor(name, ids, (2, 3), "(tokens, axes)")
        found.append(ids)
    text, image = found
    require(text.shape[-1] == image.shape[-1], "txt_ids", f"{image.shape[-1]} axes, as img_ids", tuple(text.shape))
    return text, image


def identify_masked_ids(model: Any, call: Call) -> tuple:
    """The ids, and ``attention_mask (B, S)`` over the joint sequence (Chroma)."""
    mask = call.get("attention_mask")
    if mask is not None:
        require_tensor("attention_mask", mask, (2,), "(B, S)")
    return *identify_ids(model, call), mask


def describe_ids(text: torch.Tensor, image: torch.Tensor, mask: torch.Tensor | None = None) -> JointSequence:
    """Text first, then the grids that the image ids list, the first of them the target."""
    # Float64 before anything is computed, because hosts pass ids in the dtype of the model. If every row has ids, the
    # host takes those of the first row for all.
    text, image = (x.detach().cpu().double().reshape(-1, *x.shape[-2:])[0] for x in (text, image))

    def layout() -> fr.TokenLayout:
        grids = read_grids(image, (1, 2))
        return fr.TokenLayout(len(text), grids[0], grids[1:])

    positions = torch.cat([text, image])
    if mask is None:
        return JointSequence(positions, layout)
    held = mask.detach().to("cpu", torch.bool, copy=True)  # the caller may write to the mask later
    if not mask.is_floating_point():
        return JointSequence(positions, layout, key_mask=held)
    # Chroma's pipelines pass zeros and ones in the dtype of the model, and torch adds these to the logits.
    require(torch.equal(held.to(mask.dtype), mask.detach().cpu()), "attention_mask", "zeros and ones", mask)
    return JointSequence(positions, layout, bonus=held)


# ---- image shapes as arguments: Qwen-Image and its editors ---------------------------------------------------------


def identify_shapes(model: Any, call: Call) -> tuple:
    """``img_shapes``, the length of the text and its mask."""
    if getattr(model.config, "use_layer3d_rope", False):
        raise NotImplementedError("use_layer3d_rope: expected a Qwen-Image without it, received a layered one")
    shapes, text = call.get("img_shapes"), call.get("encoder_hidden_states")
    require(isinstance(shapes, (list, tuple)) and len(shapes) > 0, "img_shapes", "a list of (1, rows, columns)", shapes)
    require_tensor("encoder_hidden_states", text, (3,), "(B, S_text, C)")
    first = shapes[0] if isinstance(shapes, list) else shapes  # the host takes the first row for all
    first = first if isinstance(first, list) else [first]
    images = tuple(tuple(int(n) for n in image) for image in first)
    return images, text.shape[1], call.get("encoder_hidden_states_mask")


def describe_shapes(images: tuple, text: int, mask: torch.Tensor | None) -> JointSequence:
    """Text first, the target's grid, then one grid per reference."""
    for image in images:
        require(len(image) == 3 and image[0] == 1, "img_shapes", "(1, rows, columns) per image", image)
    grids = [image[1:] for image in images]
    layout = fr.TokenLayout(text, grids[0], grids[1:])
    keys = None
    if mask is not None:
        mask = mask.detach().cpu().bool()
        keys = torch.cat([mask, mask.new_ones(len(mask), len(layout) - text)], dim=1)
    return JointSequence(layout.positions("qwen", "cpu"), lambda: layout, keys)


# ---- lists of pictures and captions as arguments: Z-Image ----------------------------------------------------------

ROUNDED = 32  # the host pads captions and pictures to a multiple of this


def identify_lists(model: Any, call: Call) -> tuple:
    """Shapes of the pictures, lengths of the captions, patch sizes."""
    pictures, captions = call.get("x"), call.get("cap_feats")
    basic = isinstance(pictures, (list, tuple)) and all(isinstance(x, torch.Tensor) for x in pictures)
    if not basic or not all(isinstance(c, torch.Tensor) for c in captions):
        raise NotImplementedError("x: expected one picture per row, received lists of them (the omni mode of Z-Image)")
    patch = call.get("patch_size", 2), call.get("f_patch_size", 1)
    return tuple(tuple(x.shape) for x in pictures), tuple(len(c) for c in captions), patch


def describe_lists(pictures: tuple, captions: tuple, patch: tuple[int, int]) -> JointSequence:
    """Target first, then the caption. Rows with shorter captions end in masked padding, which the layout counts as
    text."""
    if len(set(pictures)) > 1:
        raise NotImplementedError(f"x: expected pictures of one size in a modulated batch, received {set(pictures)}")
    _, frames, height, width = pictures[0]
    require(frames == patch[1], "x", f"{patch[1]} frame(s) per picture", frames)
    grid = height // patch[0], width // patch[0]
    padding = -math.prod(grid) % ROUNDED
    texts = [length + -length % ROUNDED for length in captions]
    rows = [fr.TokenLayout(text, grid, order="text-last", padding=padding) for text in texts]
    longest = max(rows, key=len)
    if len(set(texts)) == 1:
        return JointSequence(longest.positions("z-image", "cpu"), lambda: longest)
    positions = torch.zeros(len(rows), len(longest), 3, dtype=torch.int64, device="cpu")
    keys = torch.zeros(len(rows), len(longest), dtype=torch.bool, device="cpu")
    for n, row in enumerate(rows):
        positions[n, : len(row)] = row.positions("z-image", "cpu")
        keys[n, : len(row)] = True
    return JointSequence(positions, lambda: longest, keys)


# ---- grids ---------------------------------------------------------------------------------------------------------


def read_grids(ids: torch.Tensor, spatial_axes: tuple[int, ...]) -> list[tuple[int, int]]:
    """``(rows, columns)`` of the raster grids in ``ids (tokens, axes)``, one after another.

    A grid ends where rows stop counting up, where their width changes, or where an axis changes that is not spatial.

    Raises:
        ValueError: ids that are not one raster grid after another.
    """
    row_axis, column_axis = spatial_axes
    frames = [axis for axis in range(ids.shape[1]) if axis not in spatial_axes]
    along, down = torch.zeros(2, ids.shape[1], dtype=ids.dtype, device=ids.device)
    along[column_axis] = down[row_axis] = 1
    ends = (ids.diff(dim=0) != along).any(dim=1).nonzero().flatten() + 1
    bounds = [0, *ends.tolist(), len(ids)]
    grids: list[tuple[int, int]] = []
    first = previous = 0  # first tokens of the current grid and of the row before
    for start, stop in itertools.pairwise(bounds):
        width = stop - start
        if grids and grids[-1][1] == width and torch.equal(ids[start] - ids[previous], down):
            grids[-1] = grids[-1][0] + 1, width
        else:
            # Half precision breaks grids of more than 256 tokens a side into pieces, which do not begin at the origin.
            whole = not torch.equal(ids[start, frames], ids[first, frames]) or torch.equal(ids[start], ids[first])
            require(whole, "img_ids", "raster grids one after another, row by row", f"a break at token {start}")
            grids.append((1, width))
            first = start
        previous = start
    return grids
