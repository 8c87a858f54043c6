"""Judges of an unfinished edit: has the paste been blended in, left raw, or erased?

A judge is any function ``(composite, estimate) -> answer`` of two PIL pictures, the photo with the crop pasted in and a
first estimate of the result; see :func:`fastrope.steer`. The answer is a :class:`Verdict`, or text that
:func:`read_verdict` reads one from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..checks import require
from .maps import as_map, as_pixels, dilate, resize_mask
from .schedules import require_number

CLASSES = ("success", "neglect", "suppression")
MOVES = {"neglect": -0.045, "suppression": 0.05}  # of LooseRoPE's boost, as the authors' code has it
RING = 4  # cells around the paste whose mean colour stands for a background nobody gave


@dataclass(frozen=True)
class Verdict:
    """A judge's answer.

    Args:
        kind: ``"success"``, ``"neglect"`` (the paste is left raw) or ``"suppression"`` (the paste is erased).
        reasoning: why, for people.
        readable: False where no class could be read from the answer, which then counts as success.
        measures: numbers behind the verdict.
    """

    kind: str
    reasoning: str = ""
    readable: bool = True
    measures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        require(self.kind in CLASSES, "Verdict.kind", f"one of {CLASSES}", repr(self.kind))


def read_verdict(answer: object) -> Verdict:
    """A verdict from whatever a judge said; what cannot be read counts as success.

    Text is read as JSON with a field ``class`` (or ``verdict``), failing that as a line ``class: ...``, failing that as
    a text that names one class and no other.
    """
    if isinstance(answer, Verdict):
        return answer
    text = answer.strip() if isinstance(answer, str) else repr(answer)
    found, reasoning = _from_json(text)
    if found is None:
        labelled = re.findall(r"\b(?:class|verdict|label)\b\W*(\w+)", text, re.IGNORECASE)
        named = [word.lower() for word in labelled if word.lower() in CLASSES]
        found = named[-1] if named else None
    if found is None:
        named = {word for word in re.findall(r"\w+", text.lower()) if word in CLASSES}
        found = named.pop() if len(named) == 1 else None
    if found is None:
        return Verdict("success", text, readable=False)
    return Verdict(found, text if reasoning is None else reasoning)


@dataclass(frozen=True, eq=False)
class RegionJudge:
    """Needs no model: how far the pasted region has moved away from the composite, and towards the background.

    All pictures are averaged onto ``size x size`` cells, because a first estimate has no fine detail. Over the cells of
    the paste, with ``p`` the composite, ``b`` the background and ``x`` the estimate,

    * ``change = |x - p| / |p - b|``: below ``unchanged`` the verdict is neglect;
    * ``kept = <x - b, p - b> / |p - b|^2``, 1 at the composite and 0 at the background: below ``erased`` it is
      suppression.

    The thresholds are plain defaults; no trained model was used to set them.

    Args:
        mask: the paste, ``(h, w)``, of any size.
        background: the photo before, any form of picture; None takes the mean colour around the paste.
        unchanged, erased: the thresholds, dimensionless.
        size: cells a side.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    mask: torch.Tensor
    background: object = None
    unchanged: float = 0.15
    erased: float = 0.5
    size: int = 64

    def __post_init__(self):
        mask = as_map("RegionJudge.mask", self.mask) != 0
        require(len(mask) == 1, "RegionJudge.mask", "one mask (h, w)", tuple(mask.shape))
        require(bool(mask.any()), "RegionJudge.mask", "at least one element inside", "none")
        for name in ("unchanged", "erased"):
            require_number(f"RegionJudge.{name}", getattr(self, name))
        ok = isinstance(self.size, int) and self.size > 0
        require(ok, "RegionJudge.size", "an integer of at least 1", repr(self.size))
        object.__setattr__(self, "mask", mask)

    def __call__(self, composite, estimate) -> Verdict:
        """Judge a pair of pictures of any form and size."""
        inside = resize_mask(self.mask, (self.size, self.size))
        paste, found = self._cells("composite", composite), self._cells("estimate", estimate)
        if self.background is None:
            ring = dilate(inside, RING) & ~inside
            around = ring if bool(ring.any()) else torch.ones_like(inside)
            behind = paste[:, around[0]].mean(dim=1)[:, None]
        else:
            behind = self._cells("background", self.background)[:, inside[0]]
        paste, found = paste[:, inside[0]], found[:, inside[0]]
        contrast = paste - behind
        if float(contrast.abs().max()) < 1:  # of 255
            return Verdict("success", "the paste looks like its background: nothing to judge", readable=False)
        change = float((found - paste).norm() / contrast.norm())
        kept = float(((found - behind) * contrast).sum() / contrast.square().sum())
        measures = {"change": change, "kept": kept}
        if change < self.unchanged:
            return Verdict("neglect", f"change {change:.3f} is below {self.unchanged:g}", measures=measures)
        if kept < self.erased:
            return Verdict("suppression", f"kept {kept:.3f} is below {self.erased:g}", measures=measures)
        return Verdict("success", f"change {change:.3f}, kept {kept:.3f}", measures=measures)

    def _cells(self, name: str, picture) -> torch.Tensor:
        """``(3, size, size)`` in 0..255."""
        pixels = as_pixels(name, picture)
        require(len(pixels) == 1, name, "one picture", f"a batch of {len(pixels)}")
        return F.interpolate(pixels, size=(self.size, self.size), mode="area")[0]


def _from_json(text: str) -> tuple[str | None, str | None]:
    """Class and reasoning of the last object in a text that names a class."""
    for start in reversed([m.start() for m in re.finditer(r"\{", text)]):
        try:
            value, _ = json.JSONDecoder().raw_decode(text[start:])
        except json.JSONDecodeError:
            continue
        fields = {str(k).lower(): v for k, v in value.items()} if isinstance(value, dict) else {}
        named = str(fields.get("class", fields.get("verdict", ""))).strip().lower()
        if named in CLASSES:
            return named, str(fields.get("reasoning", ""))
    return None, None
