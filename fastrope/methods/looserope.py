"""LooseRoPE (arXiv 2601.05127): blend a pasted crop in, loosening position where the paste is not salient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..activity import Indices
from ..checks import is_whole, require
from ..modulations import LogitGain, Modulation, QueryScale
from ..pictures import as_pixels, mask_of
from ..tokens import Site, TokenLayout
from .front_ends import FRONT_ENDS, PublishedSaliency
from .maps import (
    as_map,
    blur,
    crop_mask,
    dilate,
    fill_outside,
    mask_at_centres,
    normalise,
    resize,
    resize_mask,
)
from .saliency import Source, energy_of
from .schedules import Activity, Steps, first_step_at, require_number

STEPS = 28  # of the published run, whose cut-offs come after steps 10, 18 and 22
TIMINGS = ("scaled", "absolute")
MASK_RULES = ("area", "centre")
WHITE = {"uint8": 255, "uint16": 65535}  # a mask with this value is a picture, and no map of numbers
KNOWN = 32  # sets of modulations to remember: text lengths of a run times phases


class Curve(NamedTuple):
    """From saliency to a factor: ``low + (high - low) (tanh(slope x) + 1) / 2`` with ``x`` from -1 to 1."""

    low: float
    high: float
    slope: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The factor at ``x``, elementwise."""
        return self.low + (self.high - self.low) * (torch.tanh(self.slope * x) + 1) / 2


RANGE = Curve(0.65, 1.0, 3.5)
CROP = Curve(0.65, 1.345, 6.5)


@dataclass(frozen=True, eq=False)
class LooseRoPE:
    """Blends a pasted crop in. Less salient parts of it have looser positions and smaller logits (LooseRoPE,
    arXiv 2601.05127).

    It acts on queries of the target inside the dilated mask. Against all keys of the reference, rows and columns of
    query and key are multiplied by a range factor ``r`` (:class:`fastrope.QueryScale`). Against the reference's keys
    inside the dilated mask, logits are multiplied by a crop factor ``g`` (:class:`fastrope.LogitGain`).

    ``sal = clip(boost S, 0, 1)``. With ``levels = N``, level i is ``sal`` in ``[i/N, (i+1)/N)``, and the last level
    includes 1. Both factors are the values of their curves at ``x_i = linspace(-1, 1, N)``. ``levels=None`` is the
    paper's formula: ``r = clip(lambda S, 0, 1)``, where lambda is ``boost``, and ``g`` is its curve at
    ``x = 2 sal - 1``.

    Over the run, in phase p = 0, 1, 2: ``r <- clip(range_growth ** p r, 0, 1)``, ``g <- 1 - (1 - g) crop_decay ** p``.

    Args:
        saliency: S, ``(h, w)`` or ``(B, h, w)``, array or tensor in 0..1, of any size; it is averaged onto the token
            grid. Or a function of the token grid ``(rows, columns)`` that returns S on it.
        mask: the paste, ``(h, w)`` or ``(B, h, w)``, nonzero = inside; of any size.
        boost: 0.83 as published. A lower value loosens more, if the paste stays raw. A higher value keeps more, if the
            paste is erased.
        levels: N, at least 2 (5 as published), or None or ``"continuous"`` for the paper's formula.
        range_curve: ``(low, high, slope)`` of the range factor; ``(1, 1, 0)`` leaves positions alone.
        crop_curve: ``(low, high, slope)`` of the crop factor; None leaves logits alone.
        range_growth, crop_decay: how the factors fade from phase to phase; 1 means that they do not.
        cutoffs: ends of the phases, as ascending fractions of the run; by default after steps 10 and 18 of 28.
        timing: ``"scaled"``: fractions of the run at any length. ``"absolute"``: fractions of 28 steps, so by default
            phases end after steps 10 and 18, and the method ends after step 22 of any run.
        steps: where the method acts: step indices as in :class:`fastrope.At`, or two floats ``(start, stop)``,
            fractions of the run; by default steps 0 to 22 of 28.
        layers: indices of the attention layers where the method acts, as in :class:`fastrope.At`; None means all.
        reference: index of the reference picture with the paste. Its grid may differ from the target's; the mask
            is put on both.
        dilation: how often the mask grows on the token grid by a 4-connected cross.
        smooth: blur the saliency on the token grid (5 x 5 Gaussian) and stretch it to 0..1, as :meth:`from_images`
            does.
        mask_rule: which tokens are inside. ``"area"``: those of which the mask covers a quarter (if there are none,
            those of which it covers the most). ``"centre"``: those whose centres it covers, interpolated bilinearly,
            as published.

    A step belongs to the fraction in which its middle lies. The published code counts steps: 10, 18 and 22 of 28 on
    FLUX, and of 50 on Qwen-Image-Edit. ``timing="scaled"`` is the default for both, because the effect of a step
    depends on its noise level, and the noise level depends on the fraction of the run. On FLUX at 28 steps the two
    timings are the same.

    Raises:
        ValueError: naming the argument, what was expected and what came; in :meth:`modulations` also a sequence without
            that reference.
    """

    saliency: torch.Tensor | Callable[[tuple[int, int]], torch.Tensor]
    mask: torch.Tensor
    boost: float = 0.83
    levels: int | str | None = 5
    range_curve: Curve = RANGE
    crop_curve: Curve | None = CROP
    range_growth: float = 1.4
    crop_decay: float = 0.7
    cutoffs: tuple[float, ...] = (11 / STEPS, 19 / STEPS)
    steps: Steps = (0.0, 23 / STEPS)
    layers: Indices | None = None
    reference: int = 0
    dilation: int = 2
    smooth: bool = False
    timing: str = "scaled"
    mask_rule: str = "area"
    _active: Activity = field(init=False, repr=False)
    _known: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        mask = as_map("LooseRoPE.mask", self.mask) != 0
        saliency = self.saliency if callable(self.saliency) else _checked_saliency(self.saliency, mask)
        require(bool(mask.any()), "LooseRoPE.mask", "at least one element inside", "none")
        for name, choices in (("timing", TIMINGS), ("mask_rule", MASK_RULES)):
            known = isinstance(getattr(self, name), str) and getattr(self, name) in choices
            require(known, f"LooseRoPE.{name}", f"one of {choices}", repr(getattr(self, name)))
        for name in ("boost", "range_growth", "crop_decay"):
            require_number(f"LooseRoPE.{name}", getattr(self, name))
            require(getattr(self, name) >= 0, f"LooseRoPE.{name}", "a number of at least 0", getattr(self, name))
        levels = None if isinstance(self.levels, str) and self.levels == "continuous" else self.levels
        _require_integer("LooseRoPE.levels", levels, 2, ', None or "continuous"', optional=True)
        _require_integer("LooseRoPE.reference", self.reference, 0)
        _require_integer("LooseRoPE.dilation", self.dilation, 0)
        cutoffs = self.cutoffs
        ok = isinstance(cutoffs, (tuple, list)) and all(isinstance(c, float) and 0 < c <= 1 for c in cutoffs)
        ascending = ok and all(a < b for a, b in pairwise(cutoffs))
        require(ascending, "LooseRoPE.cutoffs", "ascending fractions of the run in (0, 1]", repr(cutoffs))
        crop = self.crop_curve
        values = {
            "saliency": saliency, "mask": mask, "levels": levels, "cutoffs": tuple(cutoffs),
            "range_curve": _curve("LooseRoPE.range_curve", self.range_curve),
            "crop_curve": crop if crop is None else _curve("LooseRoPE.crop_curve", crop),
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)
        active = Activity(self.layers, self.steps)
        object.__setattr__(self, "_active", active if self.timing == "scaled" else active.at_length(STEPS))

    @classmethod
    def from_images(
        cls,
        composite: Any,
        original: Any = None,
        mask: Any = None,
        saliency: Source = "spectral_residual",
        threshold: float = 5,
        front_end: str = "fastrope",
        **dials: Any,
    ) -> LooseRoPE:
        """From pictures, for any token grid of a pipeline.

        The saliency is the source's energy of the crop, stretched to 0..1, with the smallest value of inside for all
        pixels outside of the mask. It is averaged onto the token grid, blurred (5 x 5 Gaussian) and stretched again.

        Args:
            composite: the photo with the crop pasted in: a PIL image, an array ``(H, W, 3)`` or a tensor ``(3, H, W)``,
                with a leading ``B`` for a batch; integers in 0..255 or floating-point numbers in 0..1. A PIL image is
                turned by its EXIF orientation, so give the pipeline a turned one, too
                (``PIL.ImageOps.exif_transpose``).
            original: the photo before, of the same size. The mask is where any channel differs by over ``threshold``.
            mask: the mask itself instead, ``(H, W)`` or ``(B, H, W)``. An array or tensor: nonzero = inside. A picture
                (a PIL image, uint8 up to 255 or uint16 up to 65535): at least half of white = inside, so that
                compression draws no outline. A PIL image with transparency: opaque = inside.
            saliency: ``"spectral_residual"`` (needs no model), ``"mask_rcnn"`` (torchvision's, downloads its weights),
                any ``nn.Module`` (its finest feature map), a function ``(image (3, H, W) in 0..1, mask (H, W)) ->
                energy (h, w)``, or the energy itself as an array.
            threshold: of 255.
            front_end: ``"fastrope"``: everything is computed in pixels, and a token is inside if a quarter of it is.
                ``"published"``, as in the authors' code: the mask is cut at token centres first, and the saliency is
                that of the tokens inside, see :class:`fastrope.methods.front_ends.PublishedSaliency`. The first is the
                default, because it does not lose pastes smaller than a token or rims of larger ones.
            dials: further arguments of :class:`LooseRoPE`.

        Raises:
            ValueError: neither or both of ``original`` and ``mask``, sizes that differ, nothing inside the mask.
            ImportError: ``"mask_rcnn"`` without torchvision.
        """
        known = isinstance(front_end, str) and front_end in FRONT_ENDS
        require(known, "front_end", f"one of {FRONT_ENDS}", repr(front_end))
        pixels = as_pixels("composite", composite)
        require((original is None) != (mask is None), "original", "either an original or a mask",
                "neither" if mask is None else "both")  # fmt: skip
        if mask is None:
            before = as_pixels("original", original)
            require(before.shape == pixels.shape, "original", f"the shape of the composite, {tuple(pixels.shape)}",
                    tuple(before.shape))  # fmt: skip
            require_number("threshold", threshold)
            inside = crop_mask(pixels, before, threshold)
        else:
            inside = _as_mask(mask)
            same = inside.shape[1:] == pixels.shape[2:] and len(inside) in (1, len(pixels))
            require(same, "mask", f"the size of the composite, {tuple(pixels.shape[2:])}", tuple(inside.shape))
        blamed = "mask" if original is None else "original"
        what = "a paste: pixels inside the mask (of a picture: half of white or more, or opaque)"
        require(bool(inside.any()), blamed, what, "none")
        if front_end == "published":
            on_grid = PublishedSaliency(pixels / 255, inside, saliency)
            return cls(saliency=on_grid, mask=inside, **{"mask_rule": "centre", **dials})
        energy = energy_of(saliency, pixels / 255, inside)
        filled = fill_outside(normalise(energy), inside)
        return cls(saliency=filled, mask=inside, **{"smooth": True, **dials})

    def phase(self, step: int, num_steps: int) -> int:
        """Number of cut-offs before a step. The first step of a run is always in phase 0."""
        num_steps = num_steps if self.timing == "scaled" else STEPS
        return sum(step >= max(first_step_at(cut, num_steps), 1) for cut in self.cutoffs)

    def factors(self, saliency: torch.Tensor, phase: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Range factor and crop factor of saliencies S in 0..1, elementwise, float64."""
        sal = (saliency.double() * self.boost).clamp(0, 1)
        if self.levels is None:
            r, x = sal, 2 * sal - 1
        else:
            like = {"dtype": sal.dtype, "device": sal.device}
            levels = int(self.levels)
            bounds = torch.arange(1, levels, **like) / levels
            x = torch.linspace(-1, 1, levels, **like)[torch.bucketize(sal, bounds, right=True)]
            r = self.range_curve(x)
        g = torch.ones_like(sal) if self.crop_curve is None else self.crop_curve(x)
        return (self.range_growth**phase * r).clamp(0, 1), 1 - (1 - g) * self.crop_decay**phase

    def on_grid(self, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Saliency and dilated mask on a token grid, ``(B, rows, columns)`` each."""
        rows, columns = grid
        saliency = self._saliency_on((rows, columns))
        if self.smooth:
            saliency = normalise(blur(saliency))
        return saliency, self._mask_on(grid)

    def _saliency_on(self, grid: tuple[int, int]) -> torch.Tensor:
        if not callable(self.saliency):
            return resize(self.saliency, grid)
        found = _checked_saliency(self.saliency(grid), self.mask)
        require(tuple(found.shape[1:]) == grid, "LooseRoPE.saliency", f"a map {grid} of that grid", tuple(found.shape))
        return found

    def _mask_on(self, grid: tuple[int, int]) -> torch.Tensor:
        centre = self.mask_rule == "centre"
        inside = mask_at_centres("LooseRoPE.mask", self.mask, grid) if centre else resize_mask(self.mask, grid)
        return dilate(inside, self.dilation)

    def modulations(self, site: Site) -> list[Modulation]:
        """A QueryScale and, per distinct mask, a LogitGain, unless they are neutral. Calls within one phase return the
        same objects."""
        if site not in self._active:
            return []
        tokens, phase = site.tokens, self.phase(site.step, site.num_steps)
        key = tokens, site.spatial_axes, phase
        if key not in self._known:
            if len(self._known) >= KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._build(tokens, site.spatial_axes, phase)
        return list(self._known[key])

    def _build(self, tokens: TokenLayout, axes: tuple[int, ...], phase: int) -> tuple[Modulation, ...]:
        saliency, queries = self.on_grid(tokens.target_grid)
        r, g = (torch.where(queries, f, 1.0).flatten(1) for f in self.factors(saliency, phase))
        if bool((r == 1).all()) and bool((g == 1).all()):
            return ()
        count = len(tokens.reference_grids)
        require(count > 0, "LooseRoPE", "a sequence with at least one reference picture", repr(tokens))
        require(self.reference < count, "LooseRoPE.reference", f"a reference in [0, {count})", self.reference)
        keys = self._mask_on(tokens.reference_grids[self.reference])
        rows, reference = max(len(r), len(keys)), tokens.reference(self.reference)
        scale, gain = torch.ones(2, rows, len(tokens), dtype=torch.float64, device="cpu")
        scale[:, tokens.target], gain[:, tokens.target] = r, g
        found: list[Modulation] = []
        if bool((scale != 1).any()):
            found.append(QueryScale(_shared(scale), keys=reference, axes=axes))
        # A modulation has the same keys in all rows, so every distinct mask needs a modulation.
        masks, mask_of_row = keys.flatten(1).expand(rows, -1).unique(dim=0, return_inverse=True)
        for n, inside in enumerate(masks):
            gains = torch.where((mask_of_row == n)[:, None], gain, 1.0)
            if bool(inside.any()) and bool((gains != 1).any()):
                covered = torch.zeros(len(tokens), dtype=torch.bool, device="cpu")
                covered[reference] = inside
                found.append(LogitGain(_shared(gains), keys=covered))
        return tuple(found)


def _checked_saliency(value: object, mask: torch.Tensor) -> torch.Tensor:
    saliency = as_map("LooseRoPE.saliency", value)
    within = bool(((saliency >= 0) & (saliency <= 1)).all())
    require(within, "LooseRoPE.saliency", "values in 0..1", f"{float(saliency.min()):g}..{float(saliency.max()):g}")
    rows = len(saliency), len(mask)
    require(rows[0] == rows[1] or 1 in rows, "LooseRoPE.mask", f"1 or {rows[0]} maps, as saliency", rows[1])
    return saliency


def _shared(x: torch.Tensor) -> torch.Tensor:
    """``(S,)`` if there is one row, which then serves any batch."""
    return x[0] if len(x) == 1 else x


def _as_mask(mask: Any) -> torch.Tensor:
    if callable(getattr(mask, "convert", None)):
        return torch.from_numpy(mask_of("mask", mask))[None]
    found = as_map("mask", mask)
    white = WHITE.get(str(mask.dtype).removeprefix("torch."))
    return found > white / 2 if white is not None and float(found.max()) == white else found != 0


def _curve(name: str, value: Any) -> Curve:
    ok = isinstance(value, (tuple, list)) and len(value) == 3
    require(ok, name, "(low, high, slope)", repr(value))
    for part, number in zip(Curve._fields, value, strict=True):
        require_number(f"{name}.{part}", number)
    return Curve(*(float(v) for v in value))


def _require_integer(name: str, value: Any, least: int, also: str = "", optional: bool = False) -> None:
    ok = is_whole(value) and value >= least
    require(ok or (optional and value is None), name, f"an integer of at least {least}{also}", repr(value))
