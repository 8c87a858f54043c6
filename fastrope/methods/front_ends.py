"""From pictures to the maps of :class:`fastrope.LooseRoPE`, in the way of the authors' code."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .maps import blur, fill_outside, mask_at_centres, normalise, resize_by_overlap
from .saliency import Source, energy_of, input_size

FRONT_ENDS = ("fastrope", "published")
BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)  # over 16: OpenCV's 5-tap kernel without a given deviation
SHORTEST_EDGE = 800  # pixels, in the authors' detector


@dataclass(frozen=True, eq=False)
class PublishedSaliency:
    """Saliency on a token grid, as the published code computes it. It is called with the grid, ``(rows, columns)``.

    1. Put the mask on the token grid: resize it bilinearly and cut it at one half.
    2. Take the energy of the picture inside this mask, with its cells repeated. A detector sees the picture black
       outside the mask, resized to a shortest edge of 800 pixels.
    3. Interpolate the energy bilinearly to the size that the detector saw (other sources: to the picture's size).
    4. Outside the mask, set the smallest value of inside.
    5. Average onto the token grid by covered area.
    6. Blur with the kernel (1, 4, 6, 4, 1) / 16 in both directions, mirrored about the outermost cells.
    7. Stretch to 0..1. The published code also does this after 2 and 4, which does not change the result.

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
        return normalise(blur(resize_by_overlap(fill_outside(energy, seen), grid), BINOMIAL, mirrored=True))
