"""Which step of a run a call of the model belongs to, by the sampler's noise levels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

NEAR = 1e-4  # of a noise level: what the host takes for the same one


class Step(NamedTuple):
    """Step ``index`` of ``count``, at noise level ``sigma``."""

    index: int
    count: int
    sigma: float


class Steps:
    """Reads steps off a sampler's options. The levels of a run are read once."""

    def __init__(self) -> None:
        self._known: tuple[Tensor | None, list[float]] = (None, [])
        self._warned = False

    def find(self, options: Mapping[str, Any]) -> Step:
        """The step: the last one whose noise level is not below the call's. So what a sampler asks for between two
        levels belongs to the step that is under way, and two branches of guidance to the same step.

        A run that starts late (``denoise`` below 1) has the steps it makes. Where nothing tells the levels of the run,
        every call is step 0 of 1, and a warning is logged.
        """
        sigma = options.get("sigmas")
        now = float(sigma.flatten()[0]) if isinstance(sigma, Tensor) and sigma.numel() else 0.0
        levels = self._levels(options.get("sample_sigmas"))
        count = len(levels) - 1
        if count < 1 or not isinstance(sigma, Tensor):
            if not self._warned:
                self._warned = True
                logging.warning("fastrope: this sampler tells no noise levels, so every call is step 0 of 1")
            return Step(0, 1, now)
        reached = [n for n, level in enumerate(levels[:count]) if level >= now * (1 - NEAR)]
        return Step(reached[-1] if reached else 0, count, now)

    def _levels(self, sigmas: Any) -> list[float]:
        if not isinstance(sigmas, Tensor):
            return []
        if self._known[0] is not sigmas:
            self._known = sigmas, sigmas.flatten().tolist()
        return self._known[1]
