"""The models of ComfyUI that can be steered: where their tokens lie, and where these stand.

Facts read in ComfyUI v0.33.0. A family knows the classes by their names; nothing of ComfyUI is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastrope as fr
from fastrope.checks import require

Grid = tuple[int, int]


class Call(NamedTuple):
    """What a call of a model says of its tokens: shapes and options, no tensor.

    Args:
        latent: ``(height, width)`` of the latent.
        frames: of the latent; 1 for pictures.
        text: tokens of the prompt.
        references: ``(height, width)`` of each reference latent.
        method: how the host places references; None: its default.
        rope: the host's own scale and shift of positions, as sorted pairs.
    """

    latent: Grid
    frames: int
    text: int
    references: tuple[Grid, ...] = ()
    method: str | None = None
    rope: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Call:
        """From the arguments of ``BaseModel.apply_model``.

        Raises:
            ValueError: a call without latent or prompt.
        """
        x, text = arguments.get("x"), arguments.get("c_crossattn")
        require(isinstance(x, Tensor) and x.ndim in (4, 5), "x", "a latent (B, C, H, W)", getattr(x, "shape", x))
        require(
            isinstance(text, Tensor) and text.ndim == 3, "conditioning", "(B, tokens, C)", getattr(text, "shape", text)
        )
        latents = arguments.get("ref_latents") or ()
        options = (arguments.get("transformer_options") or {}).get("rope_options") or {}
        return cls(
            (x.shape[-2], x.shape[-1]), x.shape[2] if x.ndim == 5 else 1, text.shape[1],
            tuple((each.shape[-2], each.shape[-1]) for each in latents), arguments.get("ref_latents_method"),
            tuple(sorted((name, float(value)) for name, value in options.items())),
        )  # fmt: skip


class Tokens(NamedTuple):
    """Where the tokens of a call lie: ``layout``, and ``positions (S, axes)`` in float64."""

    layout: fr.TokenLayout
    positions: Tensor


@dataclass(frozen=True)
class Family:
    """Models whose attention has one shape.

    Args:
        models: names of the classes around the transformer, and what users call them.
        transformer: name of its class.
        blocks: the lists of its blocks, in order of execution, with the host's name and ours for their kind.
        embedder: name of the module that turns positions into angles.
        describe: ``describe(transformer, call) -> Tokens``.
        patched: whether the host calls patches before it rotates queries and keys.
        rotates_last: whether such a patch may do without the rotation, by answering ``pe=None``.
        mixes_text: whether text tokens attend to each other before the blocks.
    """

    models: Mapping[str, str]
    transformer: str
    blocks: Sequence[tuple[str, str, str]]
    embedder: str
    describe: Callable[[Any, Call], Tokens]
    patched: bool
    rotates_last: bool
    mixes_text: bool = False

    def kinds(self, transformer: Any) -> tuple[str, ...]:
        """The kind of each block, in order of execution."""
        return tuple(kind for name, _, kind in self.blocks for _ in getattr(transformer, name))

    def layer(self, transformer: Any, options: Mapping[str, Any]) -> int | None:
        """Which block calls, by the host's options; None for attention outside the joint sequence."""
        index, first = options.get("block_index"), 0
        if index is None:
            return None
        for name, host, _ in self.blocks:
            if host == options.get("block_type"):
                return first + index
            first += len(getattr(transformer, name))
        return None

    def options(self, transformer: Any, layer: int) -> dict[str, Any]:
        """The host's options by which ``layer`` finds a block."""
        for name, host, _ in self.blocks:
            count = len(getattr(transformer, name))
            if layer < count:
                return {"block_type": host, "block_index": layer}
            layer -= count
        raise IndexError(layer)

    def own_angles(self, transformer: Any) -> bool:
        """Whether angles are the host's own: its embedder, and no other node's."""
        return type(getattr(transformer, self.embedder)).__name__ == "EmbedND"

    def rope(self, transformer: Any, positions: Tensor) -> fr.RoPE:
        """The angles of tokens."""
        return fr.RoPE.axial(positions, self.axes_dim(transformer), self.theta(transformer))

    def theta(self, transformer: Any) -> float:
        """Base of the frequencies."""
        return float(getattr(transformer, self.embedder).theta)

    def axes_dim(self, transformer: Any) -> tuple[int, ...]:
        """RoPE channels of each axis."""
        return tuple(getattr(transformer, self.embedder).axes_dim)


def family_of(model: Any) -> tuple[Family, Any]:
    """The family of a ``BaseModel``, and its transformer, less what a compiler has wrapped around it.

    Raises:
        NotImplementedError: a model of no family, by name.
    """
    transformer = getattr(model, "diffusion_model", None)
    transformer = getattr(transformer, "_orig_mod", transformer)
    names = type(model).__name__, type(transformer).__name__
    for family in FAMILIES:
        if names[0] in family.models and names[1] == family.transformer:
            if names[0] == "Lumina2" and getattr(transformer, "pad_tokens_multiple", None) is None:
                break  # Lumina 2 itself
            return family, transformer
    known = ", ".join(name for family in FAMILIES for name in dict.fromkeys(family.models.values()))
    raise NotImplementedError(f"model: expected one of {known}, received {names[0]} with the transformer {names[1]}")


def least_text(model: Any) -> int:
    """Tokens of the shortest text that a model takes as it is; the host puts zeros before a shorter one."""
    return 512 if type(model).__name__ == "Flux2" else 0


# ---- where tokens lie and stand --------------------------------------------------------------------------------------


def _raster(
    grid: Grid, axes: int, first: float, start: Sequence[float] = (0, 0), step: Sequence[float] = (1, 1)
) -> Tensor:
    """``(rows * columns, axes)``: ``first`` on axis 0, rows on axis 1, columns on axis 2."""
    places = torch.zeros(*grid, axes, dtype=torch.float64, device="cpu")
    places[..., 0] = first
    places[..., 1] = (start[0] + step[0] * torch.arange(grid[0], dtype=torch.float64, device="cpu"))[:, None]
    places[..., 2] = start[1] + step[1] * torch.arange(grid[1], dtype=torch.float64, device="cpu")
    return places.flatten(0, 1)


def _rounded(size: int, patch: int) -> int:
    return (size + patch // 2) // patch


def _grid(latent: Grid, patch: int) -> Grid:
    """Tokens of a latent that the host pads to whole patches."""
    return -(-latent[0] // patch), -(-latent[1] // patch)


def _beside(references: Sequence[Grid]) -> list[Grid]:
    """Where references that share an index are placed: each beside what is there, on the shorter side."""
    height = width = 0
    found = []
    for rows, columns in references:
        down, right = (0, width) if rows + height > columns + width else (height, 0)
        height, width = max(height, rows + down), max(width, columns + right)
        found.append((down, right))
    return found


def _one_frame(call: Call) -> None:
    if call.frames != 1:
        raise NotImplementedError(f"latent: expected a picture, received {call.frames} frames (layers)")


def _describe_flux(transformer: Any, call: Call) -> Tokens:
    params, patch, rope = transformer.params, transformer.patch_size, dict(call.rope)
    axes, method = len(params.axes_dim), call.method or params.default_ref_method
    shift = [rope.get(f"shift_{axis}", 0.0) for axis in "tyx"]
    step = [rope.get(f"scale_{axis}", 1.0) for axis in "yx"]
    target, references = _grid(call.latent, patch), call.references
    if method in ("index", "index_timestep_zero"):
        first, starts = [params.ref_index_scale * (n + 1) for n in range(len(references))], [(0, 0)] * len(references)
    elif method == "uxo":
        before = [tuple(sum(each[n] for each in references[:i]) for n in (0, 1)) for i in range(len(references))]
        first, starts = [0] * len(references), [(target[0] * patch + y, target[1] * patch + x) for y, x in before]
    else:
        first, starts = [1] * len(references), _beside(references)
    text = torch.zeros(call.text, axes, dtype=torch.float64, device="cpu")
    for axis in params.txt_ids_dims:
        text[:, axis] = torch.arange(call.text, dtype=torch.float64, device="cpu")
    images = [_raster(target, axes, shift[0], shift[1:], step)]
    grids = [_grid(each, patch) for each in references]
    for grid, index, start in zip(grids, first, starts, strict=True):
        moved = [_rounded(n, patch) + s for n, s in zip(start, shift[1:], strict=True)]
        images.append(_raster(grid, axes, index + shift[0], moved, step))
    return Tokens(fr.TokenLayout(call.text, target, grids), torch.cat([text, *images]))


def _describe_qwen(transformer: Any, call: Call) -> Tokens:
    _one_frame(call)
    patch, method, references = transformer.patch_size, call.method or transformer.default_ref_method, call.references
    target, starts = _grid(call.latent, patch), [(0, 0)] * len(references)
    if method in ("index", "index_timestep_zero"):
        first = [n + 1 for n in range(len(references))]
    elif method == "negative_index":
        first = [-n - 1 for n in range(len(references))]
    else:
        first, starts = [1] * len(references), _beside(references)
    line = max(side // 2 for side in target) + torch.arange(call.text, dtype=torch.float64, device="cpu")
    grids = [target, *(_grid(each, patch) for each in references)]
    images = [
        _raster(grid, 3, index, [_rounded(n, patch) - side // 2 for n, side in zip(start, grid, strict=True)])
        for grid, index, start in zip(grids, [0, *first], [(0, 0), *starts], strict=True)
    ]
    return Tokens(fr.TokenLayout(call.text, target, grids[1:]), torch.cat([line[:, None].expand(-1, 3), *images]))


def _describe_z_image(transformer: Any, call: Call) -> Tokens:
    if call.references:
        raise NotImplementedError(
            "reference latents: expected none on Z-Image, received the omni mode, whose target comes last"
        )
    patch, multiple, rope = transformer.patch_size, transformer.pad_tokens_multiple, dict(call.rope)
    text, target = call.text + -call.text % multiple, _grid(call.latent, patch)
    padding = -target[0] * target[1] % multiple
    line = torch.zeros(text, 3, dtype=torch.float64, device="cpu")
    line[:, 0] = 1 + torch.arange(text, dtype=torch.float64, device="cpu")
    start, step = (
        [rope.get(f"{name}_{axis}", plain) for axis in "yx"] for name, plain in (("shift", 0.0), ("scale", 1.0))
    )
    image = _raster(target, 3, text + 1, start, step)
    filler = torch.zeros(padding, 3, dtype=torch.float64, device="cpu")
    return Tokens(fr.TokenLayout(text, target, padding=padding), torch.cat([line, image, filler]))


def _describe_krea(transformer: Any, call: Call) -> Tokens:
    _one_frame(call)
    method = call.method or getattr(transformer, "default_ref_method", None)
    references = call.references if method is not None else ()  # the host leaves them out, too
    grids = [_grid(each, transformer.patch) for each in (call.latent, *references)]
    text = torch.zeros(call.text, 3, dtype=torch.float64, device="cpu")
    images = [_raster(grid, 3, n) for n, grid in enumerate(grids)]
    return Tokens(fr.TokenLayout(call.text, grids[0], grids[1:]), torch.cat([text, *images]))


FAMILIES = (
    Family(
        {"Flux": "Flux.1 (dev, schnell, Kontext)", "Flux2": "Flux.2 and Klein"}, "Flux",
        (("double_blocks", "double", "double"), ("single_blocks", "single", "single")),
        "pe_embedder", _describe_flux, True, True,
    ),
    Family(
        {"QwenImage": "Qwen-Image and Qwen-Image-Edit"}, "QwenImageTransformer2DModel",
        (("transformer_blocks", "double", "double"),), "pe_embedder", _describe_qwen, True, False,
    ),
    Family({"Lumina2": "Z-Image"}, "NextDiT",
        (("layers", "double", "joint"),), "rope_embedder", _describe_z_image, False, False, True),
    Family({"Krea2": "Krea 2"}, "SingleStreamDiT",
        (("blocks", "single", "joint"),), "pe_embedder", _describe_krea, True, True, True),
)  # fmt: skip
