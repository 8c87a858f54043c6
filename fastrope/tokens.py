"""The spans of a joint sequence, and the place of an attention call in a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checks import require

ORDERS = ("text-first", "text-last")
CONVENTIONS = ("flux", "flux2", "qwen", "z-image")
KINDS = ("double", "single", "joint")


@dataclass(frozen=True, init=False, repr=False)
class TokenLayout:
    """The spans of a joint sequence: text, the image being made (target), the images it refers to.

    The order is ``[text | target | padding | references]``, or with ``order="text-last"`` (Z-Image)
    ``[target | padding | references | text]``. Spans are slices of the sequence.

    Args:
        text: number of text tokens, including padding that the host counts as text.
        target: ``(rows, columns)`` of the target's token grid.
        references: ``(rows, columns)`` of each reference image, in sequence order.
        order: ``"text-first"`` or ``"text-last"``.
        padding: padding tokens after the target, which no span covers (Z-Image pads an image to 32 tokens).
        shared: ``(rows, columns)`` of each reference image outside of the sequence (shared attention). Its tokens are
            further keys of the target's queries, after the sequence.

    Raises:
        ValueError: counts that are not integers, an empty grid, an unknown order.

    ``len()`` of a layout is the sequence length ``S``; with shared references there are :attr:`num_keys` keys. Layouts
    compare and hash by value.
    """

    text_tokens: int
    target_grid: tuple[int, int]
    reference_grids: tuple[tuple[int, int], ...]
    order: str
    padding: int
    shared_grids: tuple[tuple[int, int], ...]

    def __init__(
        self,
        text: int = 0,
        target: tuple[int, int] = (64, 64),
        references: Sequence[tuple[int, int]] = (),
        order: str = "text-first",
        padding: int = 0,
        shared: Sequence[tuple[int, int]] = (),
    ) -> None:
        _require_count("text", text)
        _require_count("padding", padding)
        require(order in ORDERS, "order", f"one of {ORDERS}", repr(order))
        values = {
            "text_tokens": text, "target_grid": _grid("target", target), "order": order, "padding": padding,
            "reference_grids": _grids("references", references), "shared_grids": _grids("shared", shared),
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        extra = f", order={self.order!r}" if self.order != ORDERS[0] else ""
        extra += f", padding={self.padding}" if self.padding else ""
        extra += f", shared={list(self.shared_grids)}" if self.shared_grids else ""
        references = list(self.reference_grids)
        return f"TokenLayout(text={self.text_tokens}, target={self.target_grid}, references={references}{extra})"

    def __len__(self) -> int:
        sizes = [_size(g) for g in (self.target_grid, *self.reference_grids)]
        return self.text_tokens + self.padding + sum(sizes)

    @property
    def text(self) -> slice:
        """The text tokens."""
        start = 0 if self.order == "text-first" else len(self) - self.text_tokens
        return slice(start, start + self.text_tokens)

    @property
    def target(self) -> slice:
        """The target's tokens, row by row."""
        start = self.text_tokens if self.order == "text-first" else 0
        return slice(start, start + _size(self.target_grid))

    @property
    def references(self) -> slice:
        """The tokens of all references; empty when there is none."""
        start = self.target.stop + self.padding
        return slice(start, start + sum(_size(g) for g in self.reference_grids))

    def reference(self, i: int = 0) -> slice:
        """The tokens of reference ``i``, row by row.

        Raises:
            ValueError: there is no such reference.
        """
        count = len(self.reference_grids)
        known = isinstance(i, int) and not isinstance(i, bool) and 0 <= i < count
        require(known, "i", f"a reference in [0, {count})", repr(i))
        start = self.references.start + sum(_size(g) for g in self.reference_grids[:i])
        return slice(start, start + _size(self.reference_grids[i]))

    @property
    def num_keys(self) -> int:
        """Number of keys of the target's queries: the sequence and the tokens of all shared references."""
        return self.shared.stop

    @property
    def shared(self) -> slice:
        """The tokens of all shared references, among the keys; empty when there is none."""
        return slice(len(self), len(self) + sum(_size(g) for g in self.shared_grids))

    def positions(self, convention: str, device: torch.device | str | None = None) -> torch.Tensor:
        """Position ids of every token as a host model gives them.

        ============ ==================== ===================== ===============================
        convention   text                 target                reference i
        ============ ==================== ===================== ===============================
        ``flux``     ``(0, 0, 0)``        ``(0, h, w)``         ``(1 + i, h, w)``
        ``flux2``    ``(0, 0, 0, l)``     ``(0, h, w, 0)``      ``(10 + 10 i, h, w, 0)``
        ``qwen``     ``(m+l, m+l, m+l)``  ``(0, h', w')``       ``(1 + i, h', w')``
        ``z-image``  ``(1 + l, 0, 0)``    ``(text + 1, h, w)``  not defined
        ============ ==================== ===================== ===============================

        ``l`` counts text tokens, ``h'`` and ``w'`` are centred (``h' = h - ceil(rows / 2)``) and ``m`` is the largest
        ``rows // 2`` or ``columns // 2`` of any image. FLUX.1 Kontext knows one reference; further ones continue its
        count. Sources: diffusers ``FluxPipeline``, ``FluxKontextPipeline``, ``Flux2Pipeline``, ``QwenEmbedRope`` with
        ``scale_rope``, ``ZImageTransformer2DModel.patchify_and_embed``.

        Returns:
            ``(S, axes)`` int64, in the order of the sequence; 4 axes for ``flux2``, else 3.

        Raises:
            ValueError: an unknown convention, or a span the convention has no positions for.
        """
        require(convention in CONVENTIONS, "convention", f"one of {CONVENTIONS}", repr(convention))
        if convention == "z-image":
            require(
                not self.reference_grids, "references", "none in the z-image convention", list(self.reference_grids)
            )
        else:
            require(self.padding == 0, "padding", f"0 in the {convention} convention", self.padding)
        line = torch.arange(self.text_tokens, device=device)
        zeros = torch.zeros_like(line)
        grids = (self.target_grid, *self.reference_grids)
        if convention == "flux":
            text = [zeros, zeros, zeros]
            images = [_raster(g, first=i, device=device) for i, g in enumerate(grids)]
        elif convention == "flux2":
            text = [zeros, zeros, zeros, line]
            images = [_raster(g, first=10 * i, device=device, trailing=1) for i, g in enumerate(grids)]
        elif convention == "qwen":
            text = [line + max(side // 2 for g in grids for side in g)] * 3
            images = [_raster(g, first=i, device=device, centred=True) for i, g in enumerate(grids)]
        else:
            text = [line + 1, zeros, zeros]
            filler = torch.zeros(self.padding, 3, dtype=torch.int64, device=device)
            images = [_raster(self.target_grid, first=self.text_tokens + 1, device=device), filler]
        spans = [torch.stack(text, dim=-1), *images]
        return torch.cat(spans if self.order == "text-first" else spans[1:] + spans[:1])


@dataclass(frozen=True)
class Site:
    """The place of an attention call in a run. A method gets this and nothing else.

    Args:
        tokens: the spans of the sequence.
        layer: index of the attention call in the model, in order of execution.
        step: index of the denoising step, from 0.
        num_steps: denoising steps of the schedule.
        axes_dim: RoPE channels of each position axis, even; they sum to the head dim ``D``.
        spatial_axes: the axes that hold rows and columns.
        num_layers: attention calls of the model, 57 in FLUX.1.
        kind: of the block: ``"double"`` (text and image have weights of their own), ``"single"`` (one stream, after
            double blocks) or ``"joint"`` (one stream from the start).
        kinds: all kinds of block in the model; empty if unknown.
        theta: base of the RoPE's frequencies.
        temporal_axis: the axis that holds frames; None in models of single pictures.
        sigma: noise level of the step, 1 for pure noise and 0 for none; None if unknown.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    tokens: TokenLayout
    layer: int = 0
    step: int = 0
    num_steps: int = 28
    axes_dim: tuple[int, ...] = (16, 56, 56)
    spatial_axes: tuple[int, ...] = (1, 2)
    num_layers: int = 57
    kind: str = "joint"
    kinds: tuple[str, ...] = ()
    theta: float = 10_000.0
    temporal_axis: int | None = None
    sigma: float | None = None

    def __post_init__(self) -> None:
        require(isinstance(self.tokens, TokenLayout), "tokens", "a fastrope.TokenLayout", type(self.tokens).__name__)
        _require_count("layer", self.layer)
        _require_count("num_layers", self.num_layers, least=1)
        require(self.kind in KINDS, "kind", f"one of {KINDS}", repr(self.kind))
        _require_count("num_steps", self.num_steps, least=1)
        _require_count("step", self.step)
        require(self.step < self.num_steps, "step", f"a step in [0, {self.num_steps})", self.step)
        for name in ("axes_dim", "spatial_axes"):
            value = getattr(self, name)
            require(isinstance(value, (tuple, list)) and len(value) > 0, name, "a tuple of integers", repr(value))
            for n in value:
                _require_count(name, n)
            object.__setattr__(self, name, tuple(value))
        even = all(d % 2 == 0 and d > 0 for d in self.axes_dim)
        require(even, "axes_dim", "positive even channel counts", self.axes_dim)
        axes = self.spatial_axes
        known = len(set(axes)) == len(axes) and max(axes) < len(self.axes_dim)
        require(known, "spatial_axes", f"distinct axes below {len(self.axes_dim)}", axes)

    @property
    def progress(self) -> float:
        """``step / (num_steps - 1)``: 0 at the first step, 1 at the last; 0 for a schedule of one step."""
        return self.step / max(self.num_steps - 1, 1)


def _require_count(name: str, value: Any, least: int = 0) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(ok, name, f"an integer of at least {least}", repr(value))


def _grid(name: str, grid: Any) -> tuple[int, int]:
    require(isinstance(grid, (tuple, list)) and len(grid) == 2, name, "(rows, columns)", repr(grid))
    for side in grid:
        _require_count(name, side, least=1)
    rows, columns = grid
    return rows, columns


def _grids(name: str, grids: Any) -> tuple[tuple[int, int], ...]:
    several = isinstance(grids, Sequence) and not isinstance(grids, str)
    require(several, name, "a list of (rows, columns)", repr(grids))
    return tuple(_grid(f"{name}[{i}]", grid) for i, grid in enumerate(grids))


def _size(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def _raster(
    grid: tuple[int, int], first: int, device: torch.device | str | None, centred: bool = False, trailing: int = 0
) -> torch.Tensor:
    """``(rows * columns, 3 + trailing)``: ``(first, h, w, 0...)``, row by row."""
    sides = [torch.arange(n, device=device) - ((n + 1) // 2 if centred else 0) for n in grid]
    h, w = torch.meshgrid(*sides, indexing="ij")
    axes = [torch.full_like(h, first), h, w] + [torch.zeros_like(h)] * trailing
    return torch.stack(axes, dim=-1).flatten(0, 1)
