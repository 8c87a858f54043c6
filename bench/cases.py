"""Which modulations: what the published methods ask of one attention call, with the values they publish."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import fastrope as fr
from fastrope.modulations import Modulation

from .workloads import Workload

# LooseRoPE (arXiv 2601.05127): range and crop factors of its five saliency levels.
RANGE = (0.6503, 0.6603, 0.8250, 0.9897, 0.9997)
CROP = (0.6500, 0.6510, 0.9975, 1.3440, 1.3450)
PLAIN = "plain"
SPATIAL = (1, 2)  # position axes of rows and columns
# Untwisting RoPE (arXiv 2602.05013): weights of the highest and lowest frequency half-way through the steps.
HIGH, LOW, BETA = 0.5, 1.2, 2.0
# GRAG (arXiv 2510.24657): lambda and delta of its demo.
BIAS, DELTA = 1.0, 1.10
SPANS = 5  # weights that one launch does not hold


@dataclass(frozen=True)
class Case:
    """A list of modulations. ``shared`` cases are those of workloads with a shared reference."""

    name: str
    summary: str
    modulations: Callable[[Workload, torch.device], list[Modulation]]
    shared: bool = False

    def suits(self, workload: Workload) -> bool:
        """Whether the case says something of this workload."""
        return self.name == PLAIN or self.shared == bool(workload.tokens.shared_grids)


def crop(workload: Workload) -> torch.Tensor:
    """Where the crop is: ``(rows * columns,)`` bool over the target's grid, a centred quarter of it."""
    rows, columns = workload.tokens.target_grid
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    inside[rows // 4 : rows // 4 + rows // 2, columns // 4 : columns // 4 + columns // 2] = True
    return inside.flatten()


def per_query(workload: Workload, values: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> torch.Tensor:
    """``(S,)`` float32: ``values(saliency)`` for the target's tokens inside the crop, 1 for all other tokens.

    Saliency is evenly spread over (0, 1) and scattered over the crop, which is the worst order for tiles of queries.
    """
    where = workload.tokens.target.start + crop(workload).nonzero().flatten()
    order = torch.randperm(len(where), generator=torch.Generator().manual_seed(0))
    out = torch.ones(len(workload.tokens))
    out[where] = values((order + 0.5) / len(where))
    return out.to(device)


def by_level(table: tuple[float, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Level ``i`` of ``n`` for a saliency in ``[i / n, (i + 1) / n)``."""
    return lambda saliency: torch.tensor(table)[(saliency * len(table)).long()]


def grag(workload: Workload, device: torch.device) -> list[Modulation]:
    """The references' keys around their mean."""
    return [fr.BiasDelta(BIAS, DELTA, keys=workload.source)]


def bands(workload: Workload, device: torch.device) -> list[Modulation]:
    """``s_hf + (s_lf - s_hf) (d / (n - 1)) ** beta`` over the ``n`` pairs of a spatial axis, ``s_lf`` elsewhere."""
    weights = []
    for axis, channels in enumerate(workload.axes_dim):
        pairs = channels // 2
        curve = HIGH + (LOW - HIGH) * torch.linspace(0, 1, pairs) ** BETA
        weights.append(curve if axis in SPATIAL else torch.full((pairs,), LOW))
    return [fr.BandWeight(torch.cat(weights).to(device), keys=workload.source)]


def loose_levels(workload: Workload, device: torch.device) -> list[Modulation]:
    """Five scales on the crop's queries, against all keys of the reference."""
    return [fr.QueryScale(per_query(workload, by_level(RANGE), device), keys=workload.source, axes=SPATIAL)]


def loose_per_query(workload: Workload, device: torch.device) -> list[Modulation]:
    """The paper's formula: every query of the crop has a scale of its own, over the same range."""
    scale = per_query(workload, lambda saliency: RANGE[0] + (1 - RANGE[0]) * saliency, device)
    return [fr.QueryScale(scale, keys=workload.source, axes=SPATIAL)]


def crop_gain(workload: Workload, device: torch.device) -> list[Modulation]:
    """Logits of the crop's queries against the crop's place in the reference."""
    keys = torch.zeros(workload.tokens.num_keys, dtype=torch.bool)
    keys[workload.source_grid] = crop(workload)
    return [fr.LogitGain(per_query(workload, by_level(CROP), device), keys=keys.to(device))]


def spans(workload: Workload, device: torch.device) -> list[Modulation]:
    """The references' keys in equal runs, each under a weight of its own."""
    bounds = torch.linspace(workload.source.start, workload.source.stop, SPANS + 1).long().tolist()
    pairs = sum(workload.axes_dim) // 2
    return [
        fr.BandWeight(torch.linspace(HIGH, LOW + n / 10, pairs, device=device), keys=slice(*run))
        for n, run in enumerate(itertools.pairwise(bounds))
    ]


def logit_bias(workload: Workload, device: torch.device) -> list[Modulation]:
    """The references' keys, the same for all queries."""
    return [fr.LogitBias(0.7, keys=workload.source)]


def regions(workload: Workload, device: torch.device) -> list[Modulation]:
    """Three runs of text, each with a bias of its own for every query."""
    queries = len(workload.tokens)
    return [
        fr.LogitBias(torch.linspace(-n, 1, queries, device=device), keys=slice(15 * n, 15 * n + 9)) for n in (1, 2, 3)
    ]


def key_bias(workload: Workload, device: torch.device) -> list[Modulation]:
    """Every key has a bias of its own."""
    return [fr.KeyBias(torch.linspace(-1, 1, workload.tokens.num_keys, device=device))]


def values(workload: Workload, device: torch.device) -> list[Modulation]:
    """The references' values: gained, and around their mean."""
    return [fr.ValueGain(-0.5, keys=workload.source), fr.BiasDelta(1.1, 0.8, workload.source, on="values")]


def _together(*parts: Callable) -> Callable[[Workload, torch.device], list[Modulation]]:
    return lambda workload, device: [m for part in parts for m in part(workload, device)]


def chosen(workload: Workload, names: Sequence[str] | None) -> list[Case]:
    """The cases of a workload: those asked for, else its own, else all; of these the ones that suit."""
    names = names or workload.cases or tuple(CASES)
    return [CASES[name] for name in names if CASES[name].suits(workload)]


def _cases(*cases: Case) -> dict[str, Case]:
    return {c.name: c for c in cases}


CASES = _cases(
    Case(PLAIN, "rotation and attention", _together()),
    Case("grag", "BiasDelta on the reference", grag),
    Case("bands", "BandWeight on the reference", bands),
    Case("loose-levels", "QueryScale, five levels on a quarter of the target", loose_levels),
    Case("loose-per-query", "QueryScale, a quarter of the target, all different", loose_per_query),
    Case("crop-gain", "LogitGain, a quarter of the target and of the reference", crop_gain),
    Case("all", "all four, levels", _together(loose_levels, bands, grag, crop_gain)),
    Case("all-per-query", "all four, all scales different", _together(loose_per_query, bands, grag, crop_gain)),
    Case("shared", "BandWeight on the keys of a shared reference", bands, shared=True),
)
# What is held to the reference and not timed.
CHECKED = _cases(
    Case("bias", "LogitBias on the reference", logit_bias),
    Case("regions", "LogitBias on three runs of text, one for each query", regions),
    Case("key bias", "KeyBias on all keys", key_bias),
    Case("values", "ValueGain and BiasDelta on the values of the reference", values),
    Case("passes", "several passes over the keys: BandWeight on five parts of the reference", spans),
    Case("passes-per-query", "the same beside QueryScale, all different", _together(loose_per_query, spans)),
)
