"""Judges of an unfinished edit: does the paste belong to the scene, is it still the raw crop, or does it disappear?

A judge is any function ``(composite, estimate) -> answer`` of two PIL pictures: the photo with the crop pasted in, and
a first estimate of the result; see :func:`fastrope.steer`. The answer is a :class:`Verdict`, or text for
:func:`read_verdict`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..checks import require
from ..pictures import as_pixels
from .maps import areas, as_map, dilate, resize_mask
from .schedules import require_number

if TYPE_CHECKING:
    from PIL.Image import Image

CLASSES = ("success", "neglect", "suppression")
MOVES = {"neglect": -0.045, "suppression": 0.05}  # of LooseRoPE's boost, as in the authors' code
READ, STARTS = 20_000, 64  # characters and objects of an answer; the object that we ask for is far shorter
LABEL = r"^[^\w\n]{0,20}(?:class|verdict|label)\b[^\w\n]{0,20}(\w{1,20})\b(?![^\S\n]*\w)"
QUOTED = r'"[^"\n]*"|[\u201c\u2018][^\u2018-\u201d\n]*[\u201d\u2019]|(?<!\w)\'[^\'\n]*\'(?!\w)|`[^`\n]*`'
NEGATED = r"\b(?:no|not|non|nor|never|neither|without|cannot|hardly|barely|un)\b|n['\u2019]t\b"
SMALL = 0.05  # areas with a smaller share of the paste are not judged: compression leaves specks
RING = 4  # cells around the paste; their mean colour is the background if none is given


@dataclass(frozen=True)
class Verdict:
    """A judge's answer.

    Args:
        kind: ``"success"``: the scene's background has replaced the crop's. ``"neglect"``: the crop's own background,
            its edge or filler foreign to the scene is still visible in some pasted area. ``"suppression"``: the object
            has lost its identity, or parts of it are missing.
        reasoning: why, for people.
        readable: False if the answer has no readable class; it then counts as success.
        measures: the numbers behind the verdict.
    """

    kind: str
    reasoning: str = ""
    readable: bool = True
    measures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.kind in CLASSES, "Verdict.kind", f"one of {CLASSES}", repr(self.kind))


def read_verdict(answer: object) -> Verdict:
    """The verdict in a judge's answer. An unreadable answer counts as success, with ``readable=False``.

    In a text, the last complete JSON object with the fields ``class`` and ``reasoning`` counts. If there is none, the
    first of these counts: the last object with a ``class``; a ``class`` at the very end of a broken object; the last
    line that starts with ``class:``; the only class that is named in a text without negations, outside of quotations.
    ``verdict`` may replace ``class``. An object inside another one is no answer, because a model may quote text from a
    picture. The time is bounded: only the last :data:`READ` characters and :data:`STARTS` objects are read.
    """
    if isinstance(answer, Verdict):
        return answer
    if not isinstance(answer, str):
        return Verdict("success", f"expected text, received {type(answer).__name__}", readable=False)
    text = answer.strip()
    tail = text[-READ:]
    found, reasoning = _from_json(tail)
    found = found or _from_words(tail)
    if found is None:
        return Verdict("success", text, readable=False)
    return Verdict(found, text if reasoning is None else reasoning)


@dataclass(frozen=True, eq=False)
class RegionJudge:
    """Measures how far pasted areas have moved away from the composite and towards the background. Needs no model.

    All pictures are averaged onto ``size x size`` cells, because a first estimate has no fine detail. Over the cells of
    each connected area of the paste, with ``p`` the composite, ``b`` the background and ``x`` the estimate,

    * ``change = |x - p| / |p - b|``. If it is below ``unchanged`` in any area, the verdict is neglect.
    * ``kept = <x - b, p - b> / |p - b|^2``, 1 at the composite and 0 at the background. If it is below ``erased`` in
      any area, the verdict is suppression.

    This only approximates the verdicts (see :class:`Verdict`), because colours alone cannot tell the crop's background
    from its object. The thresholds are plain defaults; they were not set on a trained model.

    Args:
        mask: the paste, ``(h, w)``, of any size.
        background: the photo before, any form of picture; None means the mean colour around the paste.
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

    def __post_init__(self) -> None:
        mask = as_map("RegionJudge.mask", self.mask) != 0
        require(len(mask) == 1, "RegionJudge.mask", "one mask (h, w)", tuple(mask.shape))
        require(bool(mask.any()), "RegionJudge.mask", "at least one element inside", "none")
        for name in ("unchanged", "erased"):
            require_number(f"RegionJudge.{name}", getattr(self, name))
        ok = isinstance(self.size, int) and self.size > 0
        require(ok, "RegionJudge.size", "an integer of at least 1", repr(self.size))
        object.__setattr__(self, "mask", mask)

    def __call__(self, composite: Image, estimate: Image) -> Verdict:
        """Judge a pair of pictures of any form and size."""
        inside = resize_mask(self.mask, (self.size, self.size))
        paste, found = self._cells("composite", composite), self._cells("estimate", estimate)
        background = None if self.background is None else self._cells("background", self.background)
        judged = []
        for area in areas(inside):
            if float(area.sum()) >= SMALL * float(inside.sum()):
                behind = _around(paste, area, inside) if background is None else background[:, area[0]]
                judged += _moved(paste[:, area[0]], found[:, area[0]], behind)
        if not judged:
            return Verdict("success", "nothing to judge, since the paste looks like its background", readable=False)
        change, kept = (min(values) for values in zip(*judged, strict=True))
        measures = {"change": change, "kept": kept}
        if change < self.unchanged:
            return Verdict("neglect", f"change {change:.3f} is below {self.unchanged:g}", measures=measures)
        if kept < self.erased:
            return Verdict("suppression", f"kept {kept:.3f} is below {self.erased:g}", measures=measures)
        return Verdict("success", f"change {change:.3f}, kept {kept:.3f}", measures=measures)

    def _cells(self, name: str, picture: Any) -> torch.Tensor:
        """``(3, size, size)`` in 0..255."""
        pixels = as_pixels(name, picture)
        require(len(pixels) == 1, name, "one picture", f"a batch of {len(pixels)}")
        return F.interpolate(pixels, size=(self.size, self.size), mode="area")[0]


def _around(paste: torch.Tensor, area: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The mean colour ``(3, 1)`` of the cells around an area, or of all cells if the area fills the picture."""
    ring = dilate(area, RING) & ~inside
    ring = ring if bool(ring.any()) else torch.ones_like(inside)
    return paste[:, ring[0]].mean(dim=1)[:, None]


def _moved(paste: torch.Tensor, found: torch.Tensor, behind: torch.Tensor) -> list[tuple[float, float]]:
    """Change and kept share over the cells of an area, ``(3, cells)`` each; empty if it looks like its background."""
    contrast = paste - behind
    if float(contrast.abs().max()) < 1:  # of 255
        return []
    change = float((found - paste).norm() / contrast.norm())
    return [(change, float(((found - behind) * contrast).sum() / contrast.square().sum()))]


def _from_json(text: str) -> tuple[str | None, str | None]:
    """Class and reasoning of the last object of a text with both, else of the last object with a class."""
    outer = [0] * (len(text) + 1)  # at every place: number of later braces that close something opened before it
    for place in range(len(text) - 1, -1, -1):
        step = {"}": 1, "{": -1}.get(text[place], 0)
        outer[place] = max(outer[place + 1] + step, 0)
    second = None, None
    opened = [READ * (len(text) == READ)]  # number of open braces; many if the beginning of the text was cut off
    for sign in text:
        opened.append(max(opened[-1] + {"{": 1, "}": -1}.get(sign, 0), 0))
    for start in [m.start() for m in re.finditer(r'\{\s*"', text)][: -STARTS - 1 : -1]:
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if opened[start] and outer[end]:  # inside another object
            continue
        fields = {str(k).lower(): v for k, v in value.items()}
        named = str(fields.get("class", fields.get("verdict", ""))).strip().lower()
        if named in CLASSES and isinstance(fields.get("reasoning"), str):
            return named, fields["reasoning"]
        if named in CLASSES and second[0] is None:
            second = named, ""
    if second[0] is None and (last := re.search(r'"class"\s{0,9}:\s{0,9}"(\w{1,20})"\s{0,9}\}\W{0,9}$', text)):
        second = (last[1].lower(), None) if last[1].lower() in CLASSES else second
    return second


def _from_words(text: str) -> str | None:
    """The class in a text without a readable object: after a label, or the only class that is named and not denied."""
    if (alone := re.sub(r"\W+", "", text[:99]).lower()) in CLASSES and len(text) < 99:
        return alone
    labelled = [m[1].lower() for m in re.finditer(LABEL, text, re.IGNORECASE | re.MULTILINE)]
    labelled = [word for word in labelled if word in CLASSES]
    if labelled:
        return labelled[-1]
    unquoted = re.sub(QUOTED, "", text)
    named = {word for word in re.findall(r"\w+", unquoted.lower()) if word in CLASSES}
    return named.pop() if len(named) == 1 and not re.search(NEGATED, unquoted, re.IGNORECASE) else None
