"""From pictures to the maps of :class:`fastrope.LooseRoPE`, the way its authors' code goes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .maps import blur, level_outside, mask_at_centres, normalise, resize_by_overlap
from .saliency import Source, energy_of, input_size

FRONT_ENDS = ("fastrope", "published")
BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)  # OpenCV's 5-tap kernel where no deviation is given, over 16
SHORTEST_EDGE = 800  # pixels, of the authors' detector


@dataclass(frozen=True, eq=False)
class PublishedSaliency:
    """Saliency on a token grid, as the published code computes it; called with the grid, ``(rows, columns)``.

    1. The mask on the token grid: resized bilinearly, cut at one half.
    2. The energy of the picture that this mask, cells repeated, cuts out. A detector sees the picture blackened outside
       it and with a shortest edge of 800 pixels.
    3. The energy's cells interpolated bilinearly, to the size that the detector saw (others: to the picture's).
    4. Outside the mask the least of inside.
    5. Averaged onto the token grid by covered area, cells at borders in part.
    6. Blurred with the kernel (1, 4, 6, 4, 1) / 16 both ways, mirrored about the outermost cells.
    7. Stretched to 0..1. The published code does so after 2 and 4 as well, which changes nothing at the end.

    Args:
        images: ``(B, 3, H, W)`` in 0..1.
        masks: ``(B, H, W)`` or ``(1, H, W)`` bool, the paste in pixels.
        source: of the energy, as in :meth:`fastrope.LooseRoPE.from_images`.
    """

    images: torch.Tensor
    masks: torch.Tensor
    source: Source
    _known: dict = field(default_factory=dict, init=False, repr=False)

    def __call__(self, grid: tuple[int, int]) -> torch.Tensor:
        """``(B, rows, columns)`` float64 in 0..1; computed once per grid."""
        if grid not in self._known:
            self._known[grid] = self._on(grid)
        return self._known[grid]

    def _on(self, grid: tuple[int, int]) -> torch.Tensor:
        height, width = self.images.shape[2:]
        picture = height, width
        cells = mask_at_centres("original or mask", self.masks, grid)
        inside = F.interpolate(cells[:, None].double(), size=picture, mode="nearest-exact")[:, 0] > 0
        size = input_size(self.source, picture, SHORTEST_EDGE)
        energy = energy_of(self.source, self.images, inside, SHORTEST_EDGE, "bilinear", size)
        seen = F.interpolate(inside[:, None].double(), size=size, mode="nearest")[:, 0] > 0
        return normalise(blur(resize_by_overlap(level_outside(energy, seen), grid), BINOMIAL, mirrored=True))
